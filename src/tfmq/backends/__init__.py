"""What executes a quantized denoiser: the simulation it was calibrated in, exact integers, or an integer
engine.
"""
