"""Weights as sums of two halves, for processors that cut sums of products off.

x86 processors without VNNI (AVX2, and AVX-512 before Ice Lake) multiply u8 codes and s8 weights in pairs and
add the two products in int16, where `255 * 127 + 255 * 127` becomes 32767. The integer kernels of oneDNN
compute so, and with them torch and OpenVINO; those of ONNX Runtime do too. Weights of up to seven bits never
get that far. One of eight bits is computed as `v = a + b` with halves that do not either, in twice the time.
"""

from functools import cache

import torch
from torch import Tensor

# Largest magnitude of a weight with which two products with codes of eight bits fit into int16.
WHOLE = 64


@cache
def saturates() -> bool:
    """Whether this processor cuts sums of two products off at sixteen bits, as one product shows that torch's
    oneDNN computes. A torch without oneDNN, as on ARM, counts as one that does not.
    """
    codes = torch.full((2, 64), 255, dtype=torch.uint8)
    values = torch.full((16, 64), 127, dtype=torch.int8)
    try:
        packed = torch.ops.onednn.qlinear_prepack(values, None)
        grid = 1.0, 0, packed, torch.ones(16), torch.zeros(16, dtype=torch.int32)
        y = torch.ops.onednn.qlinear_pointwise(codes, *grid, None, 1.0, 0, torch.float32, "none", [], "")
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
    return bool((y != 64 * 255 * 127).any())


def halves(values: Tensor) -> tuple[Tensor, ...]:
    """Return integers of eight signed bits as the terms of their sum: one if no magnitude is above `WHOLE`,
    else two that have none above it.

    >>> halves(torch.tensor([-128, 3, 127]))
    (tensor([-64,   1,  63]), tensor([-64,   2,  64]))
    >>> halves(torch.tensor([-64, 64]))
    (tensor([-64,  64]),)
    """
    if int(values.min()) >= -WHOLE and int(values.max()) <= WHOLE:
        return (values,)
    half = values >> 1
    return half, values - half


def wanted(halved: bool | None) -> bool:
    """Return whether weights are to be halved: as asked, or where it is None as this processor needs it."""
    return saturates() if halved is None else halved


def terms(values: Tensor, *, halved: bool | None = None) -> tuple[Tensor, ...]:
    """Return integers as the terms that a kernel multiplies: `halves` where these are `wanted`, else one."""
    return halves(values) if wanted(halved) else (values,)
