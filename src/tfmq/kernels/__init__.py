"""Integer arithmetic of one layer or product: an exact reference, and library kernels that are tested against
it.
"""
