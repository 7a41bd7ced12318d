"""A quantized linear, convolution or transposed convolution layer at rest, and how backends compute it."""

from abc import abstractmethod

import torch
from torch import Tensor, nn

from tfmq.kernels.kernel import IntegerWeight, LayerKernel
from tfmq.nn.branch import SideBranch
from tfmq.nn.packed import PackedWeight
from tfmq.nn.transform import opposed, restored, transformed
from tfmq.numerics.grids import Grid
from tfmq.numerics.operations import Operation
from tfmq.quantizers.input import InputQuantizer
from tfmq.quantizers.part import Execution, Held


class PackedLayer(PackedWeight):
    """A layer at rest: packed codes `[C_out, ...]`, their grid, bias, and the quantizer of its input.

    The bias has the dtype `bias`, the model's own. Without an execution the forward is simulated: float
    arithmetic on values that lie on the grids, with the weight unpacked at each call. A layer that is
    `rescaled` multiplies its input by `factor` `[C_in]`, and its codes are those of the weight divided by it;
    one with a group of `rotated` channels then rotates both, and one that is `ordered` has the channels of
    both in the `order` `[C_in]`, int32. A `branch` is computed beside its codes, which are those of what that
    leaves of the weight.
    """

    execution: "LayerExecution | None"
    factor: Tensor | None
    order: Tensor | None

    def __init__(
        self,
        operation: Operation,
        fmt: Grid,
        shape: tuple[int, ...],
        *,
        bias: torch.dtype | None,
        segments: tuple[int, ...] = (),
        input_quantizer: InputQuantizer | None = None,
        rescaled: bool = False,
        rotated: int = 0,
        ordered: bool = False,
        group: int = 0,
        branch: SideBranch | None = None,
    ) -> None:
        super().__init__(fmt, shape, segments=segments, group=group)
        self.rotated, self.branch = rotated, branch
        self.operation = operation
        self.register_buffer("factor", torch.ones(shape[1] * operation.groups) if rescaled else None)
        self.register_buffer("order", torch.arange(shape[1], dtype=torch.int32) if ordered else None)
        self.bias = (
            nn.Parameter(torch.zeros(self.shape[0], dtype=bias), requires_grad=False) if bias else None
        )
        self.input_quantizer = input_quantizer

    def rows(self, weight: Tensor) -> Tensor:
        """Return a stock weight as rows, divided by the factors of rescaled channels, rotated, and in order,
        without the branch.
        """
        rows = self.operation.rows(weight)
        rows = opposed(rows, self.factor, self.rotated, self.order, self.operation.groups)
        return rows if self.branch is None else rows - self.branch.product()

    def transformed(self, x: Tensor) -> Tensor:
        """Return an input as it is quantized."""
        return transformed(x, self.factor, self.rotated, self.order, self.operation)

    @property
    def stock_weight(self) -> Tensor:
        """The dequantized weight in the layout of the stock module, for inputs as they come."""
        weight = self.weight if self.branch is None else self.weight + self.branch.product()
        weight = restored(weight, self.factor, self.rotated, self.order, self.operation.groups)
        return self.operation.stored(weight)

    @property
    def in_features(self) -> int:
        """Inputs of a row of the weight, as a stock linear layer has them: pipelines read it off a denoiser's
        layers (SDXL's `add_embedding`).
        """
        return self.shape[1]

    @property
    def out_features(self) -> int:
        """Rows of the weight, as a stock linear layer has them."""
        return self.shape[0]

    def integer_weight(self) -> IntegerWeight:
        """Return what integer kernels compute with."""
        values = self.grid.integers(self.codes.to(torch.int16))
        bias = None if self.bias is None else self.bias.detach().float()
        weight = IntegerWeight(self.operation, values, self.scale, bias, self.segments)
        return self.branch.joined(weight) if self.branch is not None and self.branch.shared else weight

    @property
    def kernel(self) -> LayerKernel | None:
        """What computes the layer in integers; None where it computes in floating point."""
        return self.execution.kernel if isinstance(self.execution, KernelExecution) else None

    def forward(self, input: Tensor) -> Tensor:
        """Return the layer's output as a backend computes it, else in floating point on the grids."""
        if self.execution is None:
            return self.simulated(input, self.weight)
        return self.execution.compute(self, input)

    def simulated(self, input: Tensor, weight: Tensor, *, quantized: bool = True) -> Tensor:
        """Return the output in floating point for the dequantized `weight`, with the input on its grid if it
        is to be `quantized`.
        """
        input = self.transformed(input)
        x = self.input_quantizer(input) if quantized and self.input_quantizer is not None else input
        output = self.operation(x, weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))
        return output if self.branch is None else output + self.branch(x if self.branch.shared else input)

    def extra_repr(self) -> str:
        """Return shape, bits and whether there is a bias for the printed model."""
        return f"shape={self.shape}, bits={self.format.bits}, bias={self.bias is not None}"


class LayerExecution(Execution):
    """How a packed layer computes."""

    @abstractmethod
    def compute(self, layer: PackedLayer, input: Tensor) -> Tensor:
        """Return the output of `layer`."""


class KernelExecution(LayerExecution):
    """A layer by the integer `kernel` of a backend, which may be a module."""

    def __init__(self, kernel: LayerKernel, *, shelves: bool = False) -> None:
        super().__init__()
        self.kernel, self.shelves = kernel, shelves

    def compute(self, layer: PackedLayer, input: Tensor) -> Tensor:
        """Return what the kernel computes, and what a branch adds to it."""
        x = layer.transformed(input)
        rows = None if layer.input_quantizer is None else layer.input_quantizer.rows(x)
        output = self.kernel(x, rows)
        if layer.branch is None:
            return output
        return layer.branch.parted(output) if layer.branch.shared else output + layer.branch(x)


class KeptWeight(LayerExecution):
    """A layer by its own means, with the dequantized weight kept between calls."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = Held(weight)

    def compute(self, layer: PackedLayer, input: Tensor) -> Tensor:
        """Return what the layer simulates."""
        return layer.simulated(input, self.weight())


class StockExecution(LayerExecution):
    """A layer as its stock module computes it, with inputs as they come and the dequantized `weight` as that
    has it; None decodes it at each call.
    """

    def __init__(self, weight: Tensor | None) -> None:
        super().__init__()
        self.weight = None if weight is None else Held(weight)

    def compute(self, layer: PackedLayer, input: Tensor) -> Tensor:
        """Return the output for an input that is not quantized."""
        if self.weight is None:
            return layer.simulated(input, layer.weight, quantized=False)
        # A small stock layer takes no longer than a few calls from Python.
        return layer.operation.multiply(input, self.weight(), layer.bias)
