"""Tuning as a part of a job."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tfmq
import tfmq.jobs.tuning
from tfmq.jobs.job import Job
from tfmq.models.sampler import LoopSampler
from tfmq.nn.plan import packed_layers
from tfmq.recipes import Recipe
from tfmq.recipes.recipe import Calibration, Tuning
from tfmq.reconstruction.resources import Resources
from tfmq.storage import tensor_digest

Make = Callable[..., LoopSampler]


def recipe(iterations: int = 24, **changes: Any) -> Recipe:
    base = tfmq.scheme("rtn_w4a8")
    calibration = Calibration(samples=8, steps=3, interval=1, batch_size=4, judged=0.0)
    tuning = Tuning(iterations=iterations, batch_size=4)
    return replace(base, calibration=calibration, tuning=tuning, **changes)


def quantized(sampler: Make, how: Recipe, model: str = "plain", **options: Any) -> tuple[LoopSampler, Any]:
    drawn = sampler(model)
    return drawn, tfmq.quantize(drawn, how, **options).report["tuning"]


def digest(drawn: LoopSampler) -> str:
    return tensor_digest(drawn.denoiser.module.state_dict())


@pytest.mark.parametrize("model", ["plain", "unet", "conditional", "dit"])
def test_the_error_of_held_out_predictions_falls(sampler: Make, model: str) -> None:
    drawn, found = quantized(sampler, recipe(), model)
    assert found["iterations"] == 24 and found["after"] < 0.98 * found["before"]
    plain, nothing = quantized(sampler, recipe(0), model)
    assert nothing is None
    layers, untuned = packed_layers(drawn.denoiser.module), packed_layers(plain.denoiser.module)
    assert all(torch.equal(layers[name].packed, untuned[name].packed) for name in layers)
    changed = [name for name in layers if not torch.equal(layers[name].scale, untuned[name].scale)]
    assert len(changed) > len(layers) // 2


def test_the_temporal_block_keeps_its_features(sampler: Make) -> None:
    """Tables and the layers behind them are those of a job without tuning."""
    how = replace(recipe(), temporal=tfmq.scheme("rtn_w4a8").temporal)
    how = replace(how, temporal=replace(tfmq.scheme("w4a8").temporal, learning=how.learning))
    tuned, _ = quantized(sampler, how, "unet")
    plain, _ = quantized(sampler, replace(how, tuning=Tuning()), "unet")
    states = [one.denoiser.module.state_dict() for one in (tuned, plain)]
    temporal = [name for name in states[0] if "time_emb" in name]
    assert temporal and states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in temporal)
    assert digest(tuned) != digest(plain)


def test_an_interrupted_job_ends_with_the_same_bytes(
    sampler: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tfmq.jobs.tuning, "ROUND", 5)
    whole, report = quantized(sampler, recipe(), output_dir=tmp_path / "whole")
    descend, calls = tfmq.jobs.tuning.descend, []

    def failing(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return descend(*args, **options)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(tfmq.jobs.tuning, "descend", failing)
        quantized(sampler, recipe(), output_dir=tmp_path / "cut")
    names = {path.name for path in (tmp_path / "cut.job").rglob("tuning_0*")}
    assert len(names) == 2, names
    resumed, again = quantized(sampler, recipe(), output_dir=tmp_path / "cut", resume=True)
    assert digest(resumed) == digest(whole) and again == report


def test_a_step_in_parts_is_the_step(sampler: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where memory holds one sample at a time, gradients add up to the same."""
    _, whole = quantized(sampler, recipe(6))
    monkeypatch.setattr(tfmq.jobs.tuning, "TOGETHER", 1)
    _, parts = quantized(sampler, recipe(6))
    assert parts["after"] == pytest.approx(whole["after"], rel=1e-2)


def constant(self: Any, inputs: Any) -> torch.Tensor:
    """Stand in for a model with an operation that has no gradient."""
    found: torch.Tensor = inputs.sample
    return found


def test_without_memory_or_gradient_nothing_is_tuned(sampler: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, _ = quantized(sampler, recipe(0))
    lacking = {
        "a gradient keeps more than the 0 MiB": ("free_bytes", lambda: 1),
        "element 0 of tensors does not require grad": ("_Predictions.predicted", constant),
    }
    for words, (name, stand_in) in lacking.items():
        with monkeypatch.context() as patched, pytest.warns(UserWarning, match=f"are not tuned: {words}"):
            patched.setattr(f"tfmq.jobs.tuning.{name}", stand_in)
            drawn, report = quantized(sampler, recipe())
        assert report is None and digest(drawn) == digest(plain)


@pytest.mark.parametrize(("gone", "iterations"), [(0.35, 6), (0.95, None)])
def test_there_are_as_many_iterations_as_time_is_left_for(
    sampler: Make, monkeypatch: pytest.MonkeyPatch, gone: float, iterations: int | None
) -> None:
    """Of a budget of a million seconds, of which a share is gone and a gradient takes a tenth."""
    monkeypatch.setattr("tfmq.jobs.tuning.timed", lambda gradient: (gradient(), 1e5))
    monkeypatch.setattr(Job, "elapsed", lambda _: 1e6 * gone)
    drawn, report = quantized(sampler, recipe(10**6), resources=Resources(time_budget=1e6))
    assert (report and report["iterations"]) == iterations
    if iterations is None:
        assert digest(drawn) == digest(quantized(sampler, recipe(0))[0])


@pytest.mark.parametrize("worse", [3.0, float("nan")])
def test_what_does_not_gain_is_not_kept(sampler: Make, monkeypatch: pytest.MonkeyPatch, worse: float) -> None:
    def spoiled(tunable: Any, place: Any, *args: Any, **options: Any) -> Any:
        return replace(place, scales=place.scales + worse, done=place.done + 1)

    plain, _ = quantized(sampler, recipe(0))
    monkeypatch.setattr(tfmq.jobs.tuning, "descend", spoiled)
    drawn, report = quantized(sampler, recipe())
    assert digest(drawn) == digest(plain)
    assert report["after"] is None or report["after"] > report["before"]
