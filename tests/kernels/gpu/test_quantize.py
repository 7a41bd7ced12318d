"""Triton's quantizers in its interpreter, against the operators' definitions."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tfmq.kernels.operators import quantize as definitions

kernels = pytest.importorskip("tfmq.kernels.gpu.quantize")

Drawn = Callable[..., Any]
# A failing example is shrunk for minutes in the interpreter, and is small already.
UNSHRUNK = (Phase.explicit, Phase.generate)


@settings(max_examples=16, phases=UNSHRUNK)
@given(st.data(), st.integers(2, 8), st.sampled_from([torch.float32, torch.bfloat16]))
def test_codes_are_equal_at_ties_and_at_the_border(
    draw_grid: Drawn, data: st.DataObject, bits: int, dtype: torch.dtype
) -> None:
    channels = data.draw(st.sampled_from([5, 13, 300]))
    grid = data.draw(draw_grid(channels=channels, batch=2, levels=2**bits))
    padding = data.draw(st.sampled_from([(), (0, 0, 0, 0), (1, 1, 1, 1), (0, 2, 1, 0)]))
    # Half of the values are ties of some grid, the rest anything, infinite ones among it.
    x = torch.randint(-300, 300, (2, 4, 3, channels)) * 0.5 * grid.scale[0, 0]
    x[:, ::2] = 20 * torch.randn(x[:, ::2].shape)
    x[0, 0, 0, :2] = torch.tensor([torch.inf, -torch.inf])
    arguments = (x.to(dtype), *grid, 2**bits, padding)
    assert torch.equal(kernels.quantize_codes(*arguments), definitions.quantize_codes(*arguments))


@settings(max_examples=6, phases=UNSHRUNK)
@given(st.data())
def test_tokens_have_grids_of_their_own(draw_grid: Drawn, data: st.DataObject) -> None:
    grid = data.draw(draw_grid(channels=13, batch=2, rows=10))
    x = torch.randn(2, 5, 13)
    assert torch.equal(
        kernels.quantize_codes(x, *grid, 256, ()), definitions.quantize_codes(x, *grid, 256, ())
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dynamic_codes_and_scales_are_equal(dtype: torch.dtype) -> None:
    x = (torch.randn(3, 5, 70) * torch.tensor([1e-3, 1.0, 40.0])[:, None, None]).to(dtype)
    x[1, 2] = 0.0
    for got, expected in zip(kernels.quantize_tokens(x), definitions.quantize_tokens(x), strict=True):
        assert torch.equal(got, expected)


def test_any_layout_of_the_input() -> None:
    grid = (
        torch.tensor([[0.05]]),
        torch.tensor([[117]], dtype=torch.uint8),
        torch.zeros(1, dtype=torch.int64),
        (),
    )
    for x in (
        torch.randn(2, 5, 4, 3).movedim(1, -1),
        torch.randn(1, 4, 3, 5).expand(2, 4, 3, 5),
        torch.randn(2, 4, 3, 10)[..., ::2],
    ):
        assert torch.equal(
            kernels.quantize_codes(x, *grid, 256, (1, 1, 1, 1)),
            definitions.quantize_codes(x, *grid, 256, (1, 1, 1, 1)),
        )
