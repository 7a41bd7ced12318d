"""The last judge of a model is what it draws. Candidates for the whole model draw the same images, and the
one nearest to full precision is kept.

An error of one prediction says little of the image: errors that repeat from step to step add up, and others
do not. So the model that a recipe makes is compared with the plainest one, nearest codes and inputs on grids
over their exact extremes, from noise that calibration has not seen.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tfmq.jobs.job import Job, Work
from tfmq.jobs.stage import Kept, Tensors
from tfmq.nn.watch import watched
from tfmq.progress import Advance
from tfmq.recipes.recipe import Branch, Correction, Recipe, Rescaling, Rule
from tfmq.reconstruction.solvers import Rounding
from tfmq.reconstruction.tuning import Tuning
from tfmq.storage.journal import Journal

RECIPE, PLAIN = "recipe", "plain"
# A mean squared error that counts as none, of images in [0, 1].
NO_ERROR = 1e-10


@dataclass(frozen=True)
class Verdict:
    """How near the images of each candidate were to full precision's, PSNR in dB image by image; `kept` is
    the candidate that the model became.
    """

    psnr_db: dict[str, tuple[float, ...]]
    kept: str

    def values(self) -> dict[str, Any]:
        """Return the verdict as values that JSON keeps."""
        means = {name: sum(values) / len(values) for name, values in self.psnr_db.items()}
        return {"images": len(self.psnr_db[RECIPE]), "psnr_db": means, "kept": self.kept}


class Known(Journal):
    """Keeps nothing, and knows what some stages have found."""

    def __init__(self, found: Mapping[str, Tensors]) -> None:
        super().__init__(None, {}, resume=False)
        self.found = found

    def stage(self, name: str, compute: Callable[[], Tensors]) -> Tensors:
        """Return what the stage has found, or compute it."""
        return self.found[name] if name in self.found else compute()


def plain(recipe: Recipe) -> Recipe:
    """Return the plainest recipe with the same bits, rules and temporal features: nearest codes, inputs as
    they come on grids over their exact extremes, and nothing that is found after the codes.
    """
    activations = replace(recipe.activations, ranges="min_max", clusters=0)
    alone = replace(
        recipe,
        rescaling=Rescaling(),
        branch=Branch(splitters=()),
        tuning=Tuning(),
        correction=Correction(),
    )
    return replace(
        alone, activations=activations, rounding=Rounding(solver="nearest"), rules=_plain(recipe.rules)
    )


def _plain(rules: Iterable[Rule]) -> tuple[Rule, ...]:
    """Return what rules say of bits and grids, without those that say nothing of them."""
    parts = (
        (rule, {name: value for name, value in rule.activations.items() if name != "clusters"})
        for rule in rules
    )
    return tuple(
        replace(rule, activations=kept, rescaling={}) for rule, kept in parts if rule.weights or kept
    )


def judged(job: Job) -> int:
    """Return the number of images that candidates are judged by; none where the recipe is as plain as they
    come.
    """
    recipe = job.recipe
    return (
        0
        if recipe.rounding.solver == "nearest"
        else int(recipe.calibration.judged * recipe.calibration.samples)
    )


def shared_copy(module: nn.Module) -> nn.Module:
    """Return a copy of a module, for inference, that has the same tensors: quantization replaces modules, and
    writes into no tensor of theirs.
    """
    tensors: list[Tensor] = [*module.parameters(), *module.buffers()]
    return deepcopy(module, {id(tensor): tensor for tensor in tensors}).eval()


def exchange(module: nn.Module, other: nn.Module) -> None:
    """Let two modules change places: whoever holds the one has the other's content now."""
    contents = dict(vars(other)), dict(vars(module))
    module.__class__, other.__class__ = type(other), type(module)
    for target, content in zip((module, other), contents, strict=True):
        vars(target).clear()
        vars(target).update(content)


@contextmanager
def exchanged(module: nn.Module, other: nn.Module) -> Iterator[None]:
    """Let two modules change places for a while."""
    exchange(module, other)
    try:
        yield
    finally:
        exchange(module, other)


@torch.no_grad()
def draw(job: Job, count: int, advance: Advance, stage: str = "judging") -> Tensor:
    """Return images of the job's model as it is now, from noise that no stage has seen."""
    with watched(job.denoiser.module, before=lambda _: advance()):
        return job.sampler.run(
            range(count), steps=job.recipe.calibration.steps, seed=job.seed_of(stage)
        ).double()


def psnr_db(images: Tensor, expected: Tensor) -> Tensor:
    """Return the PSNR of each image, float64 `[N]`; that of an image with NaN is none at all."""
    errors = (images - expected).square().flatten(1).mean(dim=1)
    return torch.where(errors.isfinite(), -10 * errors.clamp(min=NO_ERROR).log10(), -torch.inf)


def judging(full: nn.Module, other: nn.Module, count: int) -> Kept[Verdict]:
    """Return the stage that draws `count` images with the job's model, with its plain candidate `other` and
    with the `full` precision model, and gives a verdict.
    """
    return Kept("judging", partial(_compared, full, other, count), _verdict)


def _compared(full: nn.Module, other: nn.Module, count: int, job: Job, work: Work) -> Tensors:
    """Return the PSNR of the images of both candidates."""
    module = job.denoiser.module
    with job.progress("judging: images of three models", 3 * count * job.recipe.calibration.steps) as advance:
        found = draw(job, count, advance)
        with exchanged(module, other):
            plainly = draw(job, count, advance)
        with exchanged(module, full):
            expected = draw(job, count, advance)
    return {RECIPE: psnr_db(found, expected), PLAIN: psnr_db(plainly, expected)}


def _verdict(job: Job, work: Work, found: Tensors) -> Verdict:
    better = PLAIN if float(found[PLAIN].mean()) > float(found[RECIPE].mean()) else RECIPE
    return Verdict({name: tuple(found[name].tolist()) for name in (RECIPE, PLAIN)}, better)
