import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from tfmq.nn.layer import CalibratedLayer, pack
from tfmq.nn.operation import operation_of, weight_of
from tfmq.numerics.grids import IntegerFormat
from tfmq.quantizers.weight import AdaptiveRounding, fit_grid
from tfmq.reconstruction.learning import Learning
from tfmq.reconstruction.solvers import LEAN, SOLVERS, Rounding, Samples, UnitProblem, leaning, work_amount

GPTQ = Rounding(solver="gptq")


def calibrated(
    module: nn.Module, *, segments: tuple[int, ...] = (), bits: int = 3, group: int = 0
) -> CalibratedLayer:
    operation = operation_of(module)
    assert operation is not None
    grid = fit_grid(weight_of(module).detach(), IntegerFormat(bits), segments=segments, group=group)
    layer = CalibratedLayer(module, operation, grid, None)
    layer.weight_precision = "quantized"
    return layer


def solve(
    layer: CalibratedLayer, x: Tensor, full: Tensor, config: Rounding = GPTQ, *, seed: int = 0
) -> float:
    """Round a layer that reads `x`, where full precision reads `full`; return the mean squared error of its
    outputs.
    """
    layer.weight_precision = "full"
    target = layer(full).detach()
    layer.weight_precision = "quantized"

    def run_full(part: Tensor) -> None:
        layer.weight_precision = "full"
        layer(full[part])
        layer.weight_precision = "quantized"

    def loss(_: torch.Generator) -> Tensor:
        return (layer(x) - target).square().mean()

    advances: list[int] = []
    samples = Samples(torch.arange(len(x)).split(16), run_full, lambda part: layer(x[part]), loss)
    problem = UnitProblem({"layer": layer}, samples, LEARNING, lambda n=1: advances.append(n))
    taken = SOLVERS[config.solver].solve(problem, config, seed)
    assert taken == (LEARNING.iterations if "adaround" in config.solver else 0)
    assert sum(advances) == work_amount(config, LEARNING, 1)
    with torch.no_grad():
        return float((layer(x) - target).square().mean())


LEARNING = Learning(iterations=5, learning_rate=1e-2)


def correlated(*shape: int) -> Tensor:
    x = torch.randn(shape)
    return x + 2 * torch.randn(shape[0], *([1] * (len(shape) - 1))) + x.roll(1, dims=1)


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(24, 10), (64, 24), ()),
    "tokens": (lambda: nn.Linear(24, 10, bias=False), (16, 9, 24), ()),
    "convolution": (lambda: nn.Conv2d(8, 10, 3, padding=1, stride=2), (32, 8, 7, 7), ()),
    "grouped": (lambda: nn.Conv2d(8, 12, 3, padding=1, groups=4), (32, 8, 7, 7), ()),
    "transposed": (
        lambda: nn.ConvTranspose2d(8, 10, 3, padding=1, stride=2, output_padding=1),
        (32, 8, 5, 5),
        (),
    ),
    "transposed groups": (
        lambda: nn.ConvTranspose2d(8, 12, 2, stride=2, dilation=2, groups=4),
        (32, 8, 5, 5),
        (),
    ),
    "segments": (lambda: nn.Conv2d(8, 10, 3, padding=1), (32, 8, 7, 7), (3, 5)),
}


# `nearest` is what the others are compared with.
@pytest.mark.parametrize("solver", [name for name in SOLVERS if name != "nearest"])
@pytest.mark.parametrize(
    ("build", "shape", "segments"),
    [
        (lambda: nn.Linear(32, 10), (128, 32), ()),
        (lambda: nn.Conv2d(32, 10, 3, padding=1), (32, 32, 7, 7), (16, 16)),
        (lambda: nn.Conv2d(32, 10, 3, padding=1, groups=2), (32, 32, 7, 7), ()),
    ],
    ids=["linear", "segments", "grouped"],
)
def test_solvers_keep_the_ratios_of_groups(
    build: Callable[[], nn.Module], shape: tuple[int, ...], segments: tuple[int, ...], solver: str
) -> None:
    torch.manual_seed(7)
    x, module = correlated(*shape), build()
    layer = calibrated(module, segments=segments, group=8)
    grid, nearest = layer.grid, solve(layer, x, x, Rounding(solver="nearest"))
    assert grid.group == 8 and grid.multiplier is not None
    before = grid.multiplier.clone(), grid.zero_point.clone(), grid.scale.clone()
    found = solve(layer, x, x, Rounding(solver=solver))
    assert found < (0.5 if "gptq" in solver else 1.01) * nearest
    assert torch.equal(grid.multiplier, before[0]) and torch.equal(grid.zero_point, before[1])
    # A row has one scale, which least squares moves by a little.
    assert bool(((grid.scale / before[2]).log().abs() < 0.5).all())
    packed = pack(layer)
    with torch.no_grad():
        assert torch.equal(packed(x), layer(x))


@pytest.mark.parametrize("name", CASES)
def test_gptq_leaves_less_error_than_nearest(name: str) -> None:
    torch.manual_seed(0)
    build, shape, segments = CASES[name]
    x = correlated(*shape)
    layer = calibrated(build(), segments=segments)
    nearest = solve(layer, x, x, Rounding(solver="nearest"))
    found = solve(layer, x, x)
    assert found < 0.5 * nearest
    assert int(layer.codes.max()) < 8
    packed = pack(layer)
    with torch.no_grad():
        assert torch.equal(packed(x), layer(x)), "scales and the corrected bias reach the packed layer"


