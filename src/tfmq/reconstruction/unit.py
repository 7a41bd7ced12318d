"""Reconstruct one unit: roundings that make its output that of the full-precision model."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tfmq.calibration.capture import Keep, UnitCalls, capture, capture_inputs
from tfmq.calibration.replay import Upstream
from tfmq.calibration.spool import Spool
from tfmq.models.denoiser import Denoiser, Inputs, output_tensors
from tfmq.nn.layer import CalibratedLayer
from tfmq.nn.swap import parts_of, precision
from tfmq.nn.temporal import without_tables
from tfmq.numerics.trees import tensors_in
from tfmq.progress import Advance
from tfmq.quantizers.steps import StepContext
from tfmq.reconstruction.learning import Learning
from tfmq.reconstruction.solvers import SOLVERS, Rounding, Samples, UnitInputs, UnitProblem
from tfmq.reconstruction.units import Unit


@dataclass(frozen=True)
class UnitReport:
    """Mean squared error of a unit's outputs with the nearest and with the found codes, the learning steps
    taken, and the time it took.

    A unit that was left with its nearest codes unseen, as the recipe says or for want of time, has no errors.
    """

    name: str
    error_before: float | None
    error_after: float | None
    iterations: int
    seconds: float


def unseen(name: str) -> UnitReport:
    """Return the report of a unit that was left with its nearest codes."""
    return UnitReport(name, None, None, 0, 0.0)


@dataclass(frozen=True)
class Feed:
    """What units learn from.

    Attributes:
        batches: calls of the denoiser.
        upstream: holds the units that are done.
        steps: gives each sample its own timestep.
        spool: keeps the calls of a unit; by default in memory.
    """

    batches: Iterable[Inputs]
    upstream: Upstream
    steps: StepContext
    spool: Spool | None = None


def learned(layers: Mapping[str, CalibratedLayer]) -> dict[str, Tensor]:
    """Return a copy of what reconstruction sets in `layers`."""
    return {
        f"{name}.{key}": tensor.clone()
        for name, layer in layers.items()
        for key, tensor in layer.learned().items()
    }


def restore(layers: Mapping[str, CalibratedLayer], tensors: Mapping[str, Tensor]) -> None:
    """Set in `layers` what `learned` returned."""
    for name, layer in layers.items():
        layer.restore({key: tensors[f"{name}.{key}"] for key in layer.learned()})


def squared_error(output: Tensor, target: Tensor) -> Tensor:
    """Return the squared error, summed over channels (the last axis of tokens `[B, N, C]`, else axis 1) and
    averaged over the rest.
    """
    return (output - target).square().sum(dim=-1 if output.ndim == 3 else 1).mean()


def capture_unit(
    denoiser: Denoiser,
    unit: nn.Module,
    feed: Feed,
    *,
    inputs: UnitInputs = "quantized",
    full_inputs: bool = True,
    keep: Keep | None = None,
) -> tuple[UnitCalls, UnitCalls]:
    """Return the unit's calls in the full-precision network, and those with the same outputs whose inputs are
    as `inputs` says.

    The former come without their inputs, unless `full_inputs` are asked for. `keep` gets the outputs in full
    precision.
    """
    batches, upstream, spool = feed.batches, feed.upstream, feed.spool
    with full_precision(denoiser.module):
        full = capture(
            denoiser,
            unit,
            batches,
            around=upstream.around("full"),
            inputs=full_inputs or inputs == "full",
            spool=spool,
            keep=keep,
        )
    calls = full
    if inputs != "full":
        frames = full.outputs[0].shape[0] // len(full)
        read = capture_inputs(
            denoiser, unit, batches, frames=frames, around=upstream.around("quantized"), spool=spool
        )
        calls = replace(read, outputs=full.outputs)
    if (_undefined(full) or _undefined(calls)) and upstream.revive():
        return capture_unit(denoiser, unit, feed, inputs=inputs, full_inputs=full_inputs, keep=keep)
    return full, calls


def _undefined(calls: UnitCalls) -> bool:
    """Whether the first sample holds a NaN: what stands for outputs that nobody reads."""
    first = calls.rows(torch.zeros(1, dtype=torch.int64))
    tensors = tensors_in((first.args, first.kwargs, first.outputs))
    return any(bool(tensor.isnan().any()) for tensor in tensors if tensor.is_floating_point())


@contextmanager
def full_precision(module: nn.Module) -> Iterator[None]:
    """Let `module` compute in full precision for a while, temporal features included."""
    with precision(module, weights="full", inputs="full"), without_tables(module):
        yield


def _output_error(output: Any, targets: Sequence[Tensor]) -> Tensor:
    return torch.stack(
        [squared_error(one, target) for one, target in zip(output_tensors(output), targets, strict=True)]
    ).sum()


def _unit_loss(unit: nn.Module, steps: StepContext) -> Callable[[UnitCalls], Tensor]:
    def loss(batch: UnitCalls) -> Tensor:
        with steps.at(batch.timestep):
            return _output_error(unit(*batch.args, **batch.kwargs), batch.outputs)

    return loss


@torch.no_grad()
def _mean_error(loss: Callable[[UnitCalls], Tensor], calls: UnitCalls, parts: Sequence[Tensor]) -> float:
    return sum(float(loss(calls.rows(part))) * len(part) for part in parts) / sum(len(part) for part in parts)


@torch.no_grad()
def _handed_on(unit: nn.Module, feed: Feed, calls: UnitCalls, keep: Keep) -> float:
    """Return the mean error of a unit's outputs, call by call of the denoiser, which `keep` gets: the next
    unit starts from them.
    """
    error, done = 0.0, 0
    for number, batch in enumerate(feed.batches):
        rows = calls.rows(torch.arange(done, done + len(batch)))
        with feed.steps.at(rows.timestep):
            output = unit(*rows.args, **rows.kwargs)
        keep(number, output)
        error += float(_output_error(output, rows.outputs)) * len(batch)
        done += len(batch)
    return error / done


class _FirstErrors:
    """The error of each batch when it first ran.

    A solver in closed form looks at all batches before it rounds anything, so that these are the errors of
    the nearest codes: one run less.
    """

    def __init__(self, parts: Sequence[Tensor]) -> None:
        self.parts = parts
        self.found: dict[int, float] = {}

    def see(self, part: Tensor, error: Tensor) -> None:
        """Keep the error of a batch the first time that it is seen."""
        self.found.setdefault(int(part[0]), float(error))

    def mean(self) -> float | None:
        """Return the mean over samples; None where not all of them ran."""
        if len(self.found) < len(self.parts):
            return None
        return sum(self.found[int(part[0])] * len(part) for part in self.parts) / sum(
            len(part) for part in self.parts
        )


def _split(count: int, share: float) -> tuple[Tensor, Tensor]:
    """Return the samples to learn on and those held out: evenly spaced ones, which are of all images and
    timesteps.
    """
    held_out = torch.arange(int(share * count)) * count // max(1, int(share * count))
    seen = torch.ones(count, dtype=torch.bool)
    seen[held_out] = False
    return seen.nonzero().flatten(), held_out


def reconstruct_unit(
    denoiser: Denoiser,
    unit: Unit,
    feed: Feed,
    rounding: Rounding,
    learning: Learning,
    *,
    seed: int,
    advance: Advance,
) -> UnitReport:
    """Find the roundings of `unit` on what it is fed with the solver of `rounding`, and leave it quantized.

    The layers of the unit end with quantized weights and, where they have a quantizer for them, quantized
    inputs. What ends with more error than the nearest codes gives way to them.
    """
    began, solver = time.perf_counter(), SOLVERS[rounding.solver]
    module = denoiser.module.get_submodule(unit.name)
    reads: dict[str, Any] = {"inputs": rounding.inputs, "full_inputs": solver.runs_full}
    upstream = feed.upstream
    full, calls = capture_unit(denoiser, module, feed, **reads, keep=upstream.keeper("full", unit.name))
    settle(module)
    loss = _unit_loss(module, feed.steps)
    layers: dict[str, CalibratedLayer] = {name: denoiser.module.get_submodule(name) for name in unit.layers}  # type: ignore[misc]
    parts = torch.arange(len(calls)).split(learning.batch_size)
    seen, held_out = _split(len(calls), learning.held_out)

    first = _FirstErrors(parts)

    def run(part: Tensor) -> None:
        first.see(part, loss(calls.rows(part)))

    def run_full(part: Tensor) -> None:
        rows = full.rows(part)
        with full_precision(module), feed.steps.at(rows.timestep):
            module(*rows.args, **rows.kwargs)

    def drawn(generator: torch.Generator) -> Tensor:
        index = torch.randint(len(seen), (learning.batch_size,), generator=generator)
        return loss(calls.rows(seen[index]))

    def judge() -> float:
        return _mean_error(loss, calls, held_out.split(learning.batch_size))

    nearest = learned(layers)
    samples = Samples(parts, run_full, run, drawn, judge if len(held_out) else None)
    problem = UnitProblem(layers, samples, learning, advance, feed.spool)
    iterations = solver.solve(problem, rounding, seed)
    keep = upstream.keeper("quantized", unit.name) if rounding.inputs == "quantized" else None
    after = _mean_error(loss, calls, parts) if keep is None else _handed_on(module, feed, calls, keep)
    before, solved = first.mean(), learned(layers)
    if before is None:
        restore(layers, nearest)
        before = _mean_error(loss, calls, parts)
        restore(layers, solved)
    if not after <= before:
        restore(layers, nearest)
        upstream.discard("quantized", unit.name)
        after = before
    return UnitReport(unit.name, before, after, iterations, time.perf_counter() - began)


def settle(module: nn.Module) -> None:
    """Make all that is calibrated in `module` compute with quantized weights and inputs from now on."""
    for child in parts_of(module):
        child.choose(weights="quantized", inputs="quantized")
