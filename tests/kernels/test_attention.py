from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tfmq.kernels import attention
from tfmq.kernels.attention import integer_attention
from tfmq.kernels.kernel import Rows, column
from tfmq.kernels.onednn import multiplies
from tfmq.numerics.affine import quantize
from tfmq.numerics.attention import Attention

pytestmark = pytest.mark.skipif(not multiplies(), reason="this torch multiplies no u8 by s8")
NEVER = torch.rand(5, 7, generator=torch.Generator().manual_seed(0)) > 0.5
NEVER[2] = False


@pytest.fixture(autouse=True)
def take_small_maps() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "SMALLEST", 1)
        yield


def on_grid(x: Tensor, rows: Rows) -> Tensor:
    """Return `x` on its grid in float64."""
    scale, zero_point = (
        column(rows.scale[:, 0].double(), x.ndim),
        column(rows.zero_point[:, 0].double(), x.ndim),
    )
    return (quantize(x.double(), scale, zero_point, rows.levels) - zero_point) * scale


def exact(call: Attention, rows: tuple[Rows, ...]) -> Tensor:
    """Return the attention on quantized operands in float64."""
    of = {0: (rows[0], rows[1]), 1: (rows[2], rows[3])}
    return call.by(lambda site, left, right: on_grid(left, of[site][0]) @ on_grid(right, of[site][1]), 0)


def grid(samples: int, bits: int, scale: float) -> Rows:
    zero_points = torch.randint(2**bits, (samples, 1))
    return Rows(scale * (0.5 + torch.rand(samples, 1)), zero_points.to(torch.uint8), 2**bits)


def grids(samples: int, bits: int) -> tuple[Rows, Rows, Rows, Rows]:
    width = 6 / (2**bits - 1)
    return (
        grid(samples, bits, width),
        grid(samples, bits, width),
        grid(samples, bits, 1 / (2**bits - 1)),
        grid(samples, bits, width),
    )


def check(y: Tensor | None, call: Attention, rows: tuple[Rows, Rows, Rows, Rows]) -> None:
    """A code of probabilities at a tie may differ by one, which moves an output by one step of theirs times a
    value; anything else is rounding.
    """
    assert y is not None
    expected = exact(call, rows)
    step = column(rows[2].scale[:, 0], y.ndim) * on_grid(call.value, rows[3]).abs().amax()
    difference = (y.double() - expected).abs()
    assert bool((difference <= 2 * step).all())
    assert float((difference <= 1e-4 * step).double().mean()) > 0.9


@given(
    st.integers(0, 2**31),
    st.sampled_from([(), (2,), (2, 3)]),
    st.booleans(),
    st.integers(2, 8),
    st.integers(1, 200),
)
def test_it_is_the_formula_on_quantized_operands(
    seed: int, heads: tuple[int, ...], mixed: bool, bits: int, block: int
) -> None:
    torch.manual_seed(seed)
    shape = 2, *heads
    call = Attention.of(torch.randn(*shape, 9, 6), torch.randn(*shape, 11, 6), torch.randn(*shape, 11, 5))
    rows = grids(2 if mixed else 1, bits)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "BLOCK", block)
        check(integer_attention(call, rows), call, rows)


@pytest.mark.parametrize(
    "options",
    [
        {"scale": 0.3},
        {"is_causal": True},
        {"attn_mask": NEVER},
        {"attn_mask": torch.linspace(-4, 4, 70).reshape(2, 1, 5, 7)},
        {"attn_mask": torch.linspace(-4, 4, 140).reshape(4, 5, 7)},
        {"attn_mask": torch.arange(14).reshape(2, 1, 1, 7) % 3 > 0},
        {"attn_mask": torch.linspace(-4, 4, 7)},
        {"attn_mask": torch.zeros(1, 7).masked_fill(torch.arange(7) > 3, -torch.inf)},
        {"enable_gqa": True},
    ],
)
def test_it_takes_every_argument_of_torchs(options: dict[str, Any]) -> None:
    torch.manual_seed(1)
    keys = 2 if "enable_gqa" in options else 4
    call = Attention.of(
        torch.randn(2, 4, 5, 8), torch.randn(2, keys, 7, 8), torch.randn(2, keys, 7, 6), **options
    )
    rows = grids(2, 8)
    check(integer_attention(call, rows), call, rows)


def test_layouts_and_half_precision_are_taken() -> None:
    torch.manual_seed(2)
    query, key, value = (torch.randn(2, 9, 3, 8, dtype=torch.bfloat16).transpose(1, 2) for _ in range(3))
    call, rows = Attention.of(query, key, value), grids(2, 8)
    y = integer_attention(call, rows)
    assert y is not None and y.dtype == torch.bfloat16 and y.shape == query.shape
    torch.testing.assert_close(y.double(), exact(call, rows), rtol=2e-2, atol=2e-2)


def test_the_largest_codes_do_not_saturate() -> None:
    """All codes at the end of their range: every sum is the largest there is."""
    ones = partial(torch.full, fill_value=1e6)
    call = Attention.of(ones((1, 1, 3, 64)), ones((1, 1, 300, 64)), -ones((1, 1, 300, 8)))
    rows = tuple(
        Rows(torch.full((1, 1), scale), torch.full((1, 1), code, dtype=torch.uint8), 256)
        for scale, code in ((1.0, 0), (1.0, 0), (1e-5, 0), (1.0, 255))
    )
    y = integer_attention(call, rows)
    assert y is not None
    torch.testing.assert_close(y.double(), exact(call, rows), rtol=1e-6, atol=0)


def test_small_maps_are_left_to_separate_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "SMALLEST", 65)
    call = Attention.of(torch.randn(1, 8, 4), torch.randn(1, 8, 4), torch.randn(1, 8, 4))
    assert integer_attention(call, grids(1, 8)) is None


def test_wide_codes_and_endless_sums_are_left_to_separate_products() -> None:
    call, rows = Attention.of(torch.randn(1, 8, 4), torch.randn(1, 8, 4), torch.randn(1, 8, 4)), grids(1, 8)
    assert integer_attention(call, (*rows[:3], Rows(rows[3].scale, rows[3].zero_point, 2**16))) is None
    endless = torch.zeros(1, 66_000, 1)
    assert integer_attention(Attention.of(torch.zeros(1, 1, 1), endless, endless), rows) is None
