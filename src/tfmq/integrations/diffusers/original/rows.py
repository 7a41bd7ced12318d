"""Where the rows of an original checkpoint's tensors are in a diffusers model, in both directions."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """One tensor of the original: its rows are those of `parts` of the diffusers model, one after the other.

    With `swapped` the two halves of its rows stand the other way around: the originals shift before they
    scale where diffusers' norms scale before they shift. Whatever has a row for each of a weight's, such as
    its scales, is cut and joined alike.
    """

    original: str
    parts: tuple[str, ...]
    swapped: bool = False


def _swapped(tensor: Tensor) -> Tensor:
    first, second = tensor.chunk(2)
    return torch.cat([second, first])


def from_original(
    tensors: Mapping[str, Tensor], table: Iterable[Rows], lengths: Mapping[str, int]
) -> dict[str, Tensor]:
    """Return the tensors by the names of the diffusers model; those that `tensors` lacks are left out.

    Args:
        tensors: the tensors by their original names, of any dtype.
        table: one entry for each original tensor.
        lengths: the rows of each tensor of the diffusers model.

    Raises:
        ValueError: a tensor has another number of rows than its parts; names it.
    """
    found: dict[str, Tensor] = {}
    for entry in table:
        if (tensor := tensors.get(entry.original)) is None:
            continue
        tensor = _swapped(tensor) if entry.swapped and tensor.ndim else tensor
        if len(entry.parts) == 1:
            found[entry.parts[0]] = tensor
            continue
        sizes = [lengths[part] for part in entry.parts]
        if tensor.ndim == 0 or len(tensor) != sum(sizes):
            raise ValueError(
                f"{entry.original} is {list(tensor.shape)}; {', '.join(entry.parts)} have {sum(sizes)} rows"
            )
        found |= zip(entry.parts, tensor.split(sizes), strict=True)
    return found


def to_original(tensors: Mapping[str, Tensor], table: Iterable[Rows]) -> dict[str, Tensor]:
    """Return the tensors by their original names; one of which `tensors` lacks a part is left out."""
    joined = {
        entry: torch.cat([tensors[part] for part in entry.parts])
        if len(entry.parts) > 1
        else tensors[entry.parts[0]]
        for entry in table
        if all(part in tensors for part in entry.parts)
    }
    return {entry.original: _swapped(tensor) if entry.swapped else tensor for entry, tensor in joined.items()}
