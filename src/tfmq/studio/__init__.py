"""A local page that draws the same image with a quantized model and its original."""
