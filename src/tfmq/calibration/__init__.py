"""Calibration data: recorded trajectories, what layers see on them, and the ranges that follow."""
