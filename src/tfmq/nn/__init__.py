"""Quantized counterparts of a denoiser's parts, and how they take their place."""
