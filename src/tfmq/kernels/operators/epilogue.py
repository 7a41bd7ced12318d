"""What follows a sum before it is written: an activation function, a residual, the output's dtype."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "": lambda y: y,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
}


def finished(total: Tensor, activation: str, residual: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return `activation(total) + residual`, computed in float32, in `dtype`.

    Raises:
        ValueError: no such activation function.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"there is no activation function {activation!r}; the epilogue "
            f"has {', '.join(map(repr, ACTIVATIONS))}"
        )
    y = ACTIVATIONS[activation](total)
    return (y if residual is None else y + residual.float()).to(dtype)
