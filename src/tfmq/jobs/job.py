"""A job is a value: what is quantized, by which recipe, with what means."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeVar
from zlib import crc32

from torch import Tensor, nn

from tfmq.calibration.choice import InputErrors
from tfmq.calibration.granularity import GridErrors
from tfmq.calibration.spared import Spared
from tfmq.calibration.store import CalibrationStore, StoredBatches
from tfmq.models.denoiser import Denoiser
from tfmq.models.sampler import Sampler
from tfmq.nn.plan import Plan
from tfmq.progress import Progress, silent
from tfmq.quantizers.steps import StepContext
from tfmq.recipes.recipe import Recipe
from tfmq.reconstruction.resources import UNLIMITED, Resources
from tfmq.reconstruction.tuning import TuningReport
from tfmq.reconstruction.unit import UnitReport
from tfmq.reconstruction.units import Unit
from tfmq.storage.journal import Journal
from tfmq.temporal.block import TemporalBlock

T = TypeVar("T")
# Is told about how many seconds will go by, and with what.
Foretold = Callable[[float, str], None]


class Helpers(Protocol):
    """Does parts of a job elsewhere, in any order, and gives back the numbers of those that are done.

    `record(batches)` leaves the calls of each batch in a part of the job's store, by the batch's number;
    `reconstruct(units)` leaves units, by their numbers, in the job's journal. Whoever helps does both with
    the functions that the job itself would call.
    """

    def record(self, batches: Sequence[range]) -> Iterator[int]:
        """Leave the calls of each batch in the job's store; yield the number of each that is done."""

    def reconstruct(self, units: Sequence[int]) -> Iterator[int]:
        """Leave each of `units` in the job's journal; yield the number of each that is done."""


def stage_seed(seed: int, name: str) -> int:
    """Return the seed of a stage: its own, so that the order and the number of stages before it do not
    matter.
    """
    return crc32(f"{name} {seed}".encode())


@dataclass(frozen=True, kw_only=True)
class Job:
    """One quantization.

    Attributes:
        sampler: brings the denoiser, which is quantized in place, and draws what it is calibrated on.
        recipe: how it is quantized.
        store: keeps the recorded calls.
        journal: keeps what finished stages found; with the journal of an interrupted run the result is the
            same to the byte. The methods below are the only ones that use it.
        seed: seed of the calibration noise and of every learning stage.
        resources: limits of memory and time.
        helpers: do what they can ahead of this process: the trajectory, and units that do not wait for each
            other.
        foretold: is told about how many seconds calibration takes, and later the units, before they begin.
        progress: shows bars.
        networks: what else of the pipeline is quantized, by name. Their calls are recorded on the trajectory
            of the denoiser.
        began: value of `time.perf_counter` from which a budget of time counts.
    """

    sampler: Sampler
    recipe: Recipe
    store: CalibrationStore
    journal: Journal
    seed: int = 0
    resources: Resources = UNLIMITED
    helpers: Helpers | None = None
    foretold: Foretold | None = None
    progress: Progress = silent
    networks: Mapping[str, Denoiser] = field(default_factory=dict)
    began: float = field(default_factory=time.perf_counter)

    @property
    def denoiser(self) -> Denoiser:
        """Return what is quantized."""
        return self.sampler.denoiser

    @property
    def batches(self) -> StoredBatches:
        """Return the recorded calls that layers and units learn from."""
        calibration = self.recipe.calibration
        return StoredBatches(self.store, calibration.interval, calibration.turns)

    def kept(self, name: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return what the journal keeps by this name, or compute it and keep it; for `Kept` alone."""
        return self.journal.stage(name, compute)

    def has(self, name: str) -> bool:
        """Whether the journal keeps a result of this name."""
        return self.journal.done(name)

    def within(self, name: str, *, sampler: Sampler, recipe: Recipe, store: CalibrationStore) -> "Job":
        """Return the job of a network beside the denoiser, whose results are kept in a folder of its own;
        nobody helps with it.
        """
        return replace(
            self,
            sampler=sampler,
            recipe=recipe,
            store=store,
            journal=self.journal.of(name),
            helpers=None,
            networks={},
        )

    def elapsed(self) -> float:
        """Return the seconds that the job has taken, those of earlier runs included."""
        return self.journal.seconds_before + time.perf_counter() - self.began

    def in_groups(self, names: Sequence[T], size: int) -> list[Sequence[T]]:
        """Return `names` in groups that fit the memory, if each takes `size` bytes. The trajectory is run
        again for each group.
        """
        most = self.resources.sites_at_once(size) or max(1, len(names))
        return [names[start : start + most] for start in range(0, len(names), most)]

    def seed_of(self, stage: str) -> int:
        """Return the seed of a stage; see `stage_seed`."""
        return stage_seed(self.seed, stage)


@dataclass(kw_only=True)
class Work:
    """The denoiser while it is quantized, and what stages leave for later ones.

    Attributes:
        block: its temporal block.
        plan: what is quantized, and how.
        steps: the calibrated timesteps; there from the stage on that records the calls.
        full: temporal features in full precision at these timesteps.
        pooled: how many timesteps share a range, for quantizers that saw few values at a timestep.
        exact: what the stage of the ranges would keep if all were exact extremes.
        inputs: errors of layers whose input grids were measured.
        grids: errors of the candidates for the grids of weights, where there were several.
        stock: the layers as they were before they were quantized, where some may stay so.
        spared: what was found of layers and of the output, where the recipe bounds an error.
        units: what is reconstructed, in execution order.
        reports: the reports of the units that are done.
        tuning: what tuning scales and biases did, where it was done.
    """

    block: TemporalBlock
    plan: Plan
    steps: StepContext = field(init=False)
    full: Mapping[str, Tensor] = field(default_factory=dict)
    pooled: Mapping[str, int] = field(default_factory=dict)
    exact: Mapping[str, Tensor] = field(default_factory=dict)
    inputs: Mapping[str, InputErrors] = field(default_factory=dict)
    grids: dict[str, GridErrors] = field(default_factory=dict)
    stock: Mapping[str, nn.Module] = field(default_factory=dict)
    spared: Spared | None = None
    units: tuple[Unit, ...] = ()
    reports: tuple[UnitReport, ...] = ()
    tuning: TuningReport | None = None
