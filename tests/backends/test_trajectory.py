"""Whole trajectories: what the backends draw is what the exact reference draws."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

import tfmq
from tfmq.backends.backend import Options
from tfmq.backends.execution import execute
from tfmq.evaluation.paired import paired_fidelity
from tfmq.evaluation.sampling import draw
from tfmq.kernels.onednn import available
from tfmq.models.sampler import LoopSampler, Sampler
from tfmq.numerics.errors import sqnr_db
from tfmq.recipes.recipe import Calibration
from tfmq.targets import open_sampler

STEPS, IMAGES = 50, 1


def drawn(sampler: Sampler, backend: str) -> np.ndarray:
    execute(sampler.denoiser.module, backend)
    return draw(sampler, IMAGES, steps=STEPS, seed=0, batch_size=IMAGES)


def quantize(sampler: Sampler) -> None:
    """Quantize a sampler's denoiser to W8A8 with all grids and tables, as fast as can be."""
    recipe = tfmq.scheme("w8a8")
    recipe = replace(
        recipe,
        rounding=replace(recipe.rounding, solver="nearest"),
        weights=replace(recipe.weights, ranges="min_max"),
    )
    temporal = replace(recipe.temporal, learning=replace(recipe.temporal.learning, iterations=1))
    tfmq.quantize(
        sampler,
        replace(recipe, calibration=Calibration(samples=1, steps=STEPS, batch_size=1), temporal=temporal),
    )


def test_fifty_steps_of_the_embedded_model_end_in_the_same_images(
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


@pytest.mark.skipif(not available(), reason="this torch has no integer operators of oneDNN")
def test_fifty_steps_of_a_compiled_model_end_in_the_same_samples(sampler: Callable[..., LoopSampler]) -> None:
    """Of a tiny one with a normalisation, a skip and a transposed convolution: for the embedded one torch's
    compiler would take minutes.
    """
    from diffusers import DDIMScheduler

    made = sampler("upsampler", scheduler=DDIMScheduler(clip_sample=False))
    made.to_images = torch.nn.Identity()
    quantize(made)
    found = []
    for backend, options in (("reference", Options()), ("torch", Options(compile=True))):
        execute(made.denoiser.module, backend, options=options)
        found.append(made.run(range(IMAGES), steps=STEPS, seed=0))
    # A few roundings, 120 dB and more, unless one of them moves an activation to another code.
    assert sqnr_db(*found) >= 40
