"""The models of the leaderboard: ours by name, others by a directory or by a function of a Python file, and
how each is run.
"""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from loading import loaded
from torch import nn

import tfmq
from tfmq.cli.options import read_prompts
from tfmq.evaluation.adherence.judge import brought_judge
from tfmq.models.sampler import Sampler
from tfmq.progress import Progress
from tfmq.recipes.recipe import Recipe
from tfmq.storage.digest import tensor_digest
from tfmq.targets import named_directory, open_sampler

PROMPTS = Path(__file__).parent / "prompts"
# Above so many steps units learn from every second one, as in the presets; below there are too few to leave
# any out.
MANY = 10


@dataclass(frozen=True, kw_only=True)
class Running:
    """How images are drawn, and how many calibration draws; with few steps an image gives few calls."""

    steps: int = 50
    guidance: float | None = None
    samples: int = 32


KNOWN = {
    "default": Running(),
    "text": Running(steps=20, guidance=3.0),
    "text-turbo": Running(steps=4, guidance=1.0, samples=128),
    "dit": Running(steps=20, guidance=2.0),
}


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """A full-precision model that can be opened again and again.

    Attributes:
        name: of its rows.
        running: see `Running`.
        directory: of its pipeline; None where a function makes its sampler.
        function: `FILE.py:FUNCTION`, which returns a sampler that brings whatever it draws from.
        prompts, calibration_prompts: of a text-to-image pipeline: what is measured, and what calibration sees
            instead.
    """

    name: str
    running: Running
    directory: Path | None = None
    function: str = ""
    prompts: tuple[str, ...] = ()
    calibration_prompts: tuple[str, ...] = ()

    @property
    def judge(self) -> str | None:
        """Name of the judge of its images."""
        return None if self.directory is None else brought_judge(self.directory)

    def sampler(self) -> Sampler:
        """Return a sampler of a new copy of the model."""
        if self.directory is not None:
            options = {} if self.running.guidance is None else {"guidance_scale": self.running.guidance}
            return open_sampler(self.directory, prompts=self.prompts, options=options)
        path, _, function = self.function.rpartition(":")
        return getattr(loaded(Path(path)), function)()

    def recipe(self, recipe: Recipe, *, iterations: int | None) -> Recipe:
        """Return a recipe with the calibration of this model, and with so many iterations where rounding is
        learned.
        """
        running, calibration = self.running, recipe.calibration
        interval = calibration.interval if running.steps > MANY else 1
        calibration = replace(
            calibration,
            samples=running.samples,
            steps=running.steps,
            interval=interval,
            guidance_scale=running.guidance,
        )
        learning = recipe.learning if iterations is None else replace(recipe.learning, iterations=iterations)
        return replace(recipe, calibration=calibration, learning=learning)

    def quantize(self, recipe: Recipe, *, seed: int, folder: Path, progress: Progress) -> Mapping[str, Any]:
        """Quantize a copy into `folder` and return the report."""
        target = self.directory or self.sampler()
        return tfmq.quantize(
            target, recipe, output_dir=folder, seed=seed, prompts=self.calibration_prompts, progress=progress
        ).report

    def quantized(self, folder: Path) -> Sampler:
        """Return the sampler of the quantized model in `folder`, on the prompts that are measured."""
        if self.directory is not None:
            return open_sampler(folder, prompts=self.prompts)
        sampler = self.sampler()
        tfmq.load(folder, module=sampler.denoiser.module, backend="simulated")
        return sampler

    def describe(self) -> dict[str, Any]:
        """Return what figures depend on: the weights, the prompts, and how the model is run."""
        asked = (
            sha256("\n".join((*self.prompts, "", *self.calibration_prompts)).encode()).hexdigest()[:16]
            if self.prompts
            else None
        )
        running = {
            "steps": self.running.steps,
            "guidance": self.running.guidance,
            "samples": self.running.samples,
        }
        return {"weights": weights_digest(self.sampler())[:16], "prompts": asked, **running}


def weights_digest(sampler: Sampler) -> str:
    """Return the digest of all weights that images depend on: the denoiser's and, where there is a pipeline,
    those of its other components.
    """
    pipeline = getattr(sampler, "pipeline", None)
    parts = {"denoiser": sampler.denoiser.module} if pipeline is None else pipeline.components
    modules = {name: part for name, part in parts.items() if isinstance(part, nn.Module)}
    return tensor_digest(
        {
            f"{name}.{key}": value
            for name, module in modules.items()
            for key, value in module.state_dict().items()
        }
    )


def find(text: str, options: argparse.Namespace) -> Contestant | None:
    """Return the model that `text` names: a name, a directory or `FILE.py:FUNCTION`, `NAME=` before it or
    not; None where a named one is absent.

    Raises:
        ValueError: there is no such directory or file, or a pipeline draws from prompts and was given none.
    """
    name, _, place = text.rpartition("=")
    directory = named_directory(place) or Path(place)
    if not name and place in KNOWN and not (directory / "model_index.json").is_file():
        return None
    given = {
        key: value for key in ("steps", "guidance", "samples") if (value := getattr(options, key)) is not None
    }
    running = replace(KNOWN.get(place, Running()), **given)
    path, colon, function = place.rpartition(":")
    if colon and Path(path).is_file():
        return Contestant(name=name or function, running=running, function=place)
    if not directory.is_dir():
        raise ValueError(
            f"{place} is neither a model's name ({', '.join(KNOWN)}), nor a directory, nor FILE.py:FUNCTION"
        )
    return _asked(Contestant(name=name or directory.name, running=running, directory=directory), options)


def _asked(model: Contestant, options: argparse.Namespace) -> Contestant:
    """Return a model of a directory with the prompts that it is measured and calibrated on, if it draws from
    any.
    """
    if not getattr(model.sampler(), "takes_prompts", False):
        return model
    scenes = model.judge == "scenes"
    measured = options.prompts or (PROMPTS / "scenes.txt" if scenes else None)
    calibrated = options.calibration_prompts or (PROMPTS / "calibration.txt" if scenes else None)
    if measured is None or calibrated is None:
        raise ValueError(
            f"{model.name} draws from prompts: give a file of those to measure it "
            "on (--prompts), and of others (--calibration-prompts)"
        )
    return replace(model, prompts=read_prompts(measured), calibration_prompts=read_prompts(calibrated))
