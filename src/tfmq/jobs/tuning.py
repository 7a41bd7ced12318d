"""The stage that tunes scales and biases, once all units have their codes."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import isfinite

import torch
from torch import Tensor

from tfmq.errors import LONGEST, cut
from tfmq.jobs.correction import channel_axis
from tfmq.jobs.job import Job, Work
from tfmq.jobs.stage import Kept, Tensors, Where
from tfmq.jobs.temporal import maintained
from tfmq.models.denoiser import Inputs, joined
from tfmq.nn.plan import calibrated_layers
from tfmq.progress import Advance
from tfmq.recipes.plan import last_layer
from tfmq.reconstruction.resources import CAPTURED, free_bytes
from tfmq.reconstruction.tuning import (
    Loss,
    Place,
    Tunable,
    TuningReport,
    descend,
    output_sizes,
    place_of,
    saved_bytes,
)
from tfmq.reconstruction.unit import full_precision
from tfmq.stopwatch import timed

# Bytes that a gradient keeps at most for the samples that are computed together, unless one takes more.
TOGETHER = 2**30
# Of so many samples one is held out, and at most so many in all.
EVERY, MOST_HELD_OUT = 8, 128
# Iterations after which the journal keeps the place.
ROUND = 20


@dataclass(frozen=True)
class SampleOfCall:
    """One sample of a recorded call, by their numbers."""

    call: int
    number: int


class _Predictions:
    """Predictions of the job's model for samples of recorded calls, and their errors."""

    def __init__(self, job: Job, work: Work) -> None:
        self.job = job
        example = job.store.read(0).rows(0, 1)
        with torch.no_grad():
            prediction = job.denoiser(example)
        last = job.denoiser.module.get_submodule(last_layer(work.block.trace))
        self.axis = channel_axis(prediction, last)
        self.channels = prediction.shape[self.axis]
        if job.denoiser.timestep is not None:
            # Where a model predicts a variance too, samplers make little use of it.
            self.channels = min(self.channels, example.sample.shape[self.axis])
        calls = job.store.every_index(job.recipe.calibration.interval)
        self.rows = [
            SampleOfCall(call, number) for call in calls for number in range(job.store.rows_of(call))
        ]

    def split(self) -> tuple[list[SampleOfCall], list[SampleOfCall]]:
        """Return the samples to learn from and those held out, which are of all timesteps; the same where
        there are too few to part.
        """
        held = self.rows[EVERY - 1 :: EVERY]
        held = held[:: max(1, len(held) // MOST_HELD_OUT)]
        kept = {*held}
        return [row for row in self.rows if row not in kept], held or self.rows

    def inputs(self, rows: Sequence[SampleOfCall]) -> list[Inputs]:
        """Read samples, in as few calls as they allow."""
        calls = {row.call: self.job.store.read(row.call) for row in rows}
        return joined([calls[row.call].rows(row.number, row.number + 1) for row in rows])

    def predicted(self, inputs: Inputs) -> Tensor:
        """Return what the model predicts."""
        return self.job.denoiser(inputs).narrow(self.axis, 0, self.channels)

    @torch.no_grad()
    def expected(self, inputs: Inputs) -> Tensor:
        """Return what the model predicts in full precision."""
        with full_precision(self.job.denoiser.module):
            return self.predicted(inputs)

    def losses(self, rows: Sequence[SampleOfCall], together: int) -> list[Loss]:
        """Return the parts of the mean squared error of some samples, each of at most so many `together`."""
        parts = [rows[start : start + together] for start in range(0, len(rows), together)]
        return [partial(self._loss, inputs, 1 / len(rows)) for part in parts for inputs in self.inputs(part)]

    def _loss(self, inputs: Inputs, weight: float) -> Tensor:
        expected = self.expected(inputs)
        return weight * len(inputs) * (self.predicted(inputs) - expected).float().square().mean()

    @torch.no_grad()
    def relative_error(self, rows: Sequence[SampleOfCall], together: int) -> float:
        """Return the squared error of some samples over the square of what is expected."""
        error, energy = 0.0, 0.0
        for start in range(0, len(rows), together):
            for inputs in self.inputs(rows[start : start + together]):
                expected = self.expected(inputs)
                error += float((self.predicted(inputs) - expected).double().square().sum())
                energy += float(expected.double().square().sum())
        return error / energy if energy else 0.0


def _tunable(job: Job, work: Work, predictions: _Predictions) -> Tunable:
    """Return what is tuned: all quantized layers but those of the temporal block, which have their features
    to keep.
    """
    kept = maintained(job, work)
    layers = {
        name: layer
        for name, layer in calibrated_layers(job.denoiser.module).items()
        if name not in kept and layer.weight_precision == "quantized"
    }
    (inputs,) = predictions.inputs(predictions.rows[len(predictions.rows) // 2 :][:1])
    return Tunable(layers, output_sizes(layers, partial(predictions.predicted, inputs)))


def tune(job: Job, work: Work) -> None:
    """Tune scales and biases for as many iterations as the recipe says and memory and time allow; leave them
    as they were where held-out samples do not gain.
    """
    predictions = _Predictions(job, work)
    tunable = _tunable(job, work, predictions)
    iterations, together = Kept("tuning_plan", partial(_planned, predictions, tunable), _plan)(job, work)
    if not iterations:
        return
    learned, held_out = predictions.split()
    place = tunable.start()
    with job.progress("tuning: scales and biases", iterations) as advance:
        for start in range(0, iterations, ROUND):
            name, steps = f"tuning_{start:05d}", min(ROUND, iterations - start)
            draws = _draws(job, name, learned, steps)
            batches = [partial(predictions.losses, rows, together) for rows in draws]
            skipped = job.has(name)
            place = Kept(name, partial(_went_on, tunable, place, batches, iterations, advance), _place)(
                job, work
            )
            advance(steps if skipped else 0)
    judge = partial(_judged, tunable, place, partial(predictions.relative_error, held_out, together))
    before, after = Kept("tuning", judge, _errors)(job, work)
    work.tuning = TuningReport(iterations, before, after if isfinite(after) else None)
    if work.tuning.fell:
        tunable.move(place)


def _draws(job: Job, name: str, rows: Sequence[SampleOfCall], steps: int) -> list[list[SampleOfCall]]:
    """Return the samples of each of so many steps."""
    generator = torch.Generator().manual_seed(job.seed_of(name))
    size = job.recipe.tuning.batch_size
    drawn = torch.randint(len(rows), (steps, size), generator=generator)
    return [[rows[number] for number in some] for some in drawn.tolist()]


def _went_on(
    tunable: Tunable,
    place: Place,
    batches: Sequence[Callable[[], list[Loss]]],
    total: int,
    advance: Advance,
    job: Job,
    work: Work,
) -> Tensors:
    return descend(tunable, place, job.recipe.tuning, batches, total=total, advance=advance).tensors()


def _place(job: Job, work: Work, found: Tensors) -> Place:
    return place_of(found)


def _judged(tunable: Tunable, place: Place, error: Callable[[], float], job: Job, work: Work) -> Tensors:
    """Return the error on held-out samples before and after."""
    before = error()
    with torch.no_grad(), tunable.moved(place.scales, place.shifts):
        after = error()
    return {
        name: torch.tensor(value, dtype=torch.float64)
        for name, value in (("before", before), ("after", after))
    }


def _errors(job: Job, work: Work, found: Tensors) -> tuple[float, float]:
    return float(found["before"]), float(found["after"])


def _planned(predictions: _Predictions, tunable: Tunable, job: Job, work: Work) -> Tensors:
    """Return the iterations, and how many samples are computed together by what one keeps for a gradient."""
    config = job.recipe.tuning
    place, row = tunable.start(), predictions.rows[len(predictions.rows) // 2]
    scales, shifts = (values.requires_grad_() for values in (place.scales, place.shifts))

    def gradient(count: int) -> None:
        for loss in predictions.losses([row] * count, count):
            with torch.enable_grad(), tunable.moved(scales, shifts):
                loss().backward()

    iterations, together = 0, 1
    try:
        each = saved_bytes(partial(gradient, 1), most=_room(job))
        together = max(1, min(config.batch_size, _together(job) // max(1, each)))
        _, seconds = timed(partial(gradient, together))
    except RuntimeError as error:  # So fails an operation without a gradient, and a device without memory.
        warnings.warn(f"scales and biases are not tuned: {cut(str(error), LONGEST)}", stacklevel=2)
    else:
        seconds *= config.batch_size / together
        iterations = _affordable(job, seconds)
        if iterations and job.foretold is not None:
            job.foretold(seconds * iterations, "tuning")
    return {"iterations": torch.tensor(iterations), "together": torch.tensor(together)}


def _plan(job: Job, work: Work, found: Tensors) -> tuple[int, int]:
    return int(found["iterations"]), int(found["together"])


def _room(job: Job) -> int | None:
    """Return the bytes that a gradient may keep; None where nobody knows."""
    limit = job.resources.max_memory
    return free_bytes() if limit is None else int((1 - CAPTURED) * limit)


def _together(job: Job) -> int:
    """Return the bytes that the gradient of samples together may keep. What is free just now has no say:
    sums of other parts differ in the last bits.
    """
    limit = job.resources.max_memory
    return TOGETHER if limit is None else min(TOGETHER, int((1 - CAPTURED) * limit))


def _affordable(job: Job, seconds: float) -> int:
    """Return for how many iterations of so many `seconds` there is time."""
    budget, most = job.resources.time_budget, job.recipe.tuning.iterations
    return most if budget is None else max(0, min(most, int((budget - job.elapsed()) / seconds)))


TUNING = Where(lambda job, work: job.recipe.tuning.iterations, tune)
