"""A quantized pipeline as a directory that OpenVINO GenAI and optimum-intel open."""
