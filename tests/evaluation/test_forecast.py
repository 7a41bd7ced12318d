"""The forecast counts every layer that a quantized model would run, once, and no other."""

from collections.abc import Callable

import pytest
from torch import nn

from tfmq.evaluation.forecast import forecast
from tfmq.kernels.onednn import available
from tfmq.models.sampler import LoopSampler
from tfmq.nn.swap import STEPS


def test_it_times_the_layers_that_remain(sampler: Callable[..., LoopSampler], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tfmq.evaluation.forecast.SECONDS", 0.001)
    made = sampler("unet")
    found = forecast(made, batch=2)
    module = made.denoiser.module
    temporal = [name for name, child in module.named_modules() if isinstance(child, nn.Linear) and ("time_emb" in name)]
    layers = [name for name, child in module.named_modules() if isinstance(child, nn.Linear | nn.Conv2d)]
    assert temporal and sum(timing.count for timing in found.shapes) == len(layers) - len(temporal)
    assert all(timing.input[0] == 2 for timing in found.shapes)
    assert found.fp32_ms > 0 and found.rest_ms >= 0
    assert found.weight_bytes["fp32"] == 4 * sum(child.weight.numel() for child in module.modules() if isinstance(child, nn.Linear | nn.Conv2d))
    if available():
        assert found.predicted_ms is not None and found.speedup == found.fp32_ms / found.predicted_ms
        assert all(timing.int8_ms is not None for timing in found.shapes)


def test_without_integer_operators_nothing_is_predicted(sampler: Callable[..., LoopSampler], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tfmq.evaluation.forecast.SECONDS", 0.001)
    monkeypatch.setattr("tfmq.evaluation.forecast.available", lambda: False)
    found = forecast(sampler("plain"))
    assert found.predicted_ms is None and found.speedup is None and all(timing.int8_ms is None for timing in found.shapes)


def test_a_quantized_model_is_refused(sampler: Callable[..., LoopSampler]) -> None:
    made = sampler("plain")
    setattr(made.denoiser.module, STEPS, None)
    try:
        with pytest.raises(ValueError, match="quantized already"):
            forecast(made)
    finally:
        delattr(made.denoiser.module, STEPS)
