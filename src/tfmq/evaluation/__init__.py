"""What a quantized model is worth: its images beside the original's, its temporal features, its size."""
