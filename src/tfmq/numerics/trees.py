"""Trees of Python values, such as the arguments of a call, some of whose leaves are tensors."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

LEAVES = (type(None), bool, int, float, str)


def tensors_in(tree: Any) -> list[Tensor]:
    """Return the tensors among the leaves of a tree, in order.

    >>> tensors_in({"a": 1, "b": (None, "text")})
    []
    """
    found: list[Tensor] = []
    _gather(tree, found)
    return found


def _gather(tree: Any, found: list[Tensor]) -> None:
    # What calls are given, faster than torch takes it apart: a trace asks for the tensors of every operation.
    kind = type(tree)
    if isinstance(tree, Tensor):
        found.append(tree)
    elif kind in (tuple, list):
        for child in tree:
            _gather(child, found)
    elif kind is dict:
        for child in tree.values():
            _gather(child, found)
    elif kind not in LEAVES:
        found.extend(leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def map_tensors(function: Callable[[Tensor], Any], tree: Any) -> Any:
    """Return a tree with `function` of each tensor in its place; other leaves stay."""
    return tree_map(lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, tree)
