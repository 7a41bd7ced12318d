"""diffusers: pipelines as samplers, and quantized components through its quantizer interface."""
