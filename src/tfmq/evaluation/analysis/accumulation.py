"""How errors of single predictions add up to the error of the image.

Samplers of diffusion models are linear in the state and in what the model predicts (DDIM, Song et al., 2021,
equation 12; Euler, Karras et al., 2022, algorithm 1; DPM-Solver++, Lu et al., 2022, algorithm 2). So an error
of one prediction moves the final state by itself times a number that the schedule alone decides, its
influence; and the errors of all steps, each times its influence, add up to the error of the final state, as
far as the model predicts alike on a state that is a little off.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from tfmq.models.sampler import Sampler

# Size of the impulse that a scheduler is probed with: so small that no clipping sees it.
IMPULSE = 1e-3


@dataclass(frozen=True)
class Step:
    """What a scheduler was given at one step, a prediction with all guidance in it and a state, `[N, ...]`,
    and the state that it made of them.
    """

    timestep: float
    prediction: Tensor
    state: Tensor
    after: Tensor


@dataclass(frozen=True)
class Accumulation:
    """Errors of the predictions of a quantized model on full-precision states, by step from noise to image.

    Attributes:
        timesteps: the timestep of each step.
        influence: how much an error of this step's prediction moves the final state.
        error: the prediction's error relative to the prediction, as the mean over images.
        bias: share of its squared error that is a constant of each channel, the same in all images and
            places.
        gain: share that is a multiple of the prediction, the same in all images.
        correlation: correlation of the error with the error of the step before; None at the first step.
        predicted: relative error of the final state from the steps up to this one, by their influence, with
            signs.
        random: the same if errors of steps had nothing in common.
        measured: relative error of the final state, by drawing.
    """

    timesteps: tuple[float, ...]
    influence: tuple[float, ...]
    error: tuple[float, ...]
    bias: tuple[float, ...]
    gain: tuple[float, ...]
    correlation: tuple[float | None, ...]
    predicted: tuple[float, ...]
    random: tuple[float, ...]
    measured: float

    def values(self) -> dict[str, Any]:
        """Return the fields as values that JSON keeps."""
        return {
            name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()
        }


def scheduler_of(sampler: Sampler) -> Any | None:
    """Return the scheduler that a sampler steps with; None where it has none of diffusers' kind."""
    found = getattr(getattr(sampler, "pipeline", sampler), "scheduler", None)
    return found if all(hasattr(found, name) for name in ("step", "set_timesteps")) else None


