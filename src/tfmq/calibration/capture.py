"""The inputs and outputs of one unit over a set of denoiser calls."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from tfmq.models.denoiser import Denoiser, Inputs, output_tensors

# Gives the context in which the call of a batch runs, by the number of the batch.
Around = Callable[[int], AbstractContextManager[None]]


@dataclass(frozen=True)
class UnitCalls:
    """Calls of a unit: `args` and `kwargs` trees with `[N, ...]` tensors, `timestep` `[N]`, `outputs` each `[N, ...]`, for `N` samples.

    Where a video model folds frames into the batch axis, tensors have a row for each frame, `[N * F, ...]`, sample by sample; the frames of a
    sample stay together.
    """

    args: Any
    kwargs: Any
    timestep: Tensor
    outputs: tuple[Tensor, ...]

    def __len__(self) -> int:
        return self.timestep.shape[0]

    def rows(self, index: Tensor) -> "UnitCalls":
        """Return the samples `index`."""
        frames = self.outputs[0].shape[0] // len(self)
        folded = (index[:, None] * frames + torch.arange(frames, device=index.device)).flatten()

        def pick(value: Any) -> Any:
            if not isinstance(value, Tensor) or not value.ndim or value.shape[0] not in (len(self), len(self) * frames):
                return value
            return value[index if value.shape[0] == len(self) else folded]

        return UnitCalls(*(tree_map(pick, part) for part in (self.args, self.kwargs, self.timestep, self.outputs)))


class _Reached(Exception):
    """Ends a denoiser call once the unit has run."""


def _joined(trees: list[Any], samples: list[int], rows: list[int]) -> Any:
    """Concatenate trees leaf by leaf along the batch axis of samples or of rows; leaves without one are taken from the first."""
    flat = [tree_flatten(tree) for tree in trees]
    leaves = []
    for column in zip(*(leaves for leaves, _ in flat), strict=True):
        lengths = [leaf.shape[0] if isinstance(leaf, Tensor) and leaf.ndim else None for leaf in column]
        leaves.append(torch.cat(column) if lengths in (samples, rows) else column[0])
    return tree_unflatten(leaves, flat[0][1])


def alone(batch: int) -> AbstractContextManager[None]:
    """Return a context without effect."""
    return nullcontext()


@torch.no_grad()
def capture(denoiser: Denoiser, unit: nn.Module, batches: Iterable[Inputs], *, around: Around = alone, inputs: bool = True) -> UnitCalls:
    """Run `denoiser` over `batches` as far as `unit` and return what went in and out of it, or without `inputs` only the latter.

    The call of batch `n` runs inside of the context `around(n)`.

    Raises:
        ValueError: the unit was never called.
    """
    calls: list[tuple[Any, Any, tuple[Tensor, ...]]] = []

    def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        kept = (args, kwargs) if inputs else ((), {})
        detached = tree_map(lambda v: v.detach().clone() if isinstance(v, Tensor) else v, kept)
        calls.append((*detached, tuple(tensor.detach().clone() for tensor in output_tensors(output))))
        raise _Reached

    timesteps = []
    handle = unit.register_forward_hook(hook, with_kwargs=True)
    try:
        for number, batch in enumerate(batches):
            with around(number):
                try:
                    denoiser(batch)
                except _Reached:
                    timesteps.append(batch.timestep)
    finally:
        handle.remove()
    if not calls:
        raise ValueError("the unit was never called by the denoiser; exclude its layers with a rule")
    samples, rows = [len(timestep) for timestep in timesteps], [call[2][0].shape[0] for call in calls]
    return UnitCalls(
        _joined([call[0] for call in calls], samples, rows),
        _joined([call[1] for call in calls], samples, rows),
        torch.cat(timesteps),
        tuple(torch.cat(column) for column in zip(*(call[2] for call in calls), strict=True)),
    )
