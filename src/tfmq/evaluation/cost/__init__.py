"""What a quantized model costs to run, beside full precision and other quantizers: time, memory, bytes,
accuracy of one denoising step.
"""
