"""The forecast counts every layer that a quantized model would run, once, and no other."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

import tfmq
from tfmq.evaluation.forecast import expected_seconds, forecast
from tfmq.evaluation.shapes import ShapeTiming, Site, total, work_of
from tfmq.evaluation.trial import trial
from tfmq.kernels.onednn import available
from tfmq.models.sampler import LoopSampler
from tfmq.nn.swap import STEPS
from tfmq.numerics.operations import Linear
from tfmq.recipes.recipe import Calibration

BACKEND = "torch" if available() else "reference"


def test_it_times_the_layers_that_remain(
    sampler: Callable[..., LoopSampler], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tfmq.evaluation.shapes.SECONDS", 0.001)
    made = sampler("unet")
    found = forecast(made, batch=2)
    module = made.denoiser.module
    temporal = [
        name
        for name, child in module.named_modules()
        if isinstance(child, nn.Linear) and ("time_emb" in name)
    ]
    layers = [name for name, child in module.named_modules() if isinstance(child, nn.Linear | nn.Conv2d)]
    assert temporal and sum(timing.count for timing in found.shapes) == len(layers) - len(temporal)
    assert all(timing.input[0] == 2 for timing in found.shapes)
    assert found.fp32_ms > 0 and found.rest_ms >= 0
    assert found.weight_bytes["fp32"] == 4 * sum(
        child.weight.numel() for child in module.modules() if isinstance(child, nn.Linear | nn.Conv2d)
    )
    if available():
        assert found.predicted_ms is not None and found.speedup == found.fp32_ms / found.predicted_ms
        assert all(timing.int8_ms is not None for timing in found.shapes)


def test_a_trial_runs_what_a_quantized_model_runs(sampler: Callable[..., LoopSampler]) -> None:
    """The same modules compute in the same ways as in a model that was calibrated; the sampler's own model
    stays as it is.
    """
    recipe = tfmq.scheme("w8a8")
    made, calibrated = sampler("unet"), sampler("unet")
    before = {name: tensor.clone() for name, tensor in made.denoiser.module.state_dict().items()}
    tried = trial(made, recipe, backend=BACKEND)
    rounding = replace(recipe.rounding, solver="nearest")
    learning = replace(recipe.temporal.learning, iterations=0)
    tfmq.quantize(
        calibrated,
        replace(
            recipe,
            rounding=rounding,
            temporal=replace(recipe.temporal, learning=learning),
            calibration=Calibration(samples=1, steps=2, interval=1, batch_size=1),
        ),
    )
    tfmq.execute(calibrated.denoiser.module, BACKEND)

    def anatomy(module: nn.Module) -> dict[str, tuple[str, str]]:
        return {
            name: (type(child).__name__, type(getattr(child, "kernel", None)).__name__)
            for name, child in module.named_modules()
        }

    assert anatomy(tried.module) == anatomy(calibrated.denoiser.module)
    assert tried(made.example()).isfinite().all()
    after = made.denoiser.module.state_dict()
    assert after.keys() == before.keys() and all(
        torch.equal(after[name], tensor) for name, tensor in before.items()
    )


def test_without_integer_operators_nothing_is_predicted(
    sampler: Callable[..., LoopSampler], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tfmq.evaluation.shapes.SECONDS", 0.001)
    for place in ("forecast", "shapes"):
        monkeypatch.setattr(f"tfmq.evaluation.{place}.available", lambda: False)
    found = forecast(sampler("plain"))
    assert (
        found.predicted_ms is None
        and found.speedup is None
        and all(timing.int8_ms is None for timing in found.shapes)
    )


def test_a_quantized_model_is_refused(sampler: Callable[..., LoopSampler]) -> None:
    made = sampler("plain")
    setattr(made.denoiser.module, STEPS, None)
    try:
        with pytest.raises(ValueError, match="quantized already"):
            forecast(made)
    finally:
        delattr(made.denoiser.module, STEPS)


def test_a_quick_forecast_concludes_what_it_does_not_time(
    sampler: Callable[..., LoopSampler], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no time is left after the first shape, and the model counts as large, the rest follows from the
    work of the layers.
    """
    monkeypatch.setattr("tfmq.evaluation.shapes.SECONDS", 0.001)
    monkeypatch.setattr("tfmq.evaluation.forecast.QUICK_SHAPES", 0.0)
    monkeypatch.setattr("tfmq.evaluation.forecast.QUICK_WEIGHTS", 0)
    monkeypatch.setattr("tfmq.evaluation.forecast.trial", lambda *_, **__: pytest.fail("a copy was made"))
    made = sampler("unet")
    found = forecast(made, thorough=False)
    assert (
        len(found.shapes) == 1
        and "1 of " in found.extrapolated[0]
        and "% of the work" in found.extrapolated[0]
    )
    assert found.rest_ms >= 0 and found.fp32_ms > 0
    if available():
        assert (
            found.predicted_ms is not None
            and found.predicted_ms > found.rest_ms
            and "no quantized copy" in found.extrapolated[1]
        )


def test_shapes_that_are_not_timed_count_by_theirwork_of() -> None:
    operation = Linear()
    sites = {Site(operation, (4, 4), (1, 4), False): 3, Site(operation, (8, 8), (2, 8), False): 1}
    large = next(site for site in sites if site.weight == (8, 8))
    assert [work_of(site) for site in sites] == [16, 128]
    timed = {
        large: ShapeTiming(operation="linear", weight=(8, 8), input=(2, 8), count=1, fp32_ms=4.0, int8_ms=1.0)
    }
    whole = total(sites, timed)
    assert (
        whole.measured == 128 / 176
        and whole.fp32_ms == pytest.approx(4 * 176 / 128)
        and whole.int8_ms == pytest.approx(176 / 128)
    )


def test_the_word_before_the_work_is_bounded(
    sampler: Callable[..., LoopSampler], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tfmq.evaluation.forecast.PACKING", 1.0)
    monkeypatch.setattr("tfmq.evaluation.forecast.QUICK_WEIGHTS", 0)
    made = sampler("unet")
    assert 0 < expected_seconds(made, thorough=False) < 60 < expected_seconds(made, thorough=True)
