"""Quantize with many workers: the trajectory by batches, and units side by side where their inputs allow."""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Literal

from torch import Tensor

from tfmq.api import job_of, store_of
from tfmq.cluster.crew import Crew, Team
from tfmq.models.module_file import ModuleFile
from tfmq.models.sampler import Sampler
from tfmq.progress import Advance, silent
from tfmq.recipes.recipe import Recipe
from tfmq.reconstruction.resources import UNLIMITED, Resources
from tfmq.reconstruction.sequence import unit_file
from tfmq.stages import record_batch
from tfmq.storage.journal import Journal
from tfmq.targets import open_target
from tfmq.workflow import Prepared, prepare_units, reconstruct_alone

# A batch of the trajectory to record, with its number, or the number of a unit to reconstruct.
Task = tuple[Literal["record"], int, range] | tuple[Literal["reconstruct"], int, None]


class _Job:
    """The job as a worker sees it: an interrupted one, which it reads back as far as it is, to do one more stage of it."""

    def __init__(self, sampler: Sampler, recipe: Recipe, seed: int, folder: Path, journal: Journal, resources: Resources) -> None:
        self.sampler = sampler
        self.recipe = recipe
        self.seed = seed
        self.store = store_of(folder)
        self.journal = journal
        self.resources = resources

    def __call__(self, task: Task) -> None:
        kind, number, indices = task
        if indices is not None:
            record_batch(self.sampler, self.recipe, self.store.part(number).append, indices, seed=self.seed)
        else:
            with silent(kind, 0) as advance:
                self.journal.stage(unit_file(number), partial(self._reconstructed, number, advance))

    @cached_property
    def _prepared(self) -> Prepared:
        """The model with everything that stands in the journal before the units."""
        return prepare_units(self.sampler, self.recipe, seed=self.seed, store=self.store, journal=self.journal, resources=self.resources)

    def _reconstructed(self, number: int, advance: Advance) -> dict[str, Tensor]:
        given = {"seed": self.seed, "store": self.store, "resources": self.resources, "advance": advance}
        return reconstruct_alone(self.sampler, self.recipe, self._prepared, number, **given)  # type: ignore[arg-type]


def _make(
    target: str | ModuleFile,
    recipe: Recipe,
    folder: Path,
    seed: int,
    device: str | None,
    prompts: tuple[str, ...],
    component: str | None,
    resources: Resources,
) -> Callable[[Task], None]:
    """Open the job in a worker; refuse where the worker would compute something else."""
    sampler, fingerprint = open_target(target, recipe, seed=seed, device=device, prompts=prompts, component=component)
    resources.prepare()
    return _Job(sampler, recipe, seed, folder, Journal(folder, fingerprint, resume=True), resources)


class Helpers:
    """Workers that help `tfmq.quantize`; see `tfmq.stages.Helpers`.

    Args:
        crew: does it.
        target: what is quantized: a pipeline directory or a hub id, which each worker opens, "default", or a module's file.
        recipe: units are shared out where `rounding.inputs` is `full`; else the trajectory alone is.
        output_dir: where the quantized model goes. The folder of the job, beside it, must be the same one on all machines.
        seed: the seed that `tfmq.quantize` was given.
        device: the device that `tfmq.quantize` was given.
        prompts: the prompts that `tfmq.quantize` was given.
        component: the component that `tfmq.quantize` was given.
        resources: its limit of memory is that of each worker.

    Raises (where parts are asked for):
        JobMismatchError: a worker has another model, or other versions.
        CalibrationError: NaN or infinite values.
        WorkerError: a part could not be done.
    """

    def __init__(
        self,
        crew: Crew,
        target: str | ModuleFile,
        recipe: Recipe,
        output_dir: Path,
        *,
        seed: int = 0,
        device: str | None = None,
        prompts: tuple[str, ...] = (),
        component: str | None = None,
        resources: Resources = UNLIMITED,
    ) -> None:
        make = partial(_make, target, recipe, job_of(output_dir.absolute()), seed, device, prompts, component, resources)
        self._team: Team[Task, None] = crew.team(make)

    def record(self, batches: Sequence[range]) -> Iterator[int]:
        for number, _ in self._team([("record", number, indices) for number, indices in enumerate(batches)]):
            yield number

    def reconstruct(self, units: Sequence[int]) -> Iterator[int]:
        for number, _ in self._team([("reconstruct", unit, None) for unit in units]):
            yield units[number]
