"""The same noise through two models."""

from collections.abc import Callable

import numpy as np
import pytest

from tfmq.evaluation.comparison import compare
from tfmq.evaluation.paired import PSNR_CAP
from tfmq.evaluation.sampling import draw
from tfmq.models.sampler import LoopSampler

Pair = Callable[..., tuple[LoopSampler, LoopSampler]]


def test_images_are_those_that_each_model_draws_alone(pair: Pair, bar: Callable[..., object]) -> None:
    reference, quantized = pair("plain_rgb")
    result = compare(reference, quantized, num_images=3, steps=4, seed=7, batch_size=2, progress=bar)  # type: ignore[arg-type]
    assert np.array_equal(result.reference, draw(reference, 3, steps=4, seed=7, batch_size=2))
    assert np.array_equal(result.quantized, draw(quantized, 3, steps=4, seed=7, batch_size=2))
    assert not np.array_equal(result.reference, result.quantized)
    assert 0 < result.fidelity.mean_psnr_db < PSNR_CAP
    assert result.temporal.max_relative_error > 0
    assert bar.seen == {"sampling: full precision": (8, 8), "sampling: quantized": (8, 8)}  # type: ignore[attr-defined]


def test_both_models_start_from_the_same_noise(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    reference, quantized = pair("plain_rgb")
    # A quantized model that computes what its original does: only other noise could tell them apart.
    monkeypatch.setattr(quantized, "run", reference.run)
    result = compare(reference, quantized, num_images=2, steps=4, seed=7)
    assert np.array_equal(result.reference, result.quantized)
    assert result.fidelity.min_psnr_db == PSNR_CAP and result.fidelity.mean_ssim == pytest.approx(1)


def test_refuses_models_of_other_shapes(pair: Pair, sampler: Callable[..., LoopSampler]) -> None:
    _, quantized = pair("plain_rgb")
    with pytest.raises(ValueError, match="shape"):
        compare(sampler("plain"), quantized, num_images=1, steps=1, seed=0)
