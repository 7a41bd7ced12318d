"""Graphs of a quantized denoiser for engines outside torch."""
