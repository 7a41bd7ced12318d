from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tfmq
from tfmq.calibration.store import CalibrationStore
from tfmq.jobs import pace
from tfmq.jobs.job import Job
from tfmq.jobs.workflow import Outcome, quantize_denoiser
from tfmq.models.sampler import LoopSampler
from tfmq.nn.plan import packed_layers
from tfmq.recipes.recipe import Calibration, Recipe
from tfmq.reconstruction import sensitivity
from tfmq.reconstruction.budget import Budget
from tfmq.reconstruction.learning import Learning
from tfmq.reconstruction.resources import Resources
from tfmq.reconstruction.solvers import Rounding
from tfmq.storage.errors import JobMismatchError
from tfmq.storage.journal import Journal


@pytest.fixture
def recipe() -> Recipe:
    base = tfmq.scheme("w4a8")
    return replace(
        base,
        rounding=replace(base.rounding, solver="gptq_adaround"),
        calibration=Calibration(samples=2, steps=4, interval=1, batch_size=2),
        learning=Learning(iterations=12, learning_rate=1e-2, batch_size=2),
        temporal=replace(base.temporal, learning=Learning(iterations=2)),
    )


def run(
    sampler: LoopSampler, recipe: Recipe, directory: Path, seconds: float | None
) -> tuple[Outcome, bytes]:
    journal = Journal(directory, {}, resume=True)
    store = CalibrationStore(directory / "calibration")
    outcome = quantize_denoiser(
        Job(
            sampler=sampler,
            recipe=recipe,
            store=store,
            journal=journal,
            resources=Resources(time_budget=seconds),
        )
    )
    packed = packed_layers(sampler.denoiser.module)
    return outcome, b"".join(packed[name].packed.numpy().tobytes() for name in sorted(packed))


def test_time_enough_is_the_job_without_a_budget(
    sampler: Callable[..., LoopSampler], recipe: Recipe, tmp_path: Path
) -> None:
    # At the rate that a budget gives to so few steps.
    recipe = replace(recipe, learning=pace.within(recipe.learning, 12))
    free, plenty = (
        run(sampler("plain"), recipe, tmp_path / f"{seconds}", seconds) for seconds in (None, 1e6)
    )
    assert free[1] == plenty[1] and {unit.iterations for unit in plenty[0].units} == {12}


class Chosen(Budget):
    """Skips every third unit, and gives the others few steps: what a clock may bring."""

    def grant(self, waiting: Any) -> Any:
        number = len(self.sensitivity) - len(waiting)
        return pace.Grant(number % 3 != 0, number % 5)


def test_what_was_granted_is_reported_and_a_resumed_job_goes_on_with_it(
    sampler: Callable[..., LoopSampler], recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pace, "Budget", Chosen)
    whole, expected = run(sampler("plain"), recipe, tmp_path / "whole", 1e6)
    assert [unit.iterations for unit in whole.units] == [
        0 if number % 3 == 0 else number % 5 for number in range(len(whole.units))
    ]
    assert [unit.error_after is None for unit in whole.units] == [
        number % 3 == 0 for number in range(len(whole.units))
    ]
    assert len(whole.units) > 3

    class Killed(BaseException):
        pass

    real = pace.Paced.took

    def dying(self: Any, number: int, *rest: Any) -> None:
        if number == 2:
            raise Killed
        real(self, number, *rest)

    monkeypatch.setattr(pace.Paced, "took", dying)
    with pytest.raises(Killed):
        run(sampler("plain"), recipe, tmp_path / "cut", 1e6)
    monkeypatch.setattr(pace.Paced, "took", real)
    # The clock would say otherwise now, but unit 2 was promised its share before it was cut off.
    before = Chosen.grant
    monkeypatch.setattr(
        Chosen,
        "grant",
        lambda self, waiting: (
            pace.Grant(True, 11) if len(self.sensitivity) - len(waiting) == 2 else before(self, waiting)
        ),
    )
    resumed, found = run(sampler("plain"), recipe, tmp_path / "cut", 1e6)
    assert [unit.iterations for unit in resumed.units] == [
        unit.iterations for unit in whole.units
    ] and found == expected


def test_the_clock_and_the_sensitivity_reach_the_budget(
    sampler: Callable[..., LoopSampler], recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Budget] = []

    class Watched(Budget):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            seen.append(self)

    monkeypatch.setattr(pace, "Budget", Watched)
    outcome, _ = run(sampler("plain"), recipe, tmp_path / "job", 500.0)
    (budget,) = seen
    assert list(budget.sensitivity) == [unit.name for unit in outcome.units] and all(
        value > 0 for value in budget.sensitivity.values()
    )
    assert (
        all(cost.base > 0 and cost.step > 0 for cost in budget.costs.values())
        and budget.most == 12
        and budget.seconds == 475
    )
    assert 0 < budget.elapsed() < 500 and budget.base.taken > 0 and budget.step.taken > 0
    assert budget.base.taken + budget.step.taken == pytest.approx(sum(unit.seconds for unit in outcome.units))
    before = budget.elapsed()
    run(sampler("plain"), recipe, tmp_path / "job", 500.0)
    assert seen[1].elapsed() > 0.5 * before, "what earlier runs took counts"


