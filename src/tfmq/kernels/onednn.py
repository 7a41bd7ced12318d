"""Integer linear layers and convolutions by oneDNN, the library inside torch on x86: u8 inputs, s8 weights,
int32 sums.

In eager mode a call whose batch stands at one timestep passes that timestep's scale and zero-point to the
library, which fuses everything. A compiled graph must not branch on values: there the grid of each sample is
applied in tensor operations, which the compiler fuses with their neighbours, and the integer operation runs
on a grid of scale one and zero-point zero. Borders are padded with the zero-point's code first, and

    y = (sum q v - z sum v) s s_w + bias

Where all timesteps share one zero-point it is a constant: the library takes it, pads with it and leaves no
term in `z` to compute.

A batch of mixed timesteps, or of tokens with a grid each, takes that path in eager mode too. Both equal the
reference bit for bit while sums stay below 2**24, beyond which float32 rounds `sum q v` (the tests hold them
to it). On some processors the library applies both scales at once, which rounds otherwise.

Where the processor cuts sums off, a weight of eight bits is computed in halves; see `tfmq.kernels.halves`.
"""

import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from tfmq.kernels.halves import saturates
from tfmq.kernels.kernel import ACCUMULATOR, IntegerWeight, Rows, channels, column, combined
from tfmq.kernels.onednn_segment import PackedSegment
from tfmq.numerics.affine import quantize
from tfmq.numerics.segments import scales

# Subtracted from an unsigned code of eight bits, it gives a signed one.
MIDDLE = 128


def available() -> bool:
    """Whether this torch executes integers through oneDNN."""
    return (
        torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.onednn, "qconv2d_pointwise")
        and "onednn" in torch.backends.quantized.supported_engines
    )


@cache
def multiplies() -> bool:
    """Whether this torch has fast products of u8 and s8 matrices on the CPU, and gets the largest sums right.
    Where the processor has no VNNI it has a plain loop.
    """
    if saturates():
        return False
    codes, values = (
        torch.full((17, 64), 255, dtype=torch.uint8),
        torch.full((64, 16), -MIDDLE, dtype=torch.int8),
    )
    try:
        return bool((torch._int_mm(codes, values) == -64 * 255 * MIDDLE).all())
    except (AttributeError, RuntimeError):
        return False


def multipliable(depth: int, *rows: Rows) -> bool:
    """Whether these codes have at most eight bits, and sums of `depth` of their products stay in int32."""
    return all(grid.levels <= 256 for grid in rows) and depth * 255 * MIDDLE <= ACCUMULATOR


def supports(weight: IntegerWeight, levels: int) -> bool:
    """Whether the library computes this layer exactly: integers that fit into s8 and u8, sums into int32, at
    most two spatial axes.
    """
    fits = weight.narrow and levels <= 256 and weight.peak(levels) <= ACCUMULATOR
    return fits and weight.values.ndim <= 4 and (weight.operation.groups == 1 or not weight.segments)


@cache
def _hear_warning() -> None:
    """Let torch say, unseen and once in a process, that `quantize_per_tensor` will go."""
    with warnings.catch_warnings(action="ignore"):
        torch.quantize_per_tensor(torch.zeros(1), 1.0, 0, torch.quint8)


def quantize_u8(x: Tensor, scale: float, zero_point: int, levels: int) -> Tensor:
    """Return the codes of `x` on one grid, uint8, in its memory format, in one pass.

    torch adds the zero-point before it rounds: `round(x / s + z)`. The sum rounds off less than 2**-16, so a
    code may differ by one from that of `numerics.affine.quantize` where `x / s` is within 2**-15 of a tie.
    """
    _hear_warning()
    codes = torch.quantize_per_tensor(x, scale, zero_point, torch.quint8)
    plain = torch.empty(0, dtype=torch.uint8).set_(codes.untyped_storage(), 0, codes.size(), codes.stride())
    return plain if levels == 256 else plain.clamp_(max=levels - 1)


def constants(zero_points: Tensor | None, groups: int) -> list[int | None]:
    """Return the zero-point of each of `groups` segments, None for one that varies over `zero_points` `[any,
    G]`.
    """
    if zero_points is None:
        return [None] * groups
    return [int(codes[0]) if bool((codes == codes[0]).all()) else None for codes in zero_points.unbind(1)]


