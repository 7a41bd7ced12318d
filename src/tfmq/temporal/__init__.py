"""Temporal features: found, maintained, tabulated, measured."""
