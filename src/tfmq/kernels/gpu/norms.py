"""Normalisation to codes on a GPU.

Group norm takes three kernels: mean and squared deviations of every channel of a slice of the image, their
union for each group (Chan et al., 1983, which loses nothing to cancellation), and one pass that normalises,
activates, quantizes and pads. Layer norm takes one program a token.
"""

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from tfmq.kernels.gpu.norm_programs import channel_moments, group_moments, normalise_rows, normalise_token
from tfmq.kernels.gpu.quantize import blocks, placement
from tfmq.kernels.operators.grids import widths
from tfmq.kernels.operators.quantize import padded_shape

# Maximum number of slices of an image, so that one image fills a device, and minimum number of pixels in a
# slice.
MOST_SLICES = 64
LEAST_PIXELS = 32


def _moments(x: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """Return mean and reciprocal standard deviation of images `[B, H, W, C]`, each `[B, groups]`."""
    batch, height, width, channels = x.shape
    pixels = height * width
    size = max(LEAST_PIXELS, triton.cdiv(pixels, MOST_SLICES))
    slices = triton.cdiv(pixels, size)
    means, deviations = (x.new_empty((batch, slices, channels), dtype=torch.float32) for _ in range(2))
    centre, rate = (x.new_empty((batch, groups), dtype=torch.float32) for _ in range(2))
    wide = min(128, triton.next_power_of_2(channels))
    channel_moments[(batch * slices, triton.cdiv(channels, wide))](
        x, means, deviations, pixels, channels, size, slices, BR=32, BC=wide, enable_fp_fusion=False
    )
    within = channels // groups
    sizes = {"BS": triton.next_power_of_2(slices), "BC": triton.next_power_of_2(within)}
    group_moments[(batch * groups,)](
        means,
        deviations,
        centre,
        rate,
        pixels,
        channels,
        size,
        slices,
        groups,
        eps,
        within,
        **sizes,
        enable_fp_fusion=False,
    )
    return centre, rate


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
    """Compute `tfmq::group_norm_codes`."""
    x = x.contiguous()
    out = torch.empty(padded_shape(x.shape, padding), dtype=torch.int8, device=x.device)
    if not x.numel():
        return out
    channels, rows = x.shape[-1], out.numel() // x.shape[-1]
    centre, rate = _moments(x, groups, eps)
    places, padded = placement(x, padding)
    edges = [*widths(segments, channels), 0, 0][:3]
    grid, sizes = blocks(rows, channels)
    constants = {"G": max(1, len(segments)), "LEVELS": levels, "ACTIVATION": activation, **padded, **sizes}
    counts = (rows, channels, rows // len(index), rows // x.shape[0], groups, channels // groups)
    tensors = (x, out, centre, rate, weight, bias, scale, zero_point, index)
    normalise_rows[grid](
        *tensors,
        *counts,
        *edges,
        *places,
        **constants,
        enable_fp_fusion=False,
    )
    return out


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
    """Compute `tfmq::layer_norm_codes`."""
    x = x.contiguous()
    out = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    channels = x.shape[-1]
    rows = x.numel() // max(1, channels)
    if not rows:
        return out
    modulation = [None if values is None else values.contiguous() for values in (gain, shift)]
    edges = [*widths(segments, channels), 0, 0][:3]
    runs = (rows // len(index), 1 if gain is None else rows // len(gain))
    constants = {"G": max(1, len(segments)), "LEVELS": levels, "BC": triton.next_power_of_2(channels)}
    normalise_token[(rows,)](
        x,
        out,
        weight,
        bias,
        *modulation,
        scale,
        zero_point,
        index,
        channels,
        eps,
        *runs,
        *edges,
        **constants,
        enable_fp_fusion=False,
    )
    return out
