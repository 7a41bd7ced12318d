"""The inputs and outputs of one unit over a set of denoiser calls."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten

from tfmq.calibration.spool import Column, Spool
from tfmq.models.denoiser import Denoiser, Inputs, output_tensors
from tfmq.nn.watch import ModuleCall, watched

# Takes the number of a batch and returns the context in which its call runs.
Around = Callable[[int], AbstractContextManager[None]]
# Takes the number and the inputs of a batch, then the arguments and the output that the unit had in its call.
See = Callable[[int, Inputs, Any, Any, Any], None]
# Takes the number of a batch and the output that the unit had in its call.
Keep = Callable[[int, Any], None]


@dataclass(frozen=True)
class UnitCalls:
    """Calls of a unit: `args` and `kwargs` trees with `[N, ...]` tensors, `timestep` `[N]`, `outputs` each
    `[N, ...]`, for `N` samples.

    Tensors of a `capture` are columns of its spool; `rows` returns tensors.

    Where a video model folds frames into the batch axis, tensors have a row for each frame, `[N * F, ...]`,
    sample by sample; the frames of a sample stay together.
    """

    args: Any
    kwargs: Any
    timestep: Tensor
    outputs: tuple[Any, ...]

    def __len__(self) -> int:
        return self.timestep.shape[0]

    def rows(self, index: Tensor) -> "UnitCalls":
        """Return the samples `index`."""
        frames = self.outputs[0].shape[0] // len(self)
        folded = (index[:, None] * frames + torch.arange(frames, device=index.device)).flatten()

        def pick(value: Any) -> Any:
            if (
                not isinstance(value, Tensor | Column)
                or not value.shape
                or value.shape[0] not in (len(self), len(self) * frames)
            ):
                return value
            return value[index if value.shape[0] == len(self) else folded]

        return UnitCalls(
            *(tree_map(pick, part) for part in (self.args, self.kwargs, self.timestep, self.outputs))
        )


class _Reached(Exception):
    """Ends a denoiser call once the unit has run."""


class _Leaves:
    """The leaves at one place of the trees of all calls: joined where all have the batch axis of samples or
    of rows, else the first of them.
    """

    def __init__(self, spool: Spool) -> None:
        self.spool = spool
        self.first: Any = None
        self.column: Column | None = None
        self.split = True

    def add(self, leaf: Any, samples: int, rows: int, *, first: bool) -> None:
        """Take the leaf of a call of `samples` samples, whose outputs have `rows` rows."""
        leaf = leaf.detach().clone() if isinstance(leaf, Tensor) else leaf
        batched = isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] in (samples, rows)
        if first:
            self.split, self.first = batched, None if batched else leaf
        if self.split and not batched and self.column is not None:
            self.split, self.first, self.column = False, self.column.batch(0), None
        if self.split:
            self.column = self.column or self.spool.column(leaf)
            self.column.add(leaf)

    def joined(self) -> Any:
        """Return what all calls had here as a column, or the one value that stands for all."""
        return self.first if self.column is None else self.column


class _Calls:
    """Gathers what goes in and out of a unit, call by call."""

    def __init__(self, spool: Spool) -> None:
        self.spool = spool
        self.timesteps: list[Tensor] = []
        self.spec: TreeSpec | None = None
        self.leaves: list[_Leaves] = []

    def add(
        self, args: Any, kwargs: Any, outputs: tuple[Tensor, ...], timestep: Tensor, *, rows: int
    ) -> None:
        """Take a call whose outputs have, or would have, so many `rows`."""
        leaves, spec = tree_flatten((args, kwargs, outputs))
        if self.spec is None:
            self.spec, self.leaves = spec, [_Leaves(self.spool) for _ in leaves]
        for place, leaf in zip(self.leaves, leaves, strict=True):
            place.add(leaf, len(timestep), rows, first=not self.timesteps)
        self.timesteps.append(timestep)

    def joined(self) -> UnitCalls:
        """Return all calls as one; a `ValueError` where there was none."""
        if self.spec is None:
            raise ValueError("the unit was never called by the denoiser; exclude its layers with a rule")
        args, kwargs, outputs = tree_unflatten([place.joined() for place in self.leaves], self.spec)
        return UnitCalls(args, kwargs, torch.cat(self.timesteps), outputs)


def alone(batch: int) -> AbstractContextManager[None]:
    """Return a context without effect."""
    return nullcontext()


@torch.no_grad()
def run_to(
    denoiser: Denoiser,
    unit: nn.Module,
    batches: Iterable[Inputs],
    see: See,
    *,
    around: Around = alone,
    through: bool = True,
) -> None:
    """Run `denoiser` over `batches` as far as `unit`, and hand over what goes in and out of it.

    `see(number, inputs, args, kwargs, output)` is called for each batch, by its number, that reaches the
    unit. The call of batch `n` runs inside of the context `around(n)`. Unless it goes `through` the unit,
    that does not run, and `output` is None.
    """
    running: list[tuple[int, Inputs]] = []

    def reach(call: ModuleCall) -> None:
        see(*running[-1], call.args, call.kwargs, call.output)
        raise _Reached

    with watched(unit, after=reach) if through else watched(unit, before=reach):
        for number, batch in enumerate(batches):
            running[:] = [(number, batch)]
            with around(number), suppress(_Reached):
                denoiser(batch)


def capture(
    denoiser: Denoiser,
    unit: nn.Module,
    batches: Iterable[Inputs],
    *,
    around: Around = alone,
    inputs: bool = True,
    spool: Spool | None = None,
    keep: Keep | None = None,
) -> UnitCalls:
    """Run `denoiser` over `batches` as far as `unit` and return what went in and out of it, or only its
    outputs without `inputs`.

    See `run_to` for `around`. What is captured is kept in `spool`, by default in memory; `keep(number,
    output)` gets each output as it is.

    Raises:
        ValueError: the unit was never called.
    """
    calls = _Calls(spool or Spool())

    def see(number: int, batch: Inputs, args: Any, kwargs: Any, output: Any) -> None:
        if keep is not None:
            keep(number, output)
        outputs = output_tensors(output)
        args, kwargs = (args, kwargs) if inputs else ((), {})
        calls.add(args, kwargs, outputs, batch.timestep, rows=outputs[0].shape[0])

    run_to(denoiser, unit, batches, see, around=around)
    return calls.joined()


def capture_inputs(
    denoiser: Denoiser,
    unit: nn.Module,
    batches: Iterable[Inputs],
    *,
    frames: int,
    around: Around = alone,
    spool: Spool | None = None,
) -> UnitCalls:
    """Return what goes into `unit`, which itself does not run: a row of each sample, or `frames` rows, as its
    outputs have.

    Raises:
        ValueError: the unit was never called.
    """
    calls = _Calls(spool or Spool())

    def see(_: int, batch: Inputs, args: Any, kwargs: Any, __: Any) -> None:
        calls.add(args, kwargs, (), batch.timestep, rows=len(batch.timestep) * frames)

    run_to(denoiser, unit, batches, see, around=around, through=False)
    return calls.joined()
