"""The conditions of images: what all share, and rows that images have in turn."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten_with_path, tree_unflatten

from tfmq.models.denoiser import Inputs
from tfmq.numerics.trees import map_tensors, tensors_in
from tfmq.storage.digest import tensor_digest


def check_rows(values: Mapping[str, Any]) -> None:
    """Refuse conditions of images in turn whose tensors do not go together.

    Raises:
        ValueError: a tensor has no rows, or two have different numbers above one: which row of one goes with
            which of the other nobody could say.
    """
    counts = {name: tensor.shape[0] if tensor.ndim else 0 for name, tensor in _tensors(values).items()}
    several = {name: count for name, count in counts.items() if count != 1}
    if 0 in several.values() or len(set(several.values())) > 1:
        listed = ", ".join(f"{name} has {count}" for name, count in several.items())
        raise ValueError(
            "conditions of images in turn are tensors with one row, or "
            f"all with the same number of rows; {listed}"
        )


def in_turn(values: Mapping[str, Any], indices: range) -> dict[str, Any]:
    """Return the conditions of the images `indices`: image `i` gets row `i % N` of a tensor with `N` rows;
    other values go to all images.
    """

    def chosen(tensor: Tensor) -> Tensor:
        return tensor[[index % len(tensor) for index in indices]]

    return {name: map_tensors(chosen, value) for name, value in values.items()}


def described(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return what identifies conditions, as JSON values: the names and a digest of the tensors, and all that
    is no tensor.
    """
    tensors = _tensors(values)
    others = {name: repr(leaf) for name, leaf in _leaves(values).items() if name not in tensors}
    return {"tensors": sorted(tensors), "digest": tensor_digest(tensors), "values": others}


def _leaves(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return every value by its path, such as `added_cond_kwargs.time_ids`."""
    return {_name(path): leaf for path, leaf in tree_flatten_with_path(dict(values))[0]}


def _tensors(values: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: leaf for name, leaf in _leaves(values).items() if isinstance(leaf, Tensor)}


def _name(path: tuple[Any, ...]) -> str:
    return ".".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path)


def in_one_call(first: Inputs, second: Inputs) -> Inputs:
    """Return one call that has the rows of `first` and then those of `second`.

    Raises:
        ValueError: the two differ in something that one call has but once.
    """
    leaves, tree = tree_flatten_with_path(dict(first.conditions))
    others, other_tree = tree_flatten_with_path(dict(second.conditions))
    if tree != other_tree:
        names = f"{', '.join(first.conditions)} and {', '.join(second.conditions)}"
        raise ValueError(f"one call has the same arguments in both halves, not {names}; use two calls")
    both = [_both(first, _name(path), a, b) for (path, a), (_, b) in zip(leaves, others, strict=True)]
    return Inputs(
        torch.cat([first.sample, second.sample]),
        torch.cat([first.timestep, second.timestep]),
        tree_unflatten(both, tree),
    )


def _both(call: Inputs, name: str, first: Any, second: Any) -> Any:
    tensors = len(tensors_in((first, second))) == 2
    if tensors and call.rows_each(first):
        if first.shape != second.shape:
            raise ValueError(
                f"one call has rows of one shape, and {name} has {list(first.shape[1:])} "
                f"and {list(second.shape[1:])}; use two calls"
            )
        return torch.cat([first, second])
    if not (torch.equal(first, second) if tensors else first == second):
        raise ValueError(
            f"one call has {name} but once, and it is not the same in both halves; use two calls"
        )
    return first
