"""Triton's normalisations in its interpreter, against float64: a code may differ where the value lies at a
tie, and nowhere else.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tfmq.kernels.operators.grids import rows_of, spread
from tfmq.kernels.operators.quantize import codes_of

kernels = pytest.importorskip("tfmq.kernels.gpu.norms")

Drawn = Callable[..., Any]
# A failing example is shrunk for minutes in the interpreter, and is small already.
UNSHRUNK = (Phase.explicit, Phase.generate)
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")


def check(codes: Tensor, exact: Tensor, grid: Any, padding: tuple[int, ...]) -> None:
    """Hold codes to those of `exact` (float64), but for values that float32 cannot tell from a tie."""
    expected = codes_of(exact, *grid, 256, padding)
    difference = (codes.int() - expected.int()).abs()
    inner = (
        difference
        if not padding
        else difference[:, padding[0] : padding[0] + exact.shape[1], padding[1] : padding[1] + exact.shape[2]]
    )
    scaled = exact / spread(rows_of(grid.scale.double(), grid.index, exact), grid.segments)
    undecided = (scaled - scaled.floor() - 0.5).abs() < 1e-5 * (1 + scaled.abs())
    assert int(difference.sum()) == int(inner[undecided].sum()) and int(difference.max()) <= 1


@settings(max_examples=8, phases=UNSHRUNK)
@given(st.data(), st.sampled_from(["", "silu"]), st.sampled_from([(2, 7, 6), (1, 12, 11)]))
def test_group_norm(
    draw_grid: Drawn, data: st.DataObject, activation: str, size: tuple[int, int, int]
) -> None:
    channels, groups = data.draw(st.sampled_from([(12, 4), (20, 2)]))
    grid = data.draw(draw_grid(channels=channels, batch=size[0]))
    padding = data.draw(st.sampled_from([(), (1, 1, 1, 1), (0, 0, 1, 1)]))
    # A mean far from zero, where the sum of squares alone would lose everything.
    x = torch.randn(*size, channels) + data.draw(st.sampled_from([0.0, 100.0]))
    weight, bias = torch.rand(channels), torch.randn(channels)
    codes = kernels.group_norm_codes(x, groups, weight, bias, 1e-5, activation, *grid, 256, padding)
    exact = F.group_norm(x.double().movedim(-1, 1), groups, weight.double(), bias.double(), 1e-5).movedim(
        1, -1
    )
    # Taking 100 off costs the last seven bits of the input's differences.
    if float(x.mean()) < 50:
        check(codes, F.silu(exact) if activation else exact, grid, padding)
    else:
        expected = codes_of(F.silu(exact) if activation else exact, *grid, 256, padding)
        assert int((codes.int() - expected.int()).abs().max()) <= 1


@settings(max_examples=8, phases=UNSHRUNK)
@given(st.data(), st.booleans(), st.sampled_from([0, 1, 2]))
def test_layer_norm(draw_grid: Drawn, data: st.DataObject, affine: bool, modulations: int) -> None:
    grid = data.draw(draw_grid(channels=21, batch=2))
    x = torch.randn(2, 4, 21)
    weight, bias = (torch.rand(21), torch.randn(21)) if affine else (None, None)
    gain, shift = (torch.randn(modulations, 21) for _ in range(2)) if modulations else (None, None)
    codes = kernels.layer_norm_codes(x, weight, bias, 1e-6, gain, shift, *grid, 256)
    wide = [None if values is None else values.double() for values in (weight, bias, gain, shift)]
    exact = F.layer_norm(x.double(), (21,), wide[0], wide[1], 1e-6)
    if wide[2] is not None and wide[3] is not None:
        exact = exact * (1 + wide[2][:, None]) + wide[3][:, None]
    check(codes, exact, grid, ())
