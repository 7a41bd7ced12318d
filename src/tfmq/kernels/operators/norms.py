"""Normalisation that writes codes: what stands in front of most layers of a denoiser, in one operator with
the quantizer of the layer.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tfmq.kernels.operators.epilogue import ACTIVATIONS
from tfmq.kernels.operators.grids import rows_of
from tfmq.kernels.operators.quantize import codes_of, padded_shape


@torch.library.custom_op("tfmq::group_norm_codes", mutates_args=())
def group_norm_codes(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    activation: str,
    scale: Tensor,
    zero_point: Tensor,
    index: Tensor,
    segments: Sequence[int],
    levels: int,
    padding: Sequence[int],
) -> Tensor:
    """Return the codes of `activation(group_norm(x))` for images `x` `[B, H, W, C]`, "" or "silu", in float32
    up to the rounding to codes.
    """
    normed = F.group_norm(x.float().movedim(-1, 1), groups, weight.float(), bias.float(), eps).movedim(1, -1)
    return codes_of(ACTIVATIONS[activation](normed), scale, zero_point, index, segments, levels, padding)


@group_norm_codes.register_fake
def _(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    activation: str,
    scale: Tensor,
    zero_point: Tensor,
    index: Tensor,
    segments: Sequence[int],
    levels: int,
    padding: Sequence[int],
) -> Tensor:
    return x.new_empty(padded_shape(x.shape, padding), dtype=torch.int8)


@torch.library.custom_op("tfmq::layer_norm_codes", mutates_args=())
def layer_norm_codes(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    gain: Tensor | None,
    shift: Tensor | None,
    scale: Tensor,
    zero_point: Tensor,
    index: Tensor,
    segments: Sequence[int],
    levels: int,
) -> Tensor:
    """Return the codes of `layer_norm(x) (1 + gain) + shift` for tokens `x` `[B, ..., C]`; `gain` and `shift`
    `[B or 1, C]` come together or not.

    The normalisation is over the channels, with `weight` and `bias` `[C]` where it has them; all in float32
    up to the rounding to codes.
    """
    y = F.layer_norm(
        x.float(),
        x.shape[-1:],
        None if weight is None else weight.float(),
        None if bias is None else bias.float(),
        eps,
    )
    if gain is not None and shift is not None:
        every = torch.arange(len(gain), device=gain.device)
        y = y * (1 + rows_of(gain.float(), every, x)) + rows_of(shift.float(), every, x)
    return codes_of(y, scale, zero_point, index, segments, levels, ())


@layer_norm_codes.register_fake
def _(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    gain: Tensor | None,
    shift: Tensor | None,
    scale: Tensor,
    zero_point: Tensor,
    index: Tensor,
    segments: Sequence[int],
    levels: int,
) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.int8)
