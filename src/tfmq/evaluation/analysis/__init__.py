"""Where a quantized model loses: by timestep, by temporal feature, by layer, by unit."""
