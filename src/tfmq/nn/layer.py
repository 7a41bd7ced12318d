"""A quantized linear, convolution or transposed convolution layer that is being fitted, and how it is
packed.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tfmq.nn.branch import SideBranch
from tfmq.nn.packed_layer import PackedLayer
from tfmq.nn.transform import Transform, opposed, transformed
from tfmq.numerics.operations import Operation
from tfmq.quantizers.input import InputQuantizer
from tfmq.quantizers.part import Part, Precision
from tfmq.quantizers.weight import AdaptiveRounding, WeightGrid


class CalibratedLayer(Part):
    """A layer during calibration: the full-precision weight, a grid for it, and a choice between the two.

    `weight_precision` and `input_precision` say what a call computes with; `tfmq.nn.swap.precision` sets them
    for a while. `rounding` holds the trainable roundings while the layer's unit is reconstructed, `codes` the
    fixed ones before and after. `correction` `[C_out]` is added to the bias together with quantized weights:
    what they shift the mean of each channel by. With a `factor` `[C_in]` the layer reads its input multiplied
    by it, and `weight` is the layer's own divided by it. With a group of `rotated` channels it reads that
    rotated, and `weight` is rotated too; with an `order` `[C_in]` both have their channels in that. With a
    `branch` beside it `weight` is what that leaves.
    """

    codes: Tensor
    correction: Tensor | None
    factor: Tensor | None
    order: Tensor | None

    def __init__(
        self, source: Any, operation: Operation, grid: WeightGrid, input_quantizer: InputQuantizer | None
    ) -> None:
        super().__init__()
        self.operation = operation
        self.grid = grid
        self.weight = nn.Parameter(operation.rows(source.weight.detach()), requires_grad=False)
        self.bias = None if source.bias is None else nn.Parameter(source.bias.detach(), requires_grad=False)
        self.input_quantizer = input_quantizer
        self.rounding: AdaptiveRounding | None = None
        self.weight_precision: Precision = "full"
        self.input_precision: Precision = "full"
        self.rotated = 0
        self.branch: SideBranch | None = None
        self.register_buffer("codes", grid.encode(self.weight).to(torch.uint8), persistent=False)
        self.register_buffer(
            "correction", None if self.bias is None else torch.zeros_like(self.bias), persistent=False
        )
        self.register_buffer("factor", None, persistent=False)
        self.register_buffer("order", None, persistent=False)

    @torch.no_grad()
    def transform(self, change: Transform, *, ranges: str) -> None:
        """Read transformed inputs from now on: the weight gets another grid, with nearest codes, and an input
        whose channels have another order gets another quantizer, unfitted.
        """
        # Copies: layers that read one tensor have one transform, and files no tensor twice.
        self.factor, self.order = (
            None if given is None else given.to(self.weight.device, copy=True)
            for given in (change.factor, change.order)
        )
        self.rotated = change.rotated
        weight = opposed(self.weight, self.factor, self.rotated, self.order, self.operation.groups)
        if change.segments and self.input_quantizer is not None:
            self.input_quantizer = self.input_quantizer.parted(change.segments)
        self._replace(weight, ranges, change.segments)

    @torch.no_grad()
    def split(self, branch: SideBranch, *, ranges: str) -> None:
        """Compute a `branch` beside the rest of the weight from now on, which gets another grid."""
        self.branch = branch.to(self.weight.device)
        self._replace(self.weight - branch.product().to(self.weight.dtype), ranges)

    def _replace(self, weight: Tensor, ranges: str, segments: Sequence[int] = ()) -> None:
        # Make another tensor: a copy of the model may hold the old one.
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.regrid(self.grid.refitted(self.weight, method=ranges, segments=segments))

    @torch.no_grad()
    def regrid(self, grid: WeightGrid) -> None:
        """Take the nearest codes on another grid of the weight."""
        self.grid = grid
        self.codes = grid.encode(self.weight).to(torch.uint8)

    def transformed(self, x: Tensor) -> Tensor:
        """Return an input as the weight multiplies it in full precision."""
        return transformed(x, self.factor, self.rotated, self.order, self.operation)

    def quantized_weight(self) -> Tensor:
        """Return the weight on its grid, with soft roundings while they are learned."""
        codes = self.rounding.codes(hard=False) if self.rounding else self.codes.to(self.weight.dtype)
        return self.grid.decode(codes)

    def quantized_bias(self) -> Tensor | None:
        """Return the bias that goes with the quantized weight."""
        return None if self.bias is None or self.correction is None else self.bias + self.correction

    def entering(self, x: Tensor) -> Tensor:
        """Return what the layer computes with of an input."""
        x = self.transformed(x)
        return (
            self.input_quantizer(x)
            if self.input_quantizer is not None and self.input_precision == "quantized"
            else x
        )

    def beside(self, x: Tensor) -> Tensor | None:
        """Return what a branch adds to the output for an input; None without one."""
        if self.branch is None:
            return None
        return self.branch(self.entering(x) if self.branch.shared else self.transformed(x))

    def choose(self, *, weights: Precision | None, inputs: Precision | None) -> Callable[[], None]:
        """Choose the precision of weight and input."""
        before = self.weight_precision, self.input_precision
        self.weight_precision, self.input_precision = weights or before[0], inputs or before[1]

        def undo() -> None:
            self.weight_precision, self.input_precision = before

        return undo

    def finished(self) -> "PackedLayer":
        """Return the packed layer."""
        return pack(self)

    def learned(self) -> dict[str, Tensor]:
        """Return the tensors that reconstruction sets, by name."""
        tensors = {"codes": self.codes, "scale": self.grid.scale}
        return tensors if self.correction is None else {**tensors, "correction": self.correction}

    @torch.no_grad()
    def restore(self, learned: Mapping[str, Tensor]) -> None:
        """Take over tensors that `learned` of such a layer returned."""
        for name, tensor in self.learned().items():
            tensor.copy_(learned[name])

    def __call__(self, input: Tensor) -> Tensor:
        """Compute; by position, so that hooks see the input however a model passes it."""
        output: Tensor = super().__call__(input)
        return output

    def forward(self, input: Tensor) -> Tensor:
        """Return the layer's output with weight and input in the precision that is chosen."""
        x, beside = self.entering(input), self.beside(input)
        if self.weight_precision == "full":
            output = self.operation(x, self.weight, self.bias)
        else:
            output = self.operation(x, self.quantized_weight().to(x.dtype), self.quantized_bias())
        return output if beside is None else output + beside


@torch.no_grad()
def pack(layer: CalibratedLayer) -> PackedLayer:
    """Return the packed form of a calibrated layer; it computes bitwise the same values."""
    grid = layer.grid
    packed = PackedLayer(
        layer.operation,
        grid.format,
        tuple(layer.weight.shape),
        bias=None if layer.bias is None else layer.bias.dtype,
        segments=grid.segments,
        input_quantizer=layer.input_quantizer,
        rescaled=layer.factor is not None,
        rotated=layer.rotated,
        ordered=layer.order is not None,
        group=grid.group,
        branch=layer.branch,
    ).to(layer.weight.device)
    packed.fill(layer.codes, grid)
    if layer.factor is not None:
        packed.factor = layer.factor
    if layer.order is not None:
        packed.order = layer.order
    if (bias := layer.quantized_bias()) is not None and packed.bias is not None:
        packed.bias.copy_(bias)
    return packed