@contextmanager
def stepping(scheduler: Any, change: Callable[[Step], Tensor]) -> Iterator[None]:
    """Show `change` every step of `scheduler`, and let the sampler go on with the state that it returns."""
    original = scheduler.step

    def step(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        # A scheduler of several orders may keep what it is given, or write into it.
        prediction, state = model_output.detach().clone(), sample.detach().clone()
        result = original(model_output, timestep, sample, *args, **kwargs)
        after = result[0]
        changed = change(Step(float(timestep), prediction, state, after.detach().clone())).to(after)
        if isinstance(result, tuple):
            return (changed, *result[1:])
        result.prev_sample = changed
        return result

    scheduler.step = step
    try:
        yield
    finally:
        del scheduler.step


def influence(scheduler: Any, steps: int) -> Tensor:
    """Return by how much an error of each prediction moves the final state, float64 `[S]`: the scheduler's
    own response to impulses. `S` is the number of calls that it asks for, which may be more than `steps`.

    Noise that a scheduler adds is the same in every run and so falls out.
    """
    own = deepcopy(scheduler)
    own.set_timesteps(steps)
    calls = len(own.timesteps)
    # One row for each call's impulse, and one without any.
    impulses = IMPULSE * torch.eye(calls + 1, calls, dtype=torch.float64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        state = torch.zeros(calls + 1, 1, 1, 1, dtype=torch.float64)
        for number, timestep in enumerate(own.timesteps):
            impulse = impulses[:, number].reshape(-1, 1, 1, 1)
            state = own.step(impulse, timestep, state).prev_sample
    final = state.flatten()
    return (final[:-1] - final[-1]) / IMPULSE


@contextmanager
def walked(sampler: Sampler) -> Iterator[list[Step]]:
    """Collect the steps of a sampler while the context is open; none where it does not step with a scheduler
    of diffusers' kind.
    """
    found: list[Step] = []

    def keep(step: Step) -> Tensor:
        found.append(step)
        return step.after

    with ExitStack() as stack:
        if (scheduler := scheduler_of(sampler)) is not None:
            stack.enter_context(stepping(scheduler, keep))
        yield found


def _errors(
    quantized: Sampler, walk: Sequence[Step], indices: range, *, steps: int, seed: int
) -> list[Tensor]:
    """Return the error of each prediction on the states of a full-precision walk."""
    found: list[Tensor] = []

    def lead(step: Step) -> Tensor:
        expected = walk[len(found)]
        found.append((step.prediction - expected.prediction).double())
        return expected.after

    with stepping(scheduler_of(quantized), lead):
        quantized.run(indices, steps=steps, seed=seed)
    return found


def _ratio(part: float, whole: float) -> float:
    """Return a share of something, 0 of nothing."""
    return part / whole if whole else 0.0


def _share(part: Tensor, error: Tensor) -> float:
    return _ratio(float(part.square().sum()), float(error.square().sum()))


def _correlation(left: Tensor, right: Tensor) -> float:
    return _ratio(float((left * right).sum()), float(left.norm() * right.norm()))


@torch.no_grad()
def accumulation(
    walk: Sequence[Step], alone: Sequence[Step], scheduler: Any, errors: Sequence[Tensor], *, steps: int
) -> Accumulation:
    """Say what becomes of `errors`, those of each prediction on the states of the full-precision `walk` of so
    many `steps`; `alone` is the quantized model's own.
    """
    moved = influence(scheduler, steps)
    final = walk[-1].after.double()
    summed, squared, predicted, random = torch.zeros_like(final), torch.zeros((), dtype=torch.float64), [], []
    for weight, error in zip(moved, errors, strict=True):
        summed = summed + weight * error
        squared = squared + weight**2 * error.square().sum()
        predicted.append(float(summed.norm() / final.norm()))
        random.append(float(squared.sqrt() / final.norm()))
    predictions = [step.prediction.double() for step in walk]
    axes = [axis for axis in range(final.ndim) if axis != 1]
    gains = [
        _ratio(float((error * value).sum()), float(value.square().sum()))
        for error, value in zip(errors, predictions, strict=True)
    ]
    return Accumulation(
        tuple(step.timestep for step in walk),
        tuple(moved.tolist()),
        tuple(
            _ratio(float(error.norm()), float(value.norm()))
            for error, value in zip(errors, predictions, strict=True)
        ),
        tuple(_share(error.mean(axes, keepdim=True).expand_as(error), error) for error in errors),
        tuple(
            _share(gain * value, error) for gain, error, value in zip(gains, errors, predictions, strict=True)
        ),
        (None, *(_correlation(before, error) for before, error in pairwise(errors))),
        tuple(predicted),
        tuple(random),
        float((alone[-1].after.double() - final).norm() / final.norm()),
    )


def accumulated(
    quantized: Sampler,
    walks: tuple[Sequence[Step], Sequence[Step]],
    scheduler: Any,
    indices: range,
    *,
    steps: int,
    seed: int,
) -> Accumulation | None:
    """Let the quantized model predict on the states of the full-precision walk, the first of `walks`, and
    compare.

    The second is the quantized model's own walk from the same noise. None where a sampler does not step with
    a scheduler of diffusers' kind, or more often than it has states, as those of several orders do.
    """
    reference, alone = walks
    if not reference or len(alone) != len(reference) or len(scheduler.timesteps) != len(reference):
        return None
    errors = _errors(quantized, reference, indices, steps=steps, seed=seed)
    if any(error.shape != reference[0].after.shape for error in errors):
        return None
    return accumulation(reference, alone, scheduler, errors, steps=steps)


def added_in_words(found: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """Return what the values of an accumulation say, as names and texts."""
    if found is None:
        return []
    bias, gain = (100 * sum(found[name]) / len(found[name]) for name in ("bias", "gain"))
    alike = [value for value in found["correlation"] if value is not None]
    rows = [
        (
            "errors that repeat",
            (
                f"{bias:.0f} % of the squared error are a constant of each "
                f"channel, {gain:.0f} % a multiple of the prediction"
            ),
        )
    ]
    if alike:
        rows.append(("errors of consecutive steps", f"correlate {sum(alike) / len(alike):.2f} in the mean"))
    summed = (
        f"{found['predicted'][-1]:.3g} of the final state by their "
        f"influence, {found['random'][-1]:.3g} if independent"
    )
    return [*rows, ("errors of all steps", f"{summed}; {found['measured']:.3g} as drawn")]
