"""What a captured graph is specific to."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten_with_path, tree_leaves

from tfmq.numerics.trees import map_tensors

# Stands in the place of a tensor among the constants of a signature.
TENSOR = "<tensor>"


def _name(path: tuple[Any, ...]) -> str:
    return ".".join(str(getattr(key, "key", getattr(key, "idx", ""))) for key in path)


@dataclass(frozen=True)
class Signature:
    """What a graph is specific to: the structure of the arguments, their values that are no tensors, and
    dtype and shape of the tensors.

    `batched` says of each tensor whether its first axis is the batch, which is left out of its `shape`.
    `names` are paths in the arguments, `timestep` the position of the timesteps among the tensors, None
    where there are none.
    """

    structure: TreeSpec
    constants: tuple[Any, ...]
    dtypes: tuple[torch.dtype, ...]
    shapes: tuple[tuple[int, ...], ...]
    batched: tuple[bool, ...]
    names: tuple[str, ...]
    timestep: int | None

    @classmethod
    def of(
        cls, tree: Mapping[str, Any], tensors: Sequence[Tensor], *, batch: int, timestep: str | None
    ) -> "Signature":
        """Return the signature of the arguments `tree` with these `tensors`; `timestep` may name one."""
        paths, structure = tree_flatten_with_path(dict(tree))
        tensor_paths = [path for path, leaf in paths if isinstance(leaf, Tensor)]
        names = tuple(map(_name, tensor_paths))
        batched = tuple(tensor.ndim > 0 and tensor.shape[0] == batch for tensor in tensors)
        return cls(
            structure,
            tuple(tree_leaves(map_tensors(lambda _: TENSOR, tree))),
            tuple(tensor.dtype for tensor in tensors),
            tuple(tuple(t.shape[1:] if b else t.shape) for t, b in zip(tensors, batched, strict=True)),
            batched,
            names,
            None if timestep is None else names.index(timestep),
        )

    @property
    def key(self) -> str:
        """A text that is equal for equal signatures, in any process."""
        return repr((str(self.structure), self.constants, self.dtypes, self.shapes, self.batched))
