"""A tensor as the bytes it has on disk: contiguous, little-endian."""

import sys

import torch
from torch import Tensor

__all__ = ["dtype_name", "raw_bytes"]


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of `dtype` as manifests and digests spell it.

    >>> dtype_name(torch.bfloat16)
    'bfloat16'
    """
    return str(dtype).removeprefix("torch.")


def raw_bytes(tensor: Tensor) -> memoryview:
    """Return the values of `tensor`, any shape and device, in row-major order: no copy where it is
    contiguous, on the CPU and of native order.

    Raises:
        ValueError: `tensor` has no dense values to write: it is on the meta device, or not strided.
    """
    if tensor.is_meta or tensor.layout != torch.strided:
        raise ValueError(
            f"a tensor of layout {tensor.layout} on device {tensor.device} has "
            "no dense values; materialise it before writing it"
        )
    dense = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    # Neither reshape nor contiguous resets the stride of an axis of length 1, which view() would refuse.
    flat = dense.as_strided((dense.numel(),), (1,))
    octets = flat.view(torch.uint8)
    if sys.byteorder == "big":
        width = flat.element_size() // (2 if flat.is_complex() else 1)
        octets = octets.view(-1, width).flip(1).reshape(-1)
    return octets.numpy().data