class OnednnKernel:
    """A layer through oneDNN. `supports` says which layers it takes. What it computes never changes, so that
    copies of a model share it.

    The library wants the weight of a convolution in a layout that depends on the size of the input. In
    another one it would be rearranged at each call, which can take several times as long as the convolution.
    So the first input of a size has the weight packed for it.

    Args:
        weight: integer weight of the layer.
        zero_points: `[any, G]`, all that can occur; None where nothing is known of them.
        again: returns the weight when it is packed for another size. Without it the kernel keeps the integers
            of its own.
    """

    def __init__(
        self,
        weight: IntegerWeight,
        zero_points: Tensor | None = None,
        *,
        again: Callable[[], IntegerWeight] | None = None,
    ) -> None:
        self.constants = constants(zero_points, scales(weight.segments))
        self.layout = replace(weight, values=weight.values.new_empty(0))
        self.bias = None if weight.bias is None else weight.bias.float().contiguous()
        self.again = again or (lambda: weight)
        # Keep the forms for the last two input sizes: a smaller batch may come and go.
        self.packed: OrderedDict[tuple[int, ...], list[PackedSegment]] = OrderedDict()

    def parts(self, x: Tensor) -> list[PackedSegment]:
        """Return the segments of the weight as the library wants them for an input like `x`."""
        size = (x.shape[0], *x.shape[2:]) if self.layout.operation.channel_axis == 1 else ()
        if torch.compiler.is_compiling() and self.packed:
            # Do not keep a weight that is packed during a capture: it would belong to the captured graph.
            return self.packed.get(size) or next(reversed(self.packed.values()))
        if size not in self.packed:
            weight = self.again()
            self.packed[size] = [
                PackedSegment(weight.operation, values, scale, size) for values, scale in weight.parts()
            ]
            if len(self.packed) > 2:
                self.packed.popitem(last=False)
        self.packed.move_to_end(size)
        return self.packed[size]

    def __deepcopy__(self, memo: dict[int, Any]) -> "OnednnKernel":
        return self

    def __call__(self, x: Tensor, rows: Rows | None) -> Tensor:
        assert rows is not None
        wide = self.layout.operation.arranged(x.float())
        one_grid = rows.scale[..., 0].numel() == 1 and not torch.compiler.is_compiling()
        total = self._on_one_grid(wide, rows) if one_grid else self._on_grids(wide, rows)
        return total.to(x.dtype)

    def _on_one_grid(self, x: Tensor, rows: Rows) -> Tensor:
        parts = self.parts(x)
        known = [constant for constant in self.constants if constant is not None]
        zero_points = known if len(known) == len(parts) else rows.zero_point.flatten().tolist()
        bias, partials = self.bias, []
        for segment, part, scale, zero_point in zip(
            self.layout.split(x), parts, rows.scale.flatten().tolist(), zero_points, strict=True
        ):
            partials.append(
                part.fused(quantize_u8(segment, scale, zero_point, rows.levels), scale, zero_point, bias)
            )
            bias = None
        return combined(partials, None, self.layout.operation)

    def _on_grids(self, x: Tensor, rows: Rows) -> Tensor:
        operation, partials = self.layout.operation, []
        for index, (segment, part) in enumerate(zip(self.layout.split(x), self.parts(x), strict=True)):
            scale, constant = column(rows.scale[..., index], x.ndim), self.constants[index]
            if constant is None:
                sums = self._shifted_sums(
                    part, segment, scale, rows.zero_point[..., index].float(), rows.levels
                )
            else:
                codes = quantize(segment, scale, constant, rows.levels).to(torch.uint8)
                sums = part.centred_sums_of(codes, constant)
            partials.append(sums * scale * channels(part.scale, operation, x.ndim))
        return combined(partials, self.bias, operation)

    def _shifted_sums(
        self, part: PackedSegment, x: Tensor, scale: Tensor, zero_point: Tensor, levels: int
    ) -> Tensor:
        """Return `sum (q - z) v` where each row has a zero-point of its own, float32."""
        wide_zero = column(zero_point, x.ndim)
        codes = quantize(x, scale, wide_zero, levels) - wide_zero
        codes = part.window.laid_out(codes).add(wide_zero).to(torch.uint8)
        return part.sums_of(codes) - channels(
            zero_point[..., None] * part.sums, self.layout.operation, x.ndim
        )


class UnpackingKernel:
    """A layer whose weight is unpacked and packed for the library at each call: as small as the checkpoint,
    slower.
    """

    def __init__(self, weight: Callable[[], IntegerWeight], zero_points: Tensor | None = None) -> None:
        self.weight = weight
        self.zero_points = zero_points

    def __call__(self, x: Tensor, rows: Rows | None) -> Tensor:
        return OnednnKernel(self.weight(), self.zero_points)(x, rows)
