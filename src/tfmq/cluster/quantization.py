"""Quantize with many workers: the trajectory by batches, and units side by side where their inputs allow."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Literal

from tfmq.api import job_of, store_of
from tfmq.cluster.crew import Crew, Team
from tfmq.components import Components
from tfmq.jobs.calibration import record_batch
from tfmq.jobs.job import Job, Work
from tfmq.jobs.units import unit_alone
from tfmq.jobs.workflow import BEFORE_UNITS, run
from tfmq.models.module_file import ModuleFile
from tfmq.progress import silent
from tfmq.recipes.recipe import Recipe
from tfmq.reconstruction.resources import UNLIMITED, Resources
from tfmq.storage.journal import Journal
from tfmq.targets import fingerprint_of, open_target

# A batch of the trajectory to record, with its number, or the number of a unit to reconstruct.
Task = tuple[Literal["record"], int, range] | tuple[Literal["reconstruct"], int, None]


@dataclass(frozen=True, kw_only=True)
class Order:
    """What is quantized, as every worker opens it by itself.

    Attributes:
        target: a pipeline directory, a hub id, a name of a model, or a module's file.
        recipe: units are shared out where `rounding.inputs` is `full`; else the trajectory alone is.
        output_dir: where the quantized model goes. The folder of the job, beside it, must be the same one on
            all machines.
        seed: the seed that `tfmq.quantize` was given.
        device: the device that `tfmq.quantize` was given.
        prompts: the prompts that `tfmq.quantize` was given.
        component: the component that `tfmq.quantize` was given.
        components: the components that `tfmq.quantize` was given.
        resources: its limit of memory is that of each worker.
    """

    target: str | ModuleFile
    recipe: Recipe
    output_dir: Path
    seed: int = 0
    device: str | None = None
    prompts: tuple[str, ...] = ()
    component: str | None = None
    components: Components | None = None
    resources: Resources = UNLIMITED


class _Worker:
    """The job as a worker sees it: an interrupted one, which it reads back as far as it is, to do one more
    stage of it.
    """

    def __init__(self, job: Job) -> None:
        self.job = job

    def __call__(self, task: Task) -> None:
        kind, number, indices = task
        if indices is not None:
            record_batch(self.job, self.job.store.part(number), indices)
        else:
            with silent(kind, 0) as advance:
                unit_alone(number, advance=advance)(self.job, self._work)

    @cached_property
    def _work(self) -> Work:
        """The model with everything that stands in the journal before the units."""
        return run(self.job, BEFORE_UNITS)


def _make(order: Order) -> Callable[[Task], None]:
    """Open the job in a worker; refuse where the worker would compute something else."""
    folder = job_of(order.output_dir.absolute())
    sampler, networks = open_target(
        order.target,
        order.recipe,
        device=order.device,
        prompts=order.prompts,
        component=order.component,
        components=order.components,
    )
    # A crew works without a budget of time, the one limit that a result depends on.
    fingerprint = fingerprint_of(sampler, order.recipe, order.seed, UNLIMITED, networks)
    order.resources.prepare()
    journal = Journal(folder, fingerprint, resume=True)
    return _Worker(
        Job(
            sampler=sampler,
            recipe=order.recipe,
            store=store_of(folder),
            journal=journal,
            seed=order.seed,
            resources=order.resources,
            networks=networks.all,
        )
    )


class WorkerHelpers:
    """Workers of a crew that help `tfmq.quantize` with an order; see `tfmq.jobs.job.Helpers`.

    Raises (where parts are asked for):
        JobMismatchError: a worker has another model, or other versions.
        CalibrationError: NaN or infinite values.
        WorkerError: a part could not be done.
    """

    def __init__(self, crew: Crew, order: Order) -> None:
        self._team: Team[Task, None] = crew.team(partial(_make, order))

    def record(self, batches: Sequence[range]) -> Iterator[int]:
        """Record the calls of `batches` on the workers; yield the number of each batch that is done."""
        for number, _ in self._team([("record", number, indices) for number, indices in enumerate(batches)]):
            yield number

    def reconstruct(self, units: Sequence[int]) -> Iterator[int]:
        """Reconstruct `units` on the workers; yield the number of each unit that is done."""
        for number, _ in self._team([("reconstruct", unit, None) for unit in units]):
            yield units[number]
