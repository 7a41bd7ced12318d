"""One call of a denoiser as a graph: captured by `torch.export` with its step bins as an input, so that nothing in it branches on values."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_flatten_with_path, tree_unflatten

from tfmq.export.quiet import quiet_tools
from tfmq.nn.swap import STEPS, TIMESTEP, plain_forward

# Stands for a tensor among the constants of a signature.
TENSOR = "<tensor>"


@dataclass(frozen=True)
class Signature:
    """What a graph is specific to: the structure of the arguments, their values that are no tensors, and dtype and shape of the tensors.

    `batched` says of each tensor whether its first axis is the batch, which is left out of its `shape`. `names` are paths in the arguments,
    `timestep` the position of the timesteps among the tensors.
    """

    structure: TreeSpec
    constants: tuple[Any, ...]
    dtypes: tuple[torch.dtype, ...]
    shapes: tuple[tuple[int, ...], ...]
    batched: tuple[bool, ...]
    names: tuple[str, ...]
    timestep: int

    @property
    def key(self) -> str:
        """A text that is equal for equal signatures, in any process."""
        return repr((str(self.structure), self.constants, self.dtypes, self.shapes, self.batched))


@dataclass(frozen=True)
class Call:
    """The arguments of one denoiser call: its signature and its tensors, the timesteps `[B]` among them."""

    signature: Signature
    tensors: tuple[Tensor, ...]
    batch: int

    @classmethod
    def of(cls, module: nn.Module, arguments: Mapping[str, Any]) -> "Call":
        """Take the arguments of a call apart; one timestep for the batch is repeated for each sample.

        The batch is the first axis of the first tensor that has several axes: the sample.
        """
        name = getattr(module, TIMESTEP)
        batch, device = next((leaf.shape[0], leaf.device) for leaf in tree_flatten(dict(arguments))[0] if isinstance(leaf, Tensor) and leaf.ndim > 1)
        timestep = torch.as_tensor(arguments[name], device=device).flatten()
        paths, structure = tree_flatten_with_path({**arguments, name: timestep.expand(batch)})
        leaves = [leaf for _, leaf in paths]
        names = tuple(".".join(str(getattr(key, "key", getattr(key, "idx", ""))) for key in path) for path, leaf in paths if isinstance(leaf, Tensor))
        tensors = tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))
        constants = tuple(TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        batched = tuple(tensor.ndim > 0 and tensor.shape[0] == batch for tensor in tensors)
        shapes = tuple(tuple(t.shape[1:] if b else t.shape) for t, b in zip(tensors, batched, strict=True))
        return cls(Signature(structure, constants, tuple(t.dtype for t in tensors), shapes, batched, names, names.index(name)), tensors, batch)

    def resized(self, batch: int) -> tuple[Tensor, ...]:
        """Return the tensors with the first sample repeated `batch` times."""
        pairs = zip(self.tensors, self.signature.batched, strict=True)
        return tuple(tensor[:1].expand(batch, *tensor.shape[1:]).clone() if batched else tensor for tensor, batched in pairs)


class Graph(nn.Module):
    """A denoiser as a function `(bins [B], *tensors) -> tensors`."""

    def __init__(self, module: nn.Module, signature: Signature) -> None:
        super().__init__()
        self.module = module
        self.signature = signature

    def output(self, bins: Tensor, tensors: Sequence[Tensor]) -> Any:
        """Return what the denoiser returns, in its own structure."""
        given = iter(tensors)
        leaves = [next(given) if constant is TENSOR else constant for constant in self.signature.constants]
        with getattr(self.module, STEPS).at_bins(bins):
            return plain_forward(self.module, tree_unflatten(leaves, self.signature.structure))

    def forward(self, bins: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tree_flatten(self.output(bins, tensors))[0])


class KeyedGraph(Graph):
    """A denoiser as a function `tensors -> tensors` that finds the bins from the timesteps itself: nearest calibrated one, tables included."""

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        steps = getattr(self.module, STEPS)
        timestep = tensors[self.signature.timestep].to(torch.float32)
        edges = (steps.timesteps[1:] + steps.timesteps[:-1]) / 2
        # What `torch.bucketize` counts, in operators that every engine has.
        bins = (edges[None] < timestep[:, None]).to(torch.long).sum(dim=1)
        return tuple(tree_flatten(self.output(bins, tensors))[0])


@torch.no_grad()
def capture(graph: Graph, call: Call, *, dynamic: bool) -> torch.export.ExportedProgram:
    """Return the graph of `call`, for its batch or with `dynamic` for any."""
    batch = max(2, call.batch) if dynamic else call.batch
    tensors = call.resized(batch) if dynamic else call.tensors
    axes: tuple[Any, ...] = tuple({0: torch.export.Dim.AUTO} if varies else None for varies in call.signature.batched)
    shapes: tuple[Any, ...]
    if isinstance(graph, KeyedGraph):
        arguments, shapes = tensors, (axes,)
    else:
        bins = torch.zeros(batch, dtype=torch.long, device=tensors[0].device)
        arguments, shapes = (bins, *tensors), ({0: torch.export.Dim.AUTO}, axes)
    graph(*arguments)  # Kernels make their constants.
    with quiet_tools():
        return torch.export.export(graph, arguments, dynamic_shapes=shapes if dynamic else None, strict=False)
