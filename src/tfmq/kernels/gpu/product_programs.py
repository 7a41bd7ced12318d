"""The program that multiplies codes by integer weights, and what it is made of."""

import triton
import triton.language as tl

from tfmq.kernels.gpu.blocks import activated


@triton.jit
def program_place(M: tl.tensor, N: tl.tensor, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """Return the row and column of this program's block; `GROUP` rows of blocks walk the columns together."""
    number = tl.program_id(0)
    high, wide = tl.cdiv(M, BM), tl.cdiv(N, BN)
    first = number // (GROUP * wide) * GROUP
    size = tl.minimum(high - first, GROUP)
    return first + number % (GROUP * wide) % size, number % (GROUP * wide) // size


@triton.jit
def segment_sum(
    acc: tl.tensor,
    inputs: tl.tensor,
    base: tl.tensor,
    weight: tl.tensor,
    rows: tl.tensor,
    weight_zero: tl.tensor,
    begin: tl.tensor,
    weight_begin: tl.tensor,
    width: tl.tensor,
    length: tl.tensor,
    tap_width: tl.tensor,
    XC: tl.tensor,
    XWC: tl.tensor,
    DH: tl.tensor,
    DW: tl.tensor,
    KH: tl.constexpr,
    KW: tl.constexpr,
    NIBBLES: tl.constexpr,
    BK: tl.constexpr,
):
    """Return `acc` plus the products of one segment: `inputs + base` `[M, 1]` by the weight's `rows` `[1,
    N]`.

    A tap of a weight row takes `tap_width` bytes, `length` of them this segment's. Bytes of four-bit codes
    meet two blocks of the input, `length` channels apart.
    """
    blocks = tl.cdiv(length, BK)
    for number in range(0, KH * KW * blocks):
        tap = number // blocks
        k = (number % blocks) * BK + tl.arange(0, BK)
        inside = k < length
        place = inputs + base + ((tap // KW) * DH * XWC + (tap % KW) * DW * XC + begin + k)[None, :]
        a = tl.load(place, mask=inside[None, :], other=0)
        b = tl.load(
            weight + rows + (tap * tap_width + weight_begin + k)[:, None], mask=inside[:, None], other=0
        )
        if NIBBLES:
            # Mask the place behind an odd segment: it holds another segment's input, or nothing.
            beyond = tl.load(place + length, mask=(k + length < width)[None, :], other=0)
            low = ((b & 15).to(tl.int8) - weight_zero).to(a.dtype)
            high = ((b >> 4).to(tl.int8) - weight_zero).to(a.dtype)
            acc = tl.dot(a, low, acc, input_precision="ieee", out_dtype=acc.dtype)
            acc = tl.dot(beyond, high, acc, input_precision="ieee", out_dtype=acc.dtype)
        else:
            acc = tl.dot(a, b.to(a.dtype), acc, input_precision="ieee", out_dtype=acc.dtype)
    return acc


@triton.jit
def multiply(
    inputs: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    scale: tl.tensor,
    zero: tl.tensor,
    index: tl.tensor,
    weight_zero: tl.tensor,
    weight_scale: tl.tensor,
    sums: tl.tensor,
    bias: tl.tensor,
    residual: tl.tensor,
    M: tl.tensor,
    N: tl.tensor,
    XC: tl.tensor,
    RUN: tl.tensor,
    W0: tl.tensor,
    W1: tl.tensor,
    W2: tl.tensor,
    W3: tl.tensor,
    L0: tl.tensor,
    L1: tl.tensor,
    L2: tl.tensor,
    L3: tl.tensor,
    TAP: tl.tensor,
    OW: tl.tensor,
    OHW: tl.tensor,
    XWC: tl.tensor,
    XHWC: tl.tensor,
    SH: tl.tensor,
    SW: tl.tensor,
    DH: tl.tensor,
    DW: tl.tensor,
    KH: tl.constexpr,
    KW: tl.constexpr,
    IMAGE: tl.constexpr,
    G: tl.constexpr,
    NIBBLES: tl.constexpr,
    INTEGER: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Compute one block of `linear_codes`, `convolution_codes` or, with `INTEGER` off, `linear_weight_only`.

    `M` rows of output, `RUN` of them to a row of the grid, read `XC` channels; images are `OHW` outputs, `OW`
    to a line, on inputs of `XHWC` bytes, `XWC` to a line. `W0` to `W3` are the segments' widths, `L0` to `L3`
    their bytes in one tap of a weight row, `TAP` the bytes of all.
    """
    row, column = program_place(M, N, BM, BN, GROUP)
    m = row * BM + tl.arange(0, BM)
    n = column * BN + tl.arange(0, BN)
    real_m, real_n = m < M, n < N
    m, n = tl.where(real_m, m, 0), tl.where(real_n, n, 0)
    if IMAGE:
        pixel = m % OHW
        base = (m // OHW).to(tl.int64) * XHWC + (pixel // OW) * SH * XWC + (pixel % OW) * SW * XC
    else:
        base = m.to(tl.int64) * XC
    rows = n.to(tl.int64) * (TAP * KH * KW)
    total = tl.zeros((BM, BN), dtype=tl.float32)
    begin = 0
    weight_begin = 0
    for g in tl.static_range(G):
        width, length = (W0, W1, W2, W3)[g], (L0, L1, L2, L3)[g]
        weight_zeros = None
        if NIBBLES:
            weight_zeros = tl.load(weight_zero + n * G + g)[None, :]
        acc = tl.zeros((BM, BN), dtype=tl.int32 if INTEGER else tl.float32)
        acc = segment_sum(
            acc,
            inputs,
            base[:, None],
            weight,
            rows[None, :],
            weight_zeros,
            begin,
            weight_begin,
            width,
            length,
            TAP,
            XC,
            XWC,
            DH,
            DW,
            KH,
            KW,
            NIBBLES,
            BK,
        )
        factors = tl.load(weight_scale + n * G + g)[None, :]
        if INTEGER:
            step = tl.load(index + m // RUN) * G + g
            shift = tl.load(zero + step).to(tl.int32) - 128
            acc -= shift[:, None] * tl.load(sums + n * G + g)[None, :]
            partial = acc.to(tl.float32) * tl.load(scale + step)[:, None] * factors
        else:
            partial = acc * factors
        if g == 0 and bias is not None:
            partial += tl.load(bias + n)[None, :]
        total = partial if g == 0 else total + partial
        begin += width
        weight_begin += length
    place = m.to(tl.int64)[:, None] * N + n[None, :]
    real = real_m[:, None] & real_n[None, :]
    total = activated(total, ACTIVATION)
    if residual is not None:
        total += tl.load(residual + place, mask=real, other=0.0).to(tl.float32)
    tl.store(out + place, total.to(out.dtype.element_ty), mask=real)
