"""Blocks of GGUF are grids of ours to the bit, by the package `gguf`."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tfmq.numerics.blocks import BLOCK, Q4_0, Q4_1, Q8_0, BlockFormat, UnheldError, format_of
from tfmq.numerics.blocks import from_blocks as read
from tfmq.numerics.blocks import to_blocks as write

gguf = pytest.importorskip("gguf")
FORMATS = {fmt.name: fmt for fmt in (Q8_0, Q4_0, Q4_1)}


def decoded(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    wide = [values.float().repeat_interleave(BLOCK, dim=1) for values in (scale, zero_point)]
    return (codes.float() - wide[1]) * wide[0]


def theirs(stored: Tensor, fmt: BlockFormat) -> Tensor:
    return torch.from_numpy(gguf.quants.dequantize(stored.numpy(), gguf.GGMLQuantizationType[fmt.name]))


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0"])
def test_blocks_of_the_package_are_read_to_the_bit(name: str) -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(48, 96, generator=generator) * torch.logspace(-6, 3, 48)[:, None]
    weight[5, 32:64] = 0
    kind = gguf.GGMLQuantizationType[name]
    stored = torch.from_numpy(gguf.quants.quantize(weight.numpy(), kind))
    # The package lets the scales of tiny weights become zero beside codes that are not.
    halves = stored.reshape(48, 3, -1)[..., :2].contiguous().view(torch.float16)
    stored = stored[(halves != 0).all(dim=1)[:, 0] | (torch.arange(48) == 5)]
    codes, scale, zero_point = read(stored, FORMATS[name])
    assert torch.equal(decoded(codes, scale, zero_point), theirs(stored, FORMATS[name]))
    assert bool((scale > 0).all()) and len(stored) > 30
    # Codes of blocks whose largest weight is positive count down.
    assert set(zero_point.unique().tolist()) == ({128} if name == "Q8_0" else {7, 8})
    with pytest.raises(UnheldError, match="start at no whole multiple"):
        read(torch.from_numpy(gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType.Q4_1)), Q4_1)


@given(st.integers(-128, 127), st.integers(0, 255), st.floats(1e-4, 1e3), st.integers(0, 2**31))
def test_integers_go_out_and_come_back(low: int, span: int, size: float, seed: int) -> None:
    """Whatever the integers, zero among them: the package decodes what is read back, which is within the
    rounding of the scale, and that is within half a step.
    """
    generator = torch.Generator().manual_seed(seed)
    high = min(127, low + span)
    values = torch.randint(min(low, 0), max(high, 0) + 1, (3, 64), generator=generator).to(torch.int8)
    values[2, :32] = 0
    step = (torch.rand(3, 2, generator=generator) + 0.5) * size
    fmt = format_of(values)
    stored, share = write(values, step, fmt)
    assert stored.shape == (3, 2 * fmt.size)
    codes, scale, zero_point = read(stored, fmt)
    found = decoded(codes, scale, zero_point)
    assert torch.equal(found, theirs(stored, fmt))
    integers = codes.int() - zero_point.int().repeat_interleave(BLOCK, dim=1)
    assert torch.equal(integers, values.int())
    own = values.float() * step.repeat_interleave(BLOCK, dim=1)
    assert bool(((found - own).abs() <= (share + 1e-6) * own.abs()).all())
    assert share <= (2**-7 if fmt is Q4_1 else 2**-11) or size < 2e-4


@pytest.mark.parametrize(
    ("numbers", "name"),
    [((-8, 7), "Q4_0"), ((-7, 8), "Q4_0"), ((0, 15), "Q4_1"), ((-15, 0), "Q4_1"), ((-8, 8), "Q8_0")],
)
def test_the_smallest_format_that_has_all_integers(numbers: tuple[int, int], name: str) -> None:
    values = torch.zeros(2, 64, dtype=torch.int8)
    values[1, 40:42] = torch.tensor(numbers, dtype=torch.int8)
    assert format_of(values) is FORMATS[name]


@pytest.mark.parametrize("size", [1e-8, 1e6])
def test_scales_beyond_half_precision_are_refused(size: float) -> None:
    values = torch.ones(1, 32, dtype=torch.int8) * 100
    with pytest.raises(UnheldError, match="beyond half precision"):
        write(values, torch.full((1, 1), size), Q8_0)
    stored, share = write(torch.zeros_like(values), torch.full((1, 1), 1e-8), Q4_0)
    assert share == 0 and float(read(stored, Q4_0)[1]) == 1


def test_negative_scales_of_each_format() -> None:
    """Files of others have them; the package is the oracle."""
    generator = torch.Generator().manual_seed(6)
    for fmt in FORMATS.values():
        low, high = (-128, 128) if fmt is Q8_0 else (-8, 8)
        values = torch.randint(low, high, (4, 32), generator=generator).to(torch.int8)
        stored, _ = write(values, torch.full((4, 1), 0.5), fmt)
        for sign in range(1, 4 if fmt.shifted else 2, 2):
            stored[:, sign] ^= 128
        assert torch.equal(decoded(*read(stored, fmt)), theirs(stored, fmt))
