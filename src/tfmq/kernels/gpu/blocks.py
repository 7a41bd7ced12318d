"""What the kernels share: codes of a block, the grid of its rows, and the epilogue of a sum."""

import triton
import triton.language as tl

# Adding and subtracting this number rounds a float32 below 2**22 to the nearest integer, half to even.
ROUNDER = tl.constexpr(12582912.0)


@triton.jit
def segment_of(channels: tl.tensor, W0: tl.tensor, W1: tl.tensor, W2: tl.tensor, G: tl.constexpr):
    """Return the number of the segment that each channel lies in."""
    found = tl.zeros_like(channels)
    if G > 1:
        found += (channels >= W0).to(tl.int32)
    if G > 2:
        found += (channels >= W0 + W1).to(tl.int32)
    if G > 3:
        found += (channels >= W0 + W1 + W2).to(tl.int32)
    return found


@triton.jit
def grid_of(
    scale: tl.tensor,
    zero: tl.tensor,
    step: tl.tensor,
    channels: tl.tensor,
    W0: tl.tensor,
    W1: tl.tensor,
    W2: tl.tensor,
    G: tl.constexpr,
):
    """Return scale and zero-point, float32, for table rows `step` `[R]` and `channels` `[C]`: `[R, 1]`, or
    `[R, C]` with segments.
    """
    if G == 1:
        s = tl.load(scale + step)[:, None]
        z = tl.load(zero + step).to(tl.float32)[:, None]
    else:
        where = step[:, None] * G + segment_of(channels, W0, W1, W2, G)[None, :]
        s = tl.load(scale + where)
        z = tl.load(zero + where).to(tl.float32)
    return s, z


@triton.jit
def coded(x: tl.tensor, s: tl.tensor, z: tl.tensor, LEVELS: tl.constexpr):
    """Return `clamp(round(x / s) + z, 0, LEVELS - 1) - 128`: bounds are integers, so the clamp may come
    before the rounding.
    """
    scaled = x * tl.div_rn(1.0, s)
    bounded = tl.minimum(tl.maximum(scaled, -z), (LEVELS - 1) - z)
    return ((bounded + ROUNDER) - ROUNDER + (z - 128)).to(tl.int32).to(tl.int8)


@triton.jit
def activated(y: tl.tensor, ACTIVATION: tl.constexpr):
    """Return the activation function of a float32 block."""
    if ACTIVATION == "silu":
        y = y * tl.sigmoid(y)
    elif ACTIVATION == "gelu":
        y = 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # tanh(a) = 2 sigmoid(2 a) - 1
        y = y * tl.sigmoid(1.5957691216057308 * (y + 0.044715 * y * y * y))
    return y
