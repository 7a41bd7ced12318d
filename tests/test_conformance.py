"""What holds for all that is registered: backends, solvers, grids, equalizers, splitters, estimators, parts
of a quantized model. None is listed here.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tfmq
from tfmq.backends.backend import BACKENDS
from tfmq.backends.execution import execute
from tfmq.calibration.rescaling import Reader
from tfmq.calibration.splitting import Split
from tfmq.models.denoiser import Inputs
from tfmq.models.sampler import LoopSampler
from tfmq.models.trace import trace
from tfmq.nn.layer import CalibratedLayer
from tfmq.nn.plan import packed_layers
from tfmq.nn.swap import parts_of
from tfmq.nn.transform import Transform
from tfmq.numerics.equivalence import EQUALIZERS, Extremes, power_of_two
from tfmq.numerics.errors import sqnr_db
from tfmq.numerics.estimators import ESTIMATORS
from tfmq.numerics.grids import GRIDS, IntegerFormat, Table, table
from tfmq.numerics.groups import has_room
from tfmq.numerics.low_rank import SPLITTERS, second_moments, truncated
from tfmq.quantizers.part import Execution, Part
from tfmq.quantizers.weight import AdaptiveRounding, fit_grid
from tfmq.recipes import Recipe
from tfmq.recipes.recipe import Calibration, Correction, Rescaling, Rule
from tfmq.reconstruction.solvers import SOLVERS, Rounding
from tfmq.storage.digest import tensor_digest

Make = Callable[..., LoopSampler]


def short(**changes: Any) -> Recipe:
    """A recipe that learns next to nothing, and uses every door."""
    base = tfmq.scheme("w4a8")
    return replace(
        base,
        calibration=Calibration(samples=2, steps=3, interval=1, batch_size=2, judged=0.0),
        learning=replace(base.learning, iterations=3),
        temporal=replace(base.temporal, learning=replace(base.temporal.learning, iterations=3)),
        rescaling=Rescaling(equalizers=tuple(EQUALIZERS)),
        correction=Correction(estimators=tuple(ESTIMATORS)),
        **changes,
    )


def doubled(reader: Reader, **_: Any) -> Transform:
    layer = reader.layer
    return Transform(torch.full((layer.weight.shape[1] * layer.operation.groups,), 2.0))


def parted(reader: Reader, *, rank: int, **_: Any) -> Split:
    layer = reader.layer
    matrix = layer.weight.flatten(1).unflatten(0, (layer.operation.groups, -1))
    return Split(doubled(reader), truncated(matrix, None, min(rank, *matrix.shape[1:])))


@pytest.fixture(scope="module")
def whole(sampler: Make) -> LoopSampler:
    """A model in which every layer is rescaled, with a branch beside it, and every prediction corrected."""
    made, recipe = sampler("upsampler"), short()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tfmq.jobs.weights.best_split", parted)
        tfmq.quantize(made, replace(recipe, weights=replace(recipe.weights, rank=2)))
    return made


def batch(made: LoopSampler) -> Inputs:
    example = made.example().resized(2)
    return Inputs(
        torch.randn(example.sample.shape, generator=torch.Generator().manual_seed(0)),
        torch.tensor([666, 666]),
        example.conditions,
    )


@torch.no_grad()
@pytest.mark.parametrize("name", BACKENDS)
def test_a_backend_computes_what_the_simulation_does_and_leaves_no_trace(
    whole: LoopSampler, name: str
) -> None:
    module, inputs = whole.denoiser.module, batch(whole)
    if lacking := BACKENDS[name].missing():
        pytest.skip(lacking)
    before, expected = tensor_digest(module.state_dict()), whole.denoiser(inputs)
    try:
        coverage = execute(module, name)
        found = whole.denoiser(inputs)
        # `float` does not round the inputs of layers; every other one computes the same integers.
        assert sqnr_db(expected, found) > (20 if name == "float" else 35)
        assert torch.equal(whole.denoiser(inputs), found)
        named = [*coverage.integer, *coverage.floating]
        assert len(named) == len(set(named))
        assert tensor_digest(module.state_dict()) == before
    finally:
        execute(module, "simulated")
    assert torch.equal(whole.denoiser(inputs), expected)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_solver_stays_on_the_grid_and_depends_on_the_seed_alone(sampler: Make, name: str) -> None:
    digests, seen = set(), 0
    for _ in range(2):
        made = sampler("plain_rgb")
        rounding = replace(tfmq.scheme("w4a8").rounding, solver=name)
        report = tfmq.quantize(made, short(rounding=rounding), seed=7).report
        digests.add(report["sha256"])
        seen += len(report["units"])
        assert all(unit["error_after"] is None or unit["error_after"] >= 0 for unit in report["units"])
        assert bool(made.run(range(1), steps=3, seed=1).isfinite().all())
    assert len(digests) == 1 and (seen > 0 or name == "nearest")


def spread(name: str, count: int = 4000) -> Tensor:
    """Weights on the grid `name`, times a scale for each of two rows, with every value among them."""
    values = torch.tensor(GRIDS[name], dtype=torch.float32)
    picked = torch.cat([values, values[torch.randint(len(values), (count,))]])
    return torch.stack([0.03 * picked, 7.0 * picked])


@pytest.mark.parametrize("name", GRIDS)
def test_a_grid_holds_its_own_values_and_takes_the_nearest_of_any(name: str) -> None:
    grid, weight = Table(name, GRIDS[name]), spread(name)
    fitted = fit_grid(weight, grid, method="min_max")
    torch.testing.assert_close(fitted.decode(fitted.encode(weight)), weight, rtol=1e-6, atol=0)
    other = torch.randn(2, 500)
    fitted = fit_grid(other, grid)
    decoded, scaled = fitted.decode(fitted.encode(other)), other / fitted.scale
    nearest = (scaled[..., None] - torch.tensor(GRIDS[name])).abs().amin(dim=-1) * fitted.scale
    torch.testing.assert_close((decoded - other).abs(), nearest, rtol=1e-4, atol=1e-6)
    if 0 in GRIDS[name]:
        assert torch.equal(fitted.decode(fitted.encode(torch.zeros(2, 1))), torch.zeros(2, 1))


@pytest.mark.parametrize("name", GRIDS)
def test_soft_roundings_start_at_the_weight_and_end_beside_it(name: str) -> None:
    weight = torch.randn(2, 500)
    grid = fit_grid(weight, Table(name, GRIDS[name]), method="min_max")
    rounding = AdaptiveRounding(weight, grid)
    torch.testing.assert_close(grid.decode(rounding.codes(hard=False)), weight, rtol=1e-3, atol=1e-3)
    hard = rounding.codes(hard=True)
    assert torch.equal(hard, hard.round()) and bool((hard - grid.encode(weight)).abs().le(1).all())
    grid.decode(rounding.codes(hard=False)).square().sum().backward()
    assert rounding.logits.grad is not None and bool(rounding.logits.grad.isfinite().all())


def documented_reader() -> Callable[[Path, str, tuple[int, ...]], Any]:
    """Return the reader without tfmq of docs/format.md."""
    page = (Path(__file__).parents[1] / "docs" / "format.md").read_text(encoding="utf-8")
    start = page.index("import json", page.index("### Values"))
    found: dict[str, Any] = {}
    exec(page[start : page.index("\nweight = ", start)], found)
    return found["read_weight"]


def test_every_grid_with_groups_where_it_has_room_is_packed_stored_and_run_by_every_backend(
    sampler: Make, tmp_path: Path
) -> None:
    made = sampler("dit")
    names = itertools.cycle([*GRIDS, "uniform"])
    grids = {layer.name: table(next(names)) for layer in trace(made.denoiser, made.example()).layers}
    rules = tuple(
        Rule(match=name, weights={"bits": grid.bits, "grid": grid.name} if grid else {"bits": 4})
        for name, grid in grids.items()
    )
    assert len(rules) > len(GRIDS)
    recipe = replace(short(), rules=rules, rescaling=Rescaling())
    # Two groups in the inputs of some layers, which are segments of their weights too.
    rules += (Rule(match="*.to_q", activations={"group": 8}),)
    recipe = replace(recipe, rules=rules, weights=replace(recipe.weights, group=8))
    tfmq.quantize(made, recipe, output_dir=tmp_path / "out")
    module, inputs = made.denoiser.module, batch(made)
    layers = packed_layers(module)
    assert {name: layer.format for name, layer in layers.items()} == {
        name: grid or IntegerFormat(4) for name, grid in grids.items()
    }
    for name, layer in layers.items():
        wide = layer.shape[1] >= 16
        assert layer.segments == ((8, 8) if name.endswith(".to_q") else ())
        assert layer.group == (8 if wide and has_room(layer.format) and not layer.segments else 0)
        assert layer.integer_weight().narrow
        if (grid := grids[name]) and not layer.group:
            assert set(layer.integer_weight().values.unique().tolist()) <= set(grid.values)
    with torch.no_grad():
        expected = made.denoiser(inputs)
        for backend in BACKENDS:
            if backend != "float" and not BACKENDS[backend].missing():
                coverage = execute(module, backend)
                assert sqnr_db(expected, made.denoiser(inputs)) > 35, backend
                assert backend == "simulated" or len(coverage.integer) == len(layers), coverage.floating
    opened = tfmq.load(tmp_path / "out", module=sampler("dit").denoiser.module)
    assert tensor_digest(opened.state_dict()) == tensor_digest(module.state_dict())
    for name, layer in layers.items():
        read = documented_reader()(tmp_path / "out", name, layer.shape)
        assert torch.equal(torch.from_numpy(read), layer.weight), name


def extremes() -> Iterator[Extremes]:
    """Inputs of every kind: ordinary, one-sided, all zero, wild."""
    yield Extremes(-torch.rand(3, 6), torch.rand(3, 6))
    yield Extremes(torch.zeros(3, 6), torch.rand(3, 6) * torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 1e6]))
    yield Extremes(torch.zeros(3, 6), torch.zeros(3, 6))
    yield Extremes(torch.full((3, 6), -1e-20), torch.full((3, 6), 1e20))


@pytest.mark.parametrize("name", EQUALIZERS)
def test_an_equalizer_proposes_positive_finite_factors_and_has_no_memory(name: str) -> None:
    weights = torch.rand(6) + 0.01
    for seen in extremes():
        first, second = (list(EQUALIZERS[name](seen, weights)) for _ in range(2))
        assert first
        for one, other in zip(first, second, strict=True):
            snapped = power_of_two(one)
            assert (
                snapped.shape == (6,)
                and bool((snapped.isfinite() & (snapped > 0)).all())
                and torch.equal(one, other)
            )


@pytest.mark.parametrize("name", SPLITTERS)
@pytest.mark.parametrize("kind", ["noise", "zero", "rank one", "tiny"])
def test_a_splitter_proposes_factors_that_leave_less(name: str, kind: str) -> None:
    weight = {
        "noise": torch.randn(2, 6, 9),
        "zero": torch.zeros(2, 6, 9),
        "rank one": torch.randn(2, 6, 1) @ torch.randn(2, 1, 9),
        "tiny": 1e-20 * torch.randn(2, 6, 9),
    }[kind]
    moments = second_moments(torch.randn(2, 40, 9))
    first, second = (list(SPLITTERS[name](weight, moments, 2, torch.round)) for _ in range(2))
    assert first
    for one, other in zip(first, second, strict=True):
        assert one.up.shape == (2, 6, 2) and one.down.shape == (2, 2, 9)
        assert bool(one.up.isfinite().all() and one.down.isfinite().all())
        assert torch.equal(one.product, other.product)
    rest = weight.double() - first[0].product
    energies = [float(((part @ moments) * part).sum()) for part in (rest, weight.double())]
    assert energies[0] <= energies[1]


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize(
    "exact",
    [torch.randn(500, 3), torch.zeros(500, 3), torch.full((500, 3), 2.0)],
    ids=["noise", "zero", "constant"],
)
def test_an_estimator_leaves_what_is_right(name: str, exact: Tensor) -> None:
    values = exact.double()
    found = ESTIMATORS[name](values, values)
    torch.testing.assert_close(found(values), values, rtol=0, atol=1e-12)


def kinds(base: type[Part] = Part) -> Iterator[type[Part]]:
    for kind in base.__subclasses__():
        yield from (kind, *kinds(kind))


@torch.no_grad()
def test_a_part_keeps_its_tensors_through_dtypes_and_what_backends_set(whole: LoopSampler) -> None:
    parts = list(parts_of(whole.denoiser.module))
    assert not any(isinstance(part, CalibratedLayer) for part in parts)
    for part in parts:
        own = {name for name in part._buffers if name in part.state_dict(keep_vars=True)}
        assert all(part.keeps(name) for name in own), type(part).__name__
        assert part.finished() is part
        before, state = part.execution, part.state_dict().keys()
        part.execute(Execution())
        assert part.execution is not None and part.state_dict().keys() == state
        part.execute(before)
        undo = part.choose(weights="full", inputs="full")
        undo()


def test_every_kind_of_part_is_in_a_model_of_these_tests_or_is_gone_when_it_is_packed(
    whole: LoopSampler, sampler: Make
) -> None:
    other = sampler("unet")
    # What rescales and corrects is in the model above.
    recipe = replace(
        short(rounding=Rounding(solver="nearest")), rescaling=Rescaling(), correction=Correction()
    )
    tfmq.quantize(
        other,
        replace(recipe, activations=replace(tfmq.scheme("transformer_w4a8").activations, tokens="dynamic")),
    )
    found = {
        kind
        for made in (whole, other)
        for part in parts_of(made.denoiser.module)
        for kind in type(part).__mro__
    }
    lacking = [
        kind.__name__
        for kind in kinds()
        if kind not in found and not kind.__subclasses__() and not kind.__name__.startswith("Calibrated")
    ]
    assert not lacking, f"no model here has {', '.join(lacking)}"
