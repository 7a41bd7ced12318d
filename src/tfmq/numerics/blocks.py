"""Blocks of 32 inputs of a row with a scale of their own, as files of GGUF store a weight.

    w = d q              Q8_0: q a signed byte
    w = d (q - 8)        Q4_0: q of four bits
    w = d q + m          Q4_1: q of four bits

`d` and `m` are of half precision. In float32 the product of a half and a byte is exact, so that the first two
are grids of ours, `(code - z) s`, to the bit: `s` is the size of `d`, which may be negative, and then codes
count down. The third is one where `m` is `-z d` for a whole `z` of 0 to 15.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# Number of weights in a block.
BLOCK = 32
# Half precision has 11 bits of a number, and no step below this one.
DIGITS, FINEST = 11, 2.0**-24
# Zero-points of four bits. The product of a scale and an earlier one takes fewer bits.
ZEROS = (8, 0, 4, 12, 2, 6, 10, 14, 1, 3, 5, 7, 9, 11, 13, 15)


class UnheldError(ValueError):
    """Weights and blocks that do not hold each other exactly; the text says why, of a tensor or a layer."""


@dataclass(frozen=True)
class BlockFormat:
    """A way to store blocks.

    Attributes:
        name: what GGUF calls it.
        bits: bits of a code.
        shifted: whether a block stores the value of its code zero, `m`; else real zero is the middle code.
    """

    name: str
    bits: int
    shifted: bool = False

    @property
    def size(self) -> int:
        """Bytes of a block."""
        return 2 + 2 * self.shifted + BLOCK * self.bits // 8

    @property
    def top(self) -> int:
        """The largest code."""
        return 2**self.bits - 1

    @property
    def middle(self) -> int:
        """The code of real zero where a block does not store another."""
        return 2 ** (self.bits - 1)


Q8_0, Q4_0, Q4_1 = BlockFormat("Q8_0", 8), BlockFormat("Q4_0", 4), BlockFormat("Q4_1", 4, shifted=True)


def _numbers(stored: Tensor) -> Tensor:
    """Return float32 `[R, n]` of the bytes of halves, `[R, n, 2]`."""
    return stored.contiguous().view(torch.float16)[..., 0].float()


def _codes(stored: Tensor, fmt: BlockFormat) -> Tensor:
    """Return unsigned codes `[R, n, 32]` of the bytes of blocks: nibbles have the first half of a block low,
    the second one high; bytes are signed.
    """
    return stored ^ 128 if fmt.bits == 8 else torch.cat([stored & 15, stored >> 4], dim=-1)


def from_blocks(stored: Tensor, fmt: BlockFormat) -> tuple[Tensor, Tensor, Tensor]:
    """Return `(codes, scale, zero_point)` of stored blocks: uint8 `[R, 32 n]`, float32 and uint8 `[R, n]`.

    `(code - zero_point) * scale` is what the file says, to the bit. Scales are positive: a block of zeros,
    whose scale is zero, gets one.

    Args:
        stored: uint8 `[R, n * fmt.size]`.
        fmt: how it is stored.

    Raises:
        UnheldError: a scale is not finite, or zero beside other codes than that of zero; or a block stores an
            `m` that is no whole multiple of its scale.
    """
    blocks = stored.reshape(len(stored), -1, fmt.size)
    head = 4 if fmt.shifted else 2
    codes, step = _codes(blocks[..., head:], fmt), _numbers(blocks[..., :2])
    start = _numbers(blocks[..., 2:4]) if fmt.shifted else step * -fmt.middle
    if not bool((torch.isfinite(step) & torch.isfinite(start)).all()):
        raise UnheldError("has a scale that is not finite")
    none = step == 0
    zero = torch.where(none, 0 if fmt.shifted else fmt.middle, (start / -step).round().clamp(0, fmt.top))
    if not torch.equal(step * -zero, start):
        raise UnheldError("has blocks that start at no whole multiple of their scale")
    if bool(((codes != zero[..., None]) & none[..., None]).any()):
        raise UnheldError("has a scale of zero")
    down = (step < 0)[..., None]
    codes = torch.where(down, fmt.top - codes, codes)
    zero = torch.where(down[..., 0], fmt.top - zero, zero)
    return codes.flatten(1), torch.where(none, 1.0, step.abs()), zero.to(torch.uint8)


def _odd(zero: Tensor) -> Tensor:
    """Return numbers of 0 to 15 without their factors of two, and one for zero."""
    return zero // torch.gcd(zero, torch.full_like(zero, 16)) + (zero == 0)


def _rounded(step: Tensor, odd: Tensor) -> Tensor:
    """Return the next scales whose products with `odd` numbers are exact in half precision."""
    unit = torch.exp2(torch.floor(torch.log2((step * odd).clamp(min=FINEST))) - (DIGITS - 1))
    unit = unit.clamp(min=FINEST)
    near = (step / unit).round() * unit
    # Rounding up may have passed a power of two, above which numbers are wider apart.
    held = (near * odd).half().float() == near * odd
    return torch.where(held, near, (step / unit).floor() * unit).half().float()


def _zeros(values: Tensor, fmt: BlockFormat) -> Tensor:
    """Return a zero-point of each block that lets codes of four bits have its values, of which the scale
    loses least; -1 where there is none.
    """
    low, high = values.amin(dim=-1), values.amax(dim=-1)
    found = torch.full_like(low, -1)
    for zero in reversed(ZEROS if fmt.shifted else (fmt.middle,)):
        found = torch.where((low >= -zero) & (high <= fmt.top - zero), zero, found)
    return torch.where((low == 0) & (high == 0), 0, found) if fmt.shifted else found


def _turned(values: Tensor, fmt: BlockFormat) -> tuple[Tensor, Tensor]:
    """Return blocks `[R, n, 32]` and the sign of their scales: the middle of unshifted codes has one number
    more below it than above, so that a block that reaches it above is stored negative.
    """
    sign = torch.where((values.amax(dim=-1) == fmt.middle) & (not fmt.shifted), -1, 1).to(values.dtype)
    return values * sign[..., None], sign


def format_of(values: Tensor) -> BlockFormat:
    """Return the smallest format that has all of `values`, int8 `[R, C]` with `C` a multiple of 32."""
    blocks = values.reshape(len(values), -1, BLOCK).to(torch.int16)
    found = (fmt for fmt in (Q4_0, Q4_1) if int(_zeros(_turned(blocks, fmt)[0], fmt).min()) >= 0)
    return next(found, Q8_0)


def to_blocks(values: Tensor, step: Tensor, fmt: BlockFormat) -> tuple[Tensor, float]:
    """Return weights `values * step` as stored blocks, and the largest share by which a scale was rounded.

    Scales become half precision, those of Q4_1 with so few bits that `m` is exact beside them.

    Args:
        values: int8 `[R, C]`; `fmt` can hold each of them.
        step: the step of each block, `[R, C / 32]`, positive.
        fmt: how to store them.

    Returns:
        Bytes, uint8 `[R, C / 32 * fmt.size]`, and the share.

    Raises:
        UnheldError: half precision has no scale that is near enough: the rounding would move a weight by more
            than half a step.
    """
    blocks, sign = _turned(values.reshape(len(values), -1, BLOCK).to(torch.int16), fmt)
    zero = _zeros(blocks, fmt)
    scale = _rounded(step.float(), _odd(zero) if fmt.shifted else torch.ones_like(zero))
    most = blocks.abs().amax(dim=-1)
    off = torch.where(most > 0, (scale - step).abs() / step, 0.0)
    if not bool((torch.isfinite(scale) & (off * most <= 0.5)).all()):
        raise UnheldError("its scales are beyond half precision")
    codes = (blocks + zero[..., None]).to(torch.uint8)
    packed = codes ^ 128 if fmt.bits == 8 else codes[..., : BLOCK // 2] | codes[..., BLOCK // 2 :] << 4
    numbers = (scale, scale * -zero) if fmt.shifted else (scale * sign,)
    halves = [number.half().contiguous()[..., None].view(torch.uint8) for number in numbers]
    return torch.cat([*halves, packed], dim=-1).flatten(1), float(off.max())
