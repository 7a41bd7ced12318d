"""Checkpoints of the published models in their original layouts, as diffusers pipelines."""
