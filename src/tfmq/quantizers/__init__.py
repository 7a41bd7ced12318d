"""Modules that hold quantization parameters which somebody else fitted."""
