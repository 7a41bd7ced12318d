"""What quantization puts into a model: the rest of the package asks these modules, and does not list them."""

from collections.abc import Callable
from typing import Literal

from torch import Tensor, nn

Precision = Literal["full", "quantized"]


class Held(nn.Module):
    """A tensor that an execution computes with: called for it, since what offloads a model brings the tensors
    of a module when that is called.
    """

    tensor: Tensor

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.register_buffer("tensor", tensor, persistent=False)

    def forward(self) -> Tensor:
        """Return the tensor."""
        return self.tensor


class Execution(nn.Module):
    """How a part computes by the means of a backend. It moves with the part and is no part of the state.

    Attributes:
        shelves: the packed codes of the part stay in host memory meanwhile: it has the weight in a layout of
            its own.
    """

    shelves = False


class Part(nn.Module):
    """A module of a quantized model; another one overrides what does not hold for it.

    The persistent buffers of a part keep the dtype that they are stored in, whatever dtype the model is
    loaded in: codes are integers, and grids need all of float32.

    Attributes:
        execution: how it computes; None by its own means, in floating point on the grids.
    """

    execution: Execution | None

    def __init__(self) -> None:
        super().__init__()
        self.execution = None

    def keeps(self, name: str) -> bool:
        """Whether the tensor `name` of this module keeps the dtype it is stored in."""
        return name in self._buffers and name not in self._non_persistent_buffers_set

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Part":
        """Follow the model to another device, and not into another dtype: half a timestep is another one."""
        before = {
            name: tensor for name, tensor in self._buffers.items() if tensor is not None and self.keeps(name)
        }
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            now = self._buffers[name]
            if now is not None and now.dtype != tensor.dtype:
                self._buffers[name] = tensor.to(now.device)
        return self

    def choose(self, *, weights: Precision | None, inputs: Precision | None) -> Callable[[], None]:
        """Compute with full or quantized weights and inputs from now on; None leaves it as it is. What is
        returned undoes it.
        """
        return lambda: None

    def finished(self) -> nn.Module:
        """Return the form that stands in a quantized model once calibration is over; `self` where there is no
        other.
        """
        return self

    def take_rows(self, index: Tensor) -> None:
        """Keep the rows `index` `[S]` of what has one for each timestep, in this order."""

    def execute(self, execution: Execution | None) -> None:
        """Compute by an execution from now on, by the part's own means if it is None."""
        # An execution of None must not stay registered as a module: the printed model would show it.
        del self.execution
        self.execution = execution
