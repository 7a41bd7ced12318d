"""Arithmetic as pure functions of tensors and values: formats, affine maps, ranges, rounding, error
measures.
"""