@pytest.mark.parametrize(("solver", "least"), [("adaround", 12), ("gptq_adaround", 0), ("gptq", 0)])
def test_a_solver_that_only_learns_does_not_begin_what_it_cannot_learn(
    sampler: Callable[..., LoopSampler],
    recipe: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    solver: Any,
    least: int,
) -> None:
    found: list[int] = []
    monkeypatch.setattr(
        Budget, "grant", lambda self, waiting: found.append(self.least) or pace.Grant(False, 0)
    )  # type: ignore[func-returns-value]
    run(
        sampler("plain"),
        replace(recipe, rounding=replace(recipe.rounding, solver=solver)),
        tmp_path / "job",
        500.0,
    )
    assert set(found) == {least}


def test_a_budget_that_calibration_alone_exceeds_is_refused(
    sampler: Callable[..., LoopSampler], recipe: Recipe, tmp_path: Path
) -> None:
    with pytest.raises(
        ValueError, match=r"gone before the first unit: the calibration alone takes about .* lower the steps"
    ):
        run(sampler("plain"), recipe, tmp_path / "job", 1e-6)


def test_all_stages_before_the_units_count_against_a_budget(
    sampler: Callable[..., LoopSampler], recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A call, a search and a pass of the temporal block take a second each.
    monkeypatch.setattr("tfmq.jobs.forecast.seconds_of", lambda call: 1.0)
    base = replace(recipe, temporal=replace(recipe.temporal, rounding=Rounding()))
    longer = replace(base, temporal=replace(base.temporal, learning=Learning(iterations=1000)))
    exact = replace(base, activations=replace(base.activations, ranges="min_max"))
    closed = replace(base, temporal=replace(base.temporal, rounding=Rounding(solver="gptq")))
    needed = {}
    cases = {
        "base": (base, None),
        "closed": (closed, None),
        "longer": (longer, None),
        "exact": (exact, None),
        "passes": (base, 2**24),
    }
    for name, (changed, memory) in cases.items():
        journal, store = (
            Journal(tmp_path / name, {}, resume=True),
            CalibrationStore(tmp_path / name / "calibration"),
        )
        with pytest.raises(ValueError, match="gone before the first unit") as error:
            limits = Resources(time_budget=1, max_memory=memory)
            quantize_denoiser(
                Job(sampler=sampler("plain"), recipe=changed, store=store, journal=journal, resources=limits)
            )
        needed[name] = float(str(error.value).partition("takes about ")[2].split()[0])
    assert needed["longer"] - needed["base"] == pytest.approx(4 * 998, abs=2)
    # One batch of timesteps and three layers: once each, four times beside that; no steps of learning.
    assert needed["closed"] - needed["base"] == pytest.approx(3 + 4 - 4 * 2, abs=1)
    # Four calls: once drawn, and looked at for twice their time.
    assert needed["base"] - needed["exact"] > 4 and needed["exact"] == pytest.approx(4 * 3 + 4 * 2, abs=1)
    assert needed["passes"] > needed["base"]


def test_a_budget_that_is_gone_on_the_way_is_told_and_leaves_nearest_codes(
    sampler: Callable[..., LoopSampler], recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tfmq.jobs.calibration.check_time", lambda *_: None)
    with pytest.warns(
        UserWarning, match=r"is gone after \d+ s of calibration: units keep their nearest codes"
    ):
        outcome, _ = run(sampler("plain"), recipe, tmp_path / "job", 1e-3)
    assert {(unit.error_after, unit.iterations, unit.seconds) for unit in outcome.units} == {(None, 0, 0.0)}


def test_another_budget_is_another_job(
    sampler: Callable[..., LoopSampler], recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("tfmq.jobs.units.paced", stop)
        tfmq.quantize(
            sampler("plain"), recipe, output_dir=tmp_path / "q", resources=Resources(time_budget=100)
        )
    with pytest.raises(JobMismatchError, match=r"time_budget was 100 and is 200"):
        tfmq.quantize(
            sampler("plain"),
            recipe,
            output_dir=tmp_path / "q",
            resources=Resources(time_budget=200),
            resume=True,
        )


@pytest.mark.parametrize("wrong", [0.0, -1.0, float("inf"), float("nan")])
def test_no_time_is_no_budget(wrong: float) -> None:
    with pytest.raises(ValueError, match="time_budget"):
        Resources(time_budget=wrong)


def test_sensitivity_is_the_error_of_the_output_with_one_unit_quantized(
    sampler: Callable[..., LoopSampler], recipe: Recipe
) -> None:
    from tfmq.models.trace import trace
    from tfmq.nn.plan import activation_sites, prepare
    from tfmq.quantizers.steps import StepContext
    from tfmq.recipes.plan import make_plan
    from tfmq.reconstruction.units import find_units

    denoiser = sampler("plain").denoiser
    example = sampler("plain").example()
    full = denoiser(example)
    recipe = replace(
        recipe, activations=replace(recipe.activations, bits=None, products=False, per_step="none"), rules=()
    )
    traced = trace(denoiser, example)
    prepare(
        denoiser.module,
        make_plan(recipe, traced),
        StepContext(torch.tensor([1.0])),
        timestep=denoiser.timestep,
    )
    assert not activation_sites(denoiser.module)
    units = find_units(denoiser.module, [layer.name for layer in traced.layers])
    found = sensitivity.output_sensitivity(denoiser, units, [example])
    layer = denoiser.module.exit
    layer.weight_precision = "quantized"
    alone = (denoiser(example) - full).square().mean()
    assert found[[unit.name for unit in units].index("exit")] == pytest.approx(float(alone), rel=1e-5)
