"""The embedded model: small, of the stated architecture, and a digit-like picture from noise."""

from pathlib import Path

import numpy as np

from tfmq.evaluation.sampling import draw
from tfmq.targets import named_directory, open_sampler

LARGEST = 8_000_000


def test_the_model_is_small_and_of_the_stated_size() -> None:
    files = [path for path in (named_directory("default") or Path()).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= LARGEST
    sampler = open_sampler("default")
    assert sum(parameter.numel() for parameter in sampler.denoiser.module.parameters()) == 3_832_251


def test_it_draws_chalk_on_coloured_ground() -> None:
    images = draw(open_sampler("default"), 4, steps=10, seed=0).astype(np.float64)
    assert images.shape == (4, 32, 32, 3)
    brightness = images.min(axis=-1)
    # Chalk is nearly white in every channel and covers a part of the middle; a border of two pixels is
    # ground.
    share = (brightness > 190).mean(axis=(1, 2))
    border = np.concatenate([brightness[:, :2].reshape(4, -1), brightness[:, -2:].reshape(4, -1)], axis=1)
    assert np.all((share > 0.02) & (share < 0.35)), share
    assert np.median(border) < 150, "the ground is darker than chalk"
