"""What quantization puts into a model: the rest of the package asks these modules, and does not list them."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

Precision = Literal["full", "quantized"]


class Part(nn.Module):
    """A module of a quantized model; another one overrides what does not hold for it.

    The persistent buffers of a part keep the dtype that they are stored in, whatever dtype the model is
    loaded in: codes are integers, and grids need all of float32.

    Attributes:
        PREPARED: what a backend may set, by attribute, with the values that they have without one. It is no
            part of the state.
    """

    PREPARED: ClassVar[Mapping[str, Any]] = {}

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

    def prepared(self) -> dict[str, Any]:
        """Return what a backend has set."""
        return {name: getattr(self, name) for name in self.PREPARED}

    def prepare(self, values: Mapping[str, Any]) -> None:
        """Set what `prepared` returned; the model may have moved in the meantime."""
        for name, value in values.items():
            setattr(self, name, value)

    def release(self) -> None:
        """Undo what a backend has set."""
        self.prepare(self.PREPARED)
