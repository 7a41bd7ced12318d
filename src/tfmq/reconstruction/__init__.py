"""Learned rounding: units, the one optimisation loop, and what it is applied to."""
