"""`torch.einsum` of two tensors as one matrix product, where it is one."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

# Stand for the axes of an ellipsis, which are counted from the right; einsum itself knows letters alone.
_AXES = "0123456789"


@dataclass(frozen=True)
class Contraction:
    """An einsum of two operands as `[*batch, M, K] @ [*batch, K, N]`; letters by where they occur, in the
    order of the operand.

    Attributes:
        left, right: letters of the operands.
        out: letters of the result.
    """

    left: str
    right: str
    out: str

    @property
    def batch(self) -> str:
        """Return the letters that both operands and the result have."""
        return "".join(letter for letter in self.left if letter in self.right and letter in self.out)

    @property
    def summed(self) -> str:
        """Return the letters that both operands have and the result has not."""
        return "".join(letter for letter in self.left if letter in self.right and letter not in self.out)

    @property
    def rows(self) -> str:
        """Return the letters that the left operand alone has."""
        return "".join(letter for letter in self.left if letter not in self.right)

    @property
    def columns(self) -> str:
        """Return the letters that the right operand alone has."""
        return "".join(letter for letter in self.right if letter not in self.left)

    def multiply(self, left: Tensor, right: Tensor, product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Return the result by `product` of `[*batch, M, K]` and `[*batch, K, N]`."""
        height, width = _sizes(self.left, left, self.rows), _sizes(self.right, right, self.columns)
        found = product(
            _grouped(left, self.left, self.batch, self.rows, self.summed),
            _grouped(right, self.right, self.batch, self.summed, self.columns),
        )
        found = found.reshape(*found.shape[:-2], *height, *width)
        order = self.batch + self.rows + self.columns
        return found.permute([order.index(letter) for letter in self.out])


def operands_of(arguments: Sequence[Any]) -> Sequence[Any]:
    """Return the tensors among the arguments of an einsum, which may stand in a list."""
    return arguments[1] if len(arguments) == 2 and isinstance(arguments[1], list | tuple) else arguments[1:]


def contraction(arguments: Sequence[Any]) -> Contraction | None:
    """Return the product that `einsum(*arguments)` is; None where it is none: no or other sums, other
    operands than two, unequal sizes.
    """
    tensors = operands_of(arguments)
    if (
        len(tensors) != 2
        or not isinstance(arguments[0], str)
        or not all(tensor.is_floating_point() for tensor in tensors)
    ):
        return None
    left, right, out = _letters(arguments[0], tensors)
    found = Contraction(left, right, out)
    return found if _is_product(found, *tensors) else None


def _letters(equation: str, tensors: Sequence[Tensor]) -> tuple[str, str, str]:
    """Return the letters of both operands and of the result, with those of an ellipsis."""
    inputs, arrow, out = equation.replace(" ", "").partition("->")
    operands = inputs.split(",")
    left, right = (_named(letters, tensor.ndim) for letters, tensor in zip(operands, tensors, strict=True))
    axes = "".join(sorted({letter for letter in left + right if letter in _AXES}, reverse=True))
    if not arrow:
        # The axes of an ellipsis, then the letters that occur once, in alphabetical order.
        out = axes + "".join(
            sorted(
                letter for letter in left + right if letter not in axes and (left + right).count(letter) == 1
            )
        )
    return left, right, out.replace("...", axes)


def _is_product(found: Contraction, left: Tensor, right: Tensor) -> bool:
    """Whether a contraction sums something, over equal sizes, and no operand has a letter twice."""
    known = set(found.batch + found.rows + found.columns)
    repeated = any(len(set(letters)) != len(letters) for letters in (found.left, found.right, found.out))
    same = _sizes(found.left, left, found.summed) == _sizes(found.right, right, found.summed)
    return bool(found.summed) and not repeated and set(found.out) == known and same


def _named(letters: str, ndim: int) -> str:
    """Return the letters with one for each axis of an ellipsis, the last axis being 0."""
    count = ndim - len(letters.replace("...", ""))
    return letters.replace("...", _AXES[:count][::-1])


def _sizes(letters: str, tensor: Tensor, chosen: str) -> list[int]:
    return [tensor.shape[letters.index(letter)] for letter in chosen]


def _grouped(tensor: Tensor, letters: str, batch: str, first: str, second: str) -> Tensor:
    """Return the tensor as `[*batch, first, second]`, the letters of either group as one axis."""
    shape = (
        *_sizes(letters, tensor, batch),
        math.prod(_sizes(letters, tensor, first)),
        math.prod(_sizes(letters, tensor, second)),
    )
    return tensor.permute([letters.index(letter) for letter in batch + first + second]).reshape(shape)
