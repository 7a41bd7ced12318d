"""The operators' GPU kernels in Triton, the only folder that imports it: `register` makes CUDA tensors use
them.
"""