def test_it_makes_up_for_errors_that_reach_it() -> None:
    torch.manual_seed(1)
    full = correlated(256, 24)
    x = full + 0.3 * torch.randn_like(full) + 0.2
    first, second = calibrated(nn.Linear(24, 10), bits=8), calibrated(nn.Linear(24, 10), bits=8)
    second.restore(first.learned())
    second.weight.data.copy_(first.weight)
    second.bias.data.copy_(first.bias)  # type: ignore[union-attr]
    alone = solve(first, x, full, Rounding(solver="nearest"))
    assert solve(second, x, full, replace(GPTQ, damping=1e-3)) < 0.8 * alone


@pytest.mark.parametrize("bits", [8, 4])
def test_noise_shrinks_what_least_squares_fits_and_not_what_has_unit_gain(bits: int) -> None:
    """Inputs of variance 1 under noise of variance 0.1: a least squares fit has the gain 1 / 1.1 (errors in
    variables; Fuller, 1987, section 1.1).
    """
    torch.manual_seed(3)
    full = torch.randn(4096, 16)
    x = full + 0.1**0.5 * torch.randn_like(full)
    gains = {}
    for unit_gain in (False, True):
        torch.manual_seed(4)
        layer = calibrated(nn.Linear(16, 8), bits=bits)
        solve(layer, x, full, replace(GPTQ, damping=1e-6, unit_gain=unit_gain))
        layer.weight_precision = "full"
        expected = layer(full)
        layer.weight_precision = "quantized"
        found = layer(x)
        expected, found = expected - expected.mean(0), found - found.mean(0)
        gains[unit_gain] = (expected * found).sum(0) / expected.square().sum(0)
    assert float(gains[False].mean()) == pytest.approx(1 / 1.1, abs=0.02)
    torch.testing.assert_close(gains[True], torch.ones(8), rtol=0, atol=1e-5)


def test_the_bias_takes_the_mean_error_and_full_precision_keeps_its_own() -> None:
    torch.manual_seed(2)
    x = correlated(128, 24) + 1.0
    layer = calibrated(nn.Linear(24, 10))
    layer.weight_precision = "full"
    before = layer(x)
    solve(layer, x, x)
    layer.weight_precision = "full"
    assert torch.equal(layer(x), before)
    layer.weight_precision = "quantized"
    torch.testing.assert_close((layer(x) - before).mean(dim=0), torch.zeros(10), rtol=0, atol=1e-4)


def test_a_wide_layer_is_solved_in_parts() -> None:
    torch.manual_seed(3)
    x, layer = correlated(256, 40), calibrated(nn.Linear(40, 10))
    scale = layer.grid.scale.clone()
    nearest = solve(layer, x, x, Rounding(solver="nearest"))
    assert solve(layer, x, x, replace(GPTQ, widest=16)) < 0.8 * nearest
    assert torch.equal(layer.grid.scale, scale)


@pytest.mark.parametrize("segments", [(), (3, 5)])
def test_a_polish_starts_from_the_codes_that_it_polishes(segments: tuple[int, ...]) -> None:
    torch.manual_seed(6)
    x, layer = correlated(32, 8, 7, 7), calibrated(nn.Conv2d(8, 10, 3, padding=1), segments=segments)
    found = solve(layer, x, x)
    rounding = AdaptiveRounding(leaning(layer), layer.grid)
    assert torch.equal(rounding.codes(hard=True), layer.codes.float())
    step = layer.grid.steps(4)
    moved = (layer.grid.decode(rounding.codes(hard=False).detach()) - layer.quantized_weight()).div(step)
    towards = (layer.weight - layer.quantized_weight()).div(step)
    assert float(moved.abs().max()) <= LEAN + 1e-3 and bool((moved * towards >= -1e-3).all())
    assert solve(layer, x, x, Rounding(solver="gptq_adaround")) <= found


def test_the_same_seed_gives_the_same_codes() -> None:
    torch.manual_seed(4)
    x, module = correlated(32, 8, 12, 12), nn.Conv2d(8, 10, 3, padding=1)
    config = replace(GPTQ, positions=4)
    found = []
    for seed in (1, 1, 2):
        layer = calibrated(module)
        solve(layer, x, x, config, seed=seed)
        found.append(layer.codes.clone())
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_inputs_that_never_vary_leave_finite_weights() -> None:
    torch.manual_seed(5)
    layer = calibrated(nn.Linear(6, 3))
    assert solve(layer, torch.zeros(8, 6), torch.zeros(8, 6)) < 1e-8
    assert bool(layer.quantized_weight().isfinite().all())


@pytest.mark.parametrize(
    "wrong",
    [
        {"solver": "best"},
        {"inputs": "some"},
        {"damping": 0.0},
        {"damping": math.nan},
        {"damping": math.inf},
        {"positions": 0},
        {"sweeps": 0},
        {"widest": 0},
    ],
)
def test_impossible_settings_are_refused_by_name(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=rf"rounding\.{next(iter(wrong))}"):
        Rounding(**wrong)  # type: ignore[arg-type]
