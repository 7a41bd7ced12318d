"""How far two tensors are apart."""

import torch
from torch import Tensor


def relative_error(reference: Tensor, value: Tensor) -> Tensor:
    """Return `||reference - value|| / ||reference||` over the last axis; 0 where both are zero."""
    difference = torch.linalg.vector_norm(reference - value, dim=-1)
    return difference / torch.linalg.vector_norm(reference, dim=-1).clamp(min=1e-12)


def cosine(reference: Tensor, value: Tensor) -> Tensor:
    """Return the cosine between two tensors over the last axis."""
    return torch.nn.functional.cosine_similarity(reference, value, dim=-1, eps=1e-12)


def sqnr_db(reference: Tensor, value: Tensor) -> float:
    """Return the signal-to-quantization-noise ratio `10 log10(sum r^2 / sum (r - v)^2)` in dB, accumulated in
    float64.
    """
    reference, value = reference.double(), value.double()
    noise = (reference - value).square().sum()
    return float(10.0 * torch.log10(reference.square().sum() / noise)) if noise > 0 else float("inf")
