"""What a cell of the leaderboard measures: images against full precision's, what they show, how they are
spread, and what a step takes.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from contestants import Contestant
from reference import Reference
from torch import Tensor

import tfmq
from tfmq.backends.backend import Options
from tfmq.errors import MissingExtraError
from tfmq.evaluation.adherence.shares import encoded, share
from tfmq.evaluation.cost.system import foreign_seconds
from tfmq.evaluation.cost.timing import Timing, interleaved, timed
from tfmq.evaluation.cost.trajectory import spread_calls
from tfmq.evaluation.distribution.extractor import labelled
from tfmq.evaluation.distribution.extractors import EXTRACTORS
from tfmq.evaluation.distribution.features import Kind
from tfmq.evaluation.distribution.frechet import frechet_distance
from tfmq.evaluation.sampling import Images, as_colour
from tfmq.evaluation.settings import JUDGES
from tfmq.evaluation.temporal import temporal_disturbance
from tfmq.evaluation.text import asked_of
from tfmq.evaluation.weights import WeightFolder
from tfmq.models.denoiser import Denoiser, Inputs
from tfmq.models.sampler import Sampler
from tfmq.progress import silent

# The first of these that the machine has draws the images: it computes in integers, within the bounds of
# docs/performance.md.
DRAWING = ("openvino", "cuda", "torch", "simulated")
# Any of these may be the fastest for a step. What torch compiles takes minutes to start, for each cell.
TIMED = ("openvino", "cuda", "torch")
EAGER = "torch, float32"
# Rounds of a timing, and seconds of each.
ROUNDS, SECONDS = 5, 0.3
CHUNK = 50


@dataclass(frozen=True)
class Held:
    """Features `[N, d]` in memory; see `tfmq.evaluation.distribution.features.Features`."""

    values: Tensor

    def __len__(self) -> int:
        return len(self.values)

    def chunks(self, kind: Kind) -> Iterator[Tensor]:
        return iter(self.values.split(CHUNK))


class Scorer:
    """Measures the images of one model's cells.

    Args:
        model: the model.
        reference: its full-precision images, prepared.
        extractor: name of what gives the features of the Frechet distance.

    Raises:
        MissingExtraError: the extractor's library is not installed.
    """

    def __init__(self, model: Contestant, reference: Reference, extractor: str) -> None:
        self.reference = reference
        self.extractor = extractor
        self.judge = JUDGES[model.judge]() if model.judge else None
        # Now rather than after an hour of calibration: its library may be missing.
        self._extract = EXTRACTORS[extractor](WeightFolder())

    def features(self, images: Images) -> Held:
        """Return the features of images."""
        parts = [as_colour(images[start : start + CHUNK]) for start in range(0, len(images), CHUNK)]
        return Held(torch.cat([self._extract(part)["pool"] for part in parts]))

    @cached_property
    def full(self) -> Held:
        """The features of full precision's images."""
        return self.features(self.reference.images)

    def adherence(self, images: Images) -> dict[str, list[int]]:
        """Return how many images hold each attribute, of how many that were asked for it; nothing where the
        model brings no judge.
        """
        if self.judge is None:
            return {}
        pixels = torch.from_numpy(as_colour(images)).permute(0, 3, 1, 2).float() / 255
        verdicts = encoded(self.judge(pixels, asked_of(self.reference.sampler, range(len(images)))))
        found = {name: share(values) for name, values in verdicts.items()}
        return {name: [value.held, value.asked] for name, value in found.items() if value is not None}

    def fidelity(self, images: Images) -> dict[str, Any]:
        """Return PSNR and SSIM of every image, as many digits as a table can use, and the Frechet distance to
        full precision.
        """
        pairs = self.reference.fidelity(images)
        distance = frechet_distance(self.features(images), self.full, "pool")
        return {
            "psnr_db": np.round(pairs.psnr_db, 3).tolist(),
            "ssim": np.round(pairs.ssim, 5).tolist(),
            "frechet": {"name": labelled("fid", self.extractor), "value": distance},
        }

    def temporal(self, sampler: Sampler) -> dict[str, float]:
        """Return the relative error of temporal features and how many look like those of another timestep."""
        found = temporal_disturbance(self.reference.sampler, sampler.denoiser.module)
        return {
            "mean": found.mean_relative_error,
            "max": found.max_relative_error,
            "mismatches": found.mismatches,
        }


def executed(sampler: Sampler) -> str:
    """Make a quantized model compute by the first backend of `DRAWING` that this machine has, and return its
    name.
    """
    for name in DRAWING:
        try:
            tfmq.execute(sampler.denoiser.module, name, options=Options())
        except (MissingExtraError, ValueError):
            continue
        return name
    raise AssertionError("the simulation runs anywhere")


def _timed(denoiser: Denoiser, call: Inputs, name: str) -> Timing:
    @torch.no_grad()
    def step() -> object:
        return denoiser(call)

    # A first call converts and compiles.
    step()
    return interleaved(
        {name: lambda: timed(step, seconds=SECONDS, busy=foreign_seconds)},
        rounds=ROUNDS,
        advance=lambda _: None,
    )[name]


def _as_json(found: Mapping[str, Timing]) -> dict[str, Any]:
    fastest = min(found, key=lambda name: found[name].seconds)
    return {"backend": fastest, "ms_per_step": 1e3 * found[fastest].seconds, "clean": found[fastest].clean}


def middle_call(reference: Reference) -> Inputs:
    """Return the denoiser's call in the middle of the trajectory of one image: under guidance it has two
    rows.
    """
    calls: Sequence[Inputs] = spread_calls(reference.sampler, steps=reference.steps, count=1, progress=silent)
    return calls[0]


def full_precision_step(reference: Reference) -> dict[str, Any]:
    """Return what a step of one image takes in float32."""
    return _as_json({EAGER: _timed(reference.sampler.denoiser, middle_call(reference), EAGER)})


def fastest_step(sampler: Sampler, reference: Reference) -> dict[str, Any]:
    """Return what a step of one image takes on the fastest backend that this machine has; `clean` where
    nobody else used the machine meanwhile.
    """
    call, found = middle_call(reference), {}
    for name in TIMED:
        try:
            tfmq.execute(sampler.denoiser.module, name, options=Options())
        except (MissingExtraError, ValueError):
            continue
        found[name] = _timed(sampler.denoiser, call, name)
    if not found:
        tfmq.execute(sampler.denoiser.module, "simulated")
        found["simulated"] = _timed(sampler.denoiser, call, "simulated")
    return _as_json(found)
