"""Whole trajectories of the embedded model: what the backends draw is what the exact reference draws."""

from dataclasses import replace

import numpy as np
import pytest

import tfmq
from tfmq.backends.backend import Options
from tfmq.backends.execution import execute
from tfmq.evaluation.paired import paired_fidelity
from tfmq.evaluation.sampling import draw
from tfmq.kernels.onednn import available
from tfmq.models.sampler import Sampler
from tfmq.recipes.recipe import Calibration
from tfmq.targets import open_sampler

STEPS, IMAGES = 50, 4


def drawn(sampler: Sampler, backend: str, options: Options | None = None) -> np.ndarray:
    execute(sampler.denoiser.module, backend, options=options)
    return draw(sampler, IMAGES, steps=STEPS, seed=0, batch_size=IMAGES)


def test_fifty_steps_end_in_the_same_images(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TFMQ_CACHE", str(tmp_path_factory.mktemp("cache")))
    sampler = open_sampler("default")
    recipe = tfmq.scheme("w8a8")
    temporal = replace(recipe.temporal, learning=replace(recipe.temporal.learning, iterations=1))
    calibration = Calibration(samples=1, steps=STEPS, batch_size=1)
    tfmq.quantize(sampler, replace(recipe, calibration=calibration, learning=replace(recipe.learning, iterations=0), temporal=temporal))
    exact = drawn(sampler, "reference")
    backends: list[tuple[str, Options]] = [("simulated", Options())]
    if available():
        backends += [("torch", Options()), ("torch", Options(compile=True))]
    try:
        import openvino  # noqa: F401

        backends.append(("openvino", Options()))
    except ImportError:
        pass
    psnr = {(name, options.compile): paired_fidelity(exact, drawn(sampler, name, options)).mean_psnr_db for name, options in backends}
    assert min(psnr.values()) >= 40, psnr
