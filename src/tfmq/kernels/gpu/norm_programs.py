"""The programs that normalise and quantize."""

import triton
import triton.language as tl

from tfmq.kernels.gpu.blocks import activated, coded, grid_of
from tfmq.kernels.gpu.quantize import source_row


@triton.jit
def channel_moments(
    x: tl.tensor,
    means: tl.tensor,
    deviations: tl.tensor,
    PIXELS: tl.tensor,
    C: tl.tensor,
    SLICE: tl.tensor,
    SLICES: tl.tensor,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """Write mean and sum of squared deviations of some channels over one slice of one image, `[B, SLICES,
    C]`.
    """
    image, part = tl.program_id(0) // SLICES, tl.program_id(0) % SLICES
    channel = tl.program_id(1) * BC + tl.arange(0, BC)
    real = channel < C
    count = tl.zeros((), dtype=tl.float32)
    mean = tl.zeros((BC,), dtype=tl.float32)
    deviation = tl.zeros((BC,), dtype=tl.float32)
    first = part * SLICE
    last = tl.minimum(first + SLICE, PIXELS)
    for begin in range(first, last, BR):
        pixel = begin + tl.arange(0, BR)
        inside = (pixel < last)[:, None] & real[None, :]
        value = tl.load(
            x + (image * PIXELS + pixel).to(tl.int64)[:, None] * C + channel[None, :], mask=inside, other=0.0
        ).to(tl.float32)
        here = tl.minimum(last - begin, BR).to(tl.float32)
        own = tl.sum(value, axis=0) / here
        away = tl.where(inside, value - own[None, :], 0.0)
        step = own - mean
        both = count + here
        deviation += tl.sum(away * away, axis=0) + step * step * (count * here / both)
        mean += step * (here / both)
        count = both
    place = tl.program_id(0) * C + channel
    tl.store(means + place, mean, mask=real)
    tl.store(deviations + place, deviation, mask=real)


@triton.jit
def group_moments(
    means: tl.tensor,
    deviations: tl.tensor,
    centre: tl.tensor,
    rate: tl.tensor,
    PIXELS: tl.tensor,
    C: tl.tensor,
    SLICE: tl.tensor,
    SLICES: tl.tensor,
    GROUPS: tl.tensor,
    EPS: tl.tensor,
    WIDTH: tl.tensor,
    BS: tl.constexpr,
    BC: tl.constexpr,
):
    """Write mean and reciprocal standard deviation of one group of one image, `[B, GROUPS]`."""
    image, group = tl.program_id(0) // GROUPS, tl.program_id(0) % GROUPS
    part, channel = tl.arange(0, BS), tl.arange(0, BC)
    inside = (part < SLICES)[:, None] & (channel < WIDTH)[None, :]
    place = (image * SLICES + part)[:, None] * C + (group * WIDTH + channel)[None, :]
    mean = tl.load(means + place, mask=inside, other=0.0)
    count = tl.where(inside, tl.minimum(PIXELS - part * SLICE, SLICE).to(tl.float32)[:, None], 0.0)
    number = tl.full((), 1.0, dtype=tl.float32) * PIXELS * WIDTH
    common = tl.sum(tl.sum(mean * count, axis=1), axis=0) / number
    away = mean - common
    spread = tl.load(deviations + place, mask=inside, other=0.0) + away * away * count
    variance = tl.sum(tl.sum(spread, axis=1), axis=0) / number
    tl.store(centre + tl.program_id(0), common)
    tl.store(rate + tl.program_id(0), tl.div_rn(1.0, tl.sqrt_rn(variance + EPS)))


@triton.jit
def normalise_rows(
    x: tl.tensor,
    out: tl.tensor,
    centre: tl.tensor,
    rate: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    scale: tl.tensor,
    zero: tl.tensor,
    index: tl.tensor,
    ROWS: tl.tensor,
    C: tl.tensor,
    RUN: tl.tensor,
    PER_IMAGE: tl.tensor,
    GROUPS: tl.tensor,
    WIDTH_OF_GROUP: tl.tensor,
    W0: tl.tensor,
    W1: tl.tensor,
    W2: tl.tensor,
    HEIGHT: tl.tensor,
    WIDTH: tl.tensor,
    OHEIGHT: tl.tensor,
    OWIDTH: tl.tensor,
    TOP: tl.tensor,
    LEFT: tl.tensor,
    G: tl.constexpr,
    LEVELS: tl.constexpr,
    PADDED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """Write the codes of a block of normalised rows; the border gets the code of zero."""
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    channel = tl.program_id(1) * BC + tl.arange(0, BC)
    known = channel < C
    real = (row < ROWS)[:, None] & known[None, :]
    channel = tl.where(known, channel, 0)
    row = tl.where(row < ROWS, row, 0)
    s, z = grid_of(scale, zero, tl.load(index + row // RUN), channel, W0, W1, W2, G)
    source, inner = source_row(row, HEIGHT, WIDTH, OHEIGHT, OWIDTH, TOP, LEFT, PADDED)
    value = tl.load(
        x + source.to(tl.int64)[:, None] * C + channel[None, :], mask=real & inner[:, None], other=0.0
    ).to(tl.float32)
    group = (row // PER_IMAGE * GROUPS)[:, None] + (channel // WIDTH_OF_GROUP)[None, :]
    value = (value - tl.load(centre + group)) * tl.load(rate + group)
    value = (
        value * tl.load(weight + channel).to(tl.float32)[None, :]
        + tl.load(bias + channel).to(tl.float32)[None, :]
    )
    value = tl.where(inner[:, None], activated(value, ACTIVATION), 0.0)
    tl.store(
        out + (tl.program_id(0) * BR + tl.arange(0, BR)).to(tl.int64)[:, None] * C + channel[None, :],
        coded(value, s, z, LEVELS),
        mask=real,
    )


@triton.jit
def normalise_token(
    x: tl.tensor,
    out: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    gain: tl.tensor,
    shift: tl.tensor,
    scale: tl.tensor,
    zero: tl.tensor,
    index: tl.tensor,
    C: tl.tensor,
    EPS: tl.tensor,
    RUN: tl.tensor,
    GAIN_RUN: tl.tensor,
    W0: tl.tensor,
    W1: tl.tensor,
    W2: tl.tensor,
    G: tl.constexpr,
    LEVELS: tl.constexpr,
    BC: tl.constexpr,
):
    """Write the codes of one normalised and modulated token."""
    row = tl.program_id(0)
    channel = tl.arange(0, BC)
    real = channel < C
    value = tl.load(x + row.to(tl.int64) * C + channel, mask=real, other=0.0).to(tl.float32)
    mean = tl.sum(value, axis=0) / C
    away = tl.where(real, value - mean, 0.0)
    y = away * tl.div_rn(1.0, tl.sqrt_rn(tl.sum(away * away, axis=0) / C + EPS))
    if weight is not None:
        y = y * tl.load(weight + channel, mask=real, other=0.0).to(tl.float32)
    if bias is not None:
        y = y + tl.load(bias + channel, mask=real, other=0.0).to(tl.float32)
    if gain is not None:
        place = row // GAIN_RUN * C + channel
        y = y * (1.0 + tl.load(gain + place, mask=real, other=0.0).to(tl.float32)) + tl.load(
            shift + place, mask=real, other=0.0
        ).to(tl.float32)
    step = tl.load(index + row // RUN + tl.zeros((1,), dtype=tl.int32))
    s, z = grid_of(scale, zero, step, tl.where(real, channel, 0), W0, W1, W2, G)
    tl.store(
        out + row.to(tl.int64) * C + channel[None, :], coded(y[None, :], s, z, LEVELS), mask=real[None, :]
    )
