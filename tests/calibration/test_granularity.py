"""Which grid and which groups a weight gets: planted weights whose best is known, and weights for which
nothing is worth its bytes.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tfmq
from tfmq.calibration.granularity import GridErrors, candidates, measure_grids, stored_bits
from tfmq.models.denoiser import Denoiser, Inputs
from tfmq.models.sampler import LoopSampler
from tfmq.nn.layer import CalibratedLayer
from tfmq.nn.operation import operation_of
from tfmq.nn.plan import packed_layers
from tfmq.nn.size import state_bytes
from tfmq.nn.swap import attach_steps, replace_module
from tfmq.numerics.grids import GRIDS, Grid, IntegerFormat, Table
from tfmq.quantizers.steps import StepContext
from tfmq.quantizers.weight import fit_grid
from tfmq.recipes.recipe import Calibration

GROUPS = [(IntegerFormat(4), size) for size in (128, 64, 32)]
TABLES: list[tuple[Grid, int]] = [(IntegerFormat(4, True), 0), (Table("e2m1", GRIDS["e2m1"]), 0)]


class Chain(nn.Module):
    """A layer whose inputs are the sample times a factor for each channel."""

    def __init__(self, weight: Tensor, factor: Tensor) -> None:
        super().__init__()
        self.layer = nn.Linear(weight.shape[1], len(weight))
        self.layer.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("factor", factor)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = self.layer(x * self.factor)
        return out


def measured(weight: Tensor, factor: Tensor, choices: Any) -> GridErrors:
    """Return what is measured of a layer by calls with noise."""
    module, steps = Chain(weight, factor), StepContext(torch.zeros(1))
    source = module.layer
    operation = operation_of(source)
    assert operation is not None
    (fmt, group), *_ = choices
    layer = CalibratedLayer(source, operation, fit_grid(weight, fmt, group=group), None)
    replace_module(module, "layer", layer)
    attach_steps(module, steps, timestep="t")
    grids = {"layer": candidates(layer, choices, ranges="search")}
    calls = [Inputs(torch.randn(32, weight.shape[1]), torch.zeros(1)) for _ in range(4)]
    denoiser = Denoiser(module)
    return measure_grids(denoiser, {"layer": layer}, grids, calls, advance=lambda amount=1: None)["layer"]


def test_groups_follow_planted_scales_and_are_as_large_as_can_be_without() -> None:
    turns = torch.tensor([1.0, 1 / 16]).repeat_interleave(32).repeat(8)
    weight = 2 * torch.rand(64, 512) - 1
    found = measured(weight * turns, 1 / turns, GROUPS)
    assert GROUPS[found.kept][1] == 32
    # 20 dB and more, which is what (1 + 16^2) / 2 is.
    assert found.errors[2] < 0.01 * found.errors[1]
    plain = measured(weight, torch.ones(512), GROUPS)
    assert GROUPS[plain.kept][1] == 128
    # Not as if smaller groups had more error: they are not worth what they store.
    assert plain.errors[2] < plain.errors[0] and plain.bits[2] > plain.bits[0] + 0.3


def test_the_grid_with_less_error_is_chosen_for_each_kind_of_weight() -> None:
    laplace = torch.distributions.Laplace(0.0, 1.0).sample((64, 256))
    found = measured(laplace, torch.ones(256), TABLES)
    assert found.kept == 1 and found.errors[0] > 1.25 * found.errors[1]
    even = measured(2 * torch.rand(64, 256) - 1, torch.ones(256), TABLES)
    assert even.kept == 0 and even.errors[1] > 1.25 * even.errors[0]


def test_a_bit_has_to_take_away_three_quarters_of_the_error() -> None:
    assert GridErrors((4.0, 1.1), (4.0, 5.0)).kept == 0
    assert GridErrors((4.0, 0.9), (4.0, 5.0)).kept == 1
    assert GridErrors((4.0, 1.0), (4.0, 5.0)).kept == 0, "of equals the one with fewer bits"
    assert GridErrors((0.0, 0.0), (5.0, 4.0)).kept == 0, "no call reached the layer"
    assert GridErrors((1.0, 0.0, 0.0), (4.0, 5.0, 4.5)).kept == 2


@pytest.mark.parametrize("group", [0, 32])
@pytest.mark.parametrize("symmetric", [False, True])
def test_stored_bits_are_those_of_the_packed_layer(group: int, symmetric: bool) -> None:
    source = nn.Linear(96, 10, bias=False)
    grid = fit_grid(source.weight, IntegerFormat(3, symmetric), group=group)
    operation = operation_of(source)
    assert operation is not None
    packed = CalibratedLayer(source, operation, grid, None).finished()
    assert stored_bits(grid, (10, 96)) * 960 / 8 == state_bytes(packed)


def recipe(**weights: Any) -> tfmq.Recipe:
    made = tfmq.scheme("rtn_w4a8")
    return replace(
        made,
        weights=replace(made.weights, **weights),
        calibration=Calibration(samples=1, steps=3, interval=1, batch_size=1, judged=0.0),
        rules=(),
    )


def test_a_job_measures_grids_keeps_them_and_reports_them(
    sampler: Callable[..., LoopSampler], tmp_path: Path
) -> None:
    made, other = sampler("plain"), sampler("plain")
    choices = recipe(grids=("e2m1",), groups=(8,))
    quantized = tfmq.quantize(made, choices, output_dir=tmp_path / "q")
    layers = packed_layers(made.denoiser.module)
    rows = {row["name"]: row for row in quantized.report["grids"]}
    assert rows.keys() == layers.keys()
    for name, row in rows.items():
        assert [(c["grid"], c["group"]) for c in row["candidates"]] == [
            ("uniform", 0),
            ("uniform", 8),
            ("e2m1", 0),
            ("e2m1", 8),
        ]
        kept = row["candidates"][row["kept"]]
        assert getattr(layers[name].format, "name", "uniform") == kept["grid"]
        assert layers[name].group in (0, kept["group"])
    assert len({row["kept"] for row in rows.values()}) > 1
    again = tfmq.quantize(other, choices, output_dir=tmp_path / "again")
    assert again.report["sha256"] == quantized.report["sha256"]


def test_one_candidate_is_not_measured_and_changes_nothing(sampler: Callable[..., LoopSampler]) -> None:
    digests = set()
    for weights in ({}, {"grids": ("uniform",)}, {"groups": (0,)}, {"grids": ("e2m3",)}):
        report = tfmq.quantize(sampler("plain"), recipe(**weights)).report
        assert "grids" not in report
        digests.add(report["sha256"])
    assert len(digests) == 1
