"""Whole trajectories: what the backends draw is what the exact reference draws."""

from dataclasses import replace

import numpy as np
import pytest

import tfmq
from tfmq.backends.execution import execute
from tfmq.evaluation.paired import paired_fidelity
from tfmq.evaluation.sampling import draw
from tfmq.kernels.onednn import available
from tfmq.models.sampler import Sampler
from tfmq.recipes.recipe import Calibration
from tfmq.reconstruction.solvers import Rounding
from tfmq.targets import open_sampler

STEPS, IMAGES = 20, 1


def drawn(sampler: Sampler, backend: str) -> np.ndarray:
    execute(sampler.denoiser.module, backend)
    return draw(sampler, IMAGES, steps=STEPS, seed=0, batch_size=IMAGES)


def quantize(sampler: Sampler) -> None:
    """Quantize a sampler's denoiser to W8A8 with all grids and tables, as fast as can be."""
    recipe = tfmq.scheme("w8a8")
    recipe = replace(
        recipe,
        rounding=Rounding(solver="nearest", inputs="full"),
        weights=replace(recipe.weights, ranges="min_max"),
        activations=replace(recipe.activations, ranges="min_max"),
    )
    temporal = replace(recipe.temporal, learning=replace(recipe.temporal.learning, iterations=1))
    # Units, which learn nothing, see two steps; grids and tables are those of all.
    calibration = Calibration(samples=1, steps=STEPS, interval=STEPS, batch_size=1)
    tfmq.quantize(sampler, replace(recipe, calibration=calibration, temporal=temporal))


def test_a_trajectory_of_the_embedded_model_ends_in_the_same_image(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TFMQ_CACHE", str(tmp_path_factory.mktemp("cache")))
    sampler = open_sampler("default")
    quantize(sampler)
    backends = ["simulated", *(["torch"] if available() else [])]
    try:
        import openvino  # noqa: F401

        backends.append("openvino")
    except ImportError:
        pass
    exact = drawn(sampler, "reference")
    psnr = {name: paired_fidelity(exact, drawn(sampler, name)).mean_psnr_db for name in backends}
    assert min(psnr.values()) >= 40, psnr
