"""A layer in terms that static-range integer engines fuse: one fixed fake-quantizer in front of the
operation, everything else around it.

Such an engine wants the input range of a layer as a constant. The range of each timestep enters as a
normalisation before the quantizer and is folded back after the operation. With the row `(s, z)` of a sample,
a fixed zero-point `c` and `d = z - c`,

    u = fake_quantize(x / s + d; scale 1, zero-point c, 0 .. levels - 1)         = q - c
    y = (operation(u, v s_w) - d m) s + bias,    m = operation(1, v s_w)

`m` differs from its inner value only where zero padding is seen, so a padded convolution keeps it as a map of
its output. In exact arithmetic `y` is the layer's own formula. Where all timesteps share `z`, `c` is that and
`d` is gone.

An attention product has such an operand on either side. OpenVINO computes it in integers if the right one has
the middle code for its zero-point and the left one that or 0, for all timesteps; other products stay in
floating point, on quantized values.

For processors that cut sums of integers off, a weight of eight bits is the two of `halves`, whose outputs are
added, and products of two activations stay in floating point.

Two operators stand for what an engine has by other names: `tfmq::codes`, the quantizer, and
`tfmq::integer_weight`, the integers of a weight times their scale. Each exporter says what they become.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from tfmq.kernels.halves import terms, wanted
from tfmq.kernels.kernel import IntegerWeight, Rows, channels, column, combined
from tfmq.nn.embedding import KeptCodes
from tfmq.nn.packed_layer import KernelExecution
from tfmq.nn.plan import packed_embeddings, packed_layers
from tfmq.nn.products import ProductKernel, ProductKernels, ProductQuantizers
from tfmq.nn.submodules import submodules
from tfmq.nn.swap import parts_of
from tfmq.numerics.affine import in_dtype
from tfmq.quantizers.activation import ActivationQuantizer
from tfmq.quantizers.input import InputQuantizer


@torch.library.custom_op("tfmq::codes", mutates_args=())
def codes(x: Tensor, zero_point: int, levels: int) -> Tensor:
    """Return `clamp(round(x) + zero_point, 0, levels - 1) - zero_point`, in the dtype of `x`."""
    return x.round().clamp_(-zero_point, levels - 1 - zero_point)


@codes.register_fake
def _(x: Tensor, zero_point: int, levels: int) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("tfmq::integer_weight", mutates_args=())
def integer_weight(values: Tensor, scale: Tensor, axis: int) -> Tensor:
    """Return integers `values` int8 times `scale` float32 `[C_out]`, which are along `axis`."""
    return values.to(scale.dtype) * column(scale, values.ndim - axis)


@integer_weight.register_fake
def _(values: Tensor, scale: Tensor, axis: int) -> Tensor:
    return torch.empty_like(values, dtype=scale.dtype)


class FakeQuantizeKernel:
    """A layer as a graph of fake-quantizers; `zero_points` `[S, G]` are all that can occur, None where the
    input is not quantized. A weight is `halved` if that is so, by default where this processor needs it.

    With a `middle` the fixed zero-point is that code, or 0 where no other occurs: engines have transposed
    convolutions of signed and of unsigned codes, and none with a zero-point between. The maps `m` are kept by
    the size of the input, and so are the tables of a calibrated quantizer, whose own `scales` `[S, G]` are
    given: a call before the capture makes constants of them. What a graph computed of constants, whoever
    converts it would have to find and to fold, in each of hundreds of layers.
    """

    def __init__(
        self,
        weight: IntegerWeight,
        zero_points: Tensor | None,
        *,
        middle: int | None = None,
        halved: bool | None = None,
        scales: Tensor | None = None,
    ) -> None:
        # Keep the integers in the parts alone, one byte each: a model is in memory several times while it is
        # converted.
        self.weight = replace(weight, values=weight.values.new_empty(0))
        # Keep the layout of the module, which engines know. Where it has no axis for the scales they are
        # multiplied into the weight: a plug-in that moves them errs.
        operation, self.axis = weight.operation, weight.operation.stored_axis
        self.parts = [
            (self._stored(values, scale, halved), scale.float().contiguous())
            for values, scale in weight.parts()
        ]
        self.maps: dict[tuple[int, ...], Tensor] = {}
        self.scales = scales
        self.tables: dict[tuple[int, int], tuple[Tensor, ...]] = {}
        columns = [] if zero_points is None else zero_points.int().unbind(1)
        self.centres = [
            int(values.median()) if middle is None else middle * bool(values.any()) for values in columns
        ]
        axes = len(operation.window(weight.values.shape[2:]).size)
        if wanted(halved) and middle is None and axes == 3 and operation.groups > 1:
            # OpenVINO (2026.4.1) adds up signed codes wrongly there, see docs/upstream.md.
            self.centres = [0] * len(columns)
        self.shifts = [
            bool((values != centre).any()) for values, centre in zip(columns, self.centres, strict=True)
        ]

    def _stored(self, values: Tensor, scale: Tensor, halved: bool | None) -> tuple[Tensor, ...]:
        """Return the terms of a weight in the module's layout: integers if that has an axis for scales."""
        stored = self.weight.operation.stored
        if self.axis is None:
            return (stored(values * column(scale, values.ndim)),)
        return tuple(stored(term.to(torch.int8)) for term in terms(values, halved=halved))

    def __call__(self, x: Tensor, rows: Rows | None) -> Tensor:
        operation, partials = self.weight.operation, []
        if rows is None:
            partials = [
                self._multiply(segment, *part)
                for segment, part in zip(self.weight.split(x), self.parts, strict=True)
            ]
            return in_dtype(combined(partials, self.weight.bias, operation), x.dtype)
        for index, (segment, (values, weight_scale)) in enumerate(
            zip(self.weight.split(x), self.parts, strict=True)
        ):
            centre = self.centres[index]
            scale, inverse, *shifts = map(rows.looked_up, self._tables(index, rows, x.ndim))
            if not shifts:
                u = codes(segment * inverse, centre, rows.levels)
                partials.append(self._multiply(u, values, weight_scale) * scale)
                continue
            (shift,) = shifts
            y = self._multiply(codes(segment * inverse + shift, centre, rows.levels), values, weight_scale)
            partials.append((y - shift * self._map(index, segment, values, weight_scale)) * scale)
        return in_dtype(combined(partials, self.weight.bias, operation), x.dtype)

    def _tables(self, index: int, rows: Rows, ndim: int) -> tuple[Tensor, ...]:
        """Return `s`, `1 / s` and, if there is one, `d` of a segment, to be looked up for an input of `ndim`
        axes.
        """
        if rows.scales is not self.scales:
            return self._made(index, rows, ndim)
        if (index, ndim) not in self.tables:
            self.tables[index, ndim] = self._made(index, rows, ndim)
        return self.tables[index, ndim]

    def _made(self, index: int, rows: Rows, ndim: int) -> tuple[Tensor, ...]:
        scales = rows.scales[..., index]
        tables = [scales, scales.reciprocal()]
        if self.shifts[index]:
            tables.append(rows.zero_points[..., index].float() - self.centres[index])
        return tuple(column(table, ndim) for table in tables)

    def _multiply(self, x: Tensor, values: tuple[Tensor, ...], scale: Tensor) -> Tensor:
        outputs = [
            self.weight.operation.multiply(
                x, term if self.axis is None else integer_weight(term, scale, self.axis), None
            )
            for term in values
        ]
        return combined(outputs, None, self.weight.operation)

    def _map(self, index: int, x: Tensor, values: tuple[Tensor, ...], weight_scale: Tensor) -> Tensor:
        key = index, *(int(size) for size in x.shape[2:])
        if key not in self.maps:
            self.maps[key] = self._ones_through(x, values, weight_scale)
        return self.maps[key]

    def _ones_through(self, x: Tensor, parts: tuple[Tensor, ...], weight_scale: Tensor) -> Tensor:
        """Return `m`: for each output channel, or with zero padding for each place of one sample's output."""
        operation = self.weight.operation
        values = parts[0] if len(parts) == 1 else parts[0].short() + parts[1]
        real = (
            operation.rows(values)
            if self.axis is None
            else operation.rows(values) * column(weight_scale, values.ndim)
        )
        if not operation.window(real.shape[2:]).reads_zeros:
            return channels(real.flatten(1).sum(dim=1), operation, x.ndim)
        return operation(torch.ones(1, *[int(size) for size in x.shape[1:]]), real, None)


class FakeQuantizeProduct:
    """An attention product as two fixed fake-quantizers, the product of what they put out, and a rescale;
    zero-points are constants.
    """

    def __init__(self, left_zero: int, right_zero: int) -> None:
        self.zeros = left_zero, right_zero

    def __call__(self, left: Tensor, left_rows: Rows, right: Tensor, right_rows: Rows) -> Tensor:
        operands, scales = [], []
        for x, rows, zero in ((left, left_rows, self.zeros[0]), (right, right_rows, self.zeros[1])):
            scale, inverse = (
                column(rows.looked_up(table)[:, 0], x.ndim)
                for table in (rows.scales, rows.scales.reciprocal())
            )
            operands.append(codes(x * inverse, zero, rows.levels))
            scales.append(scale)
        return in_dtype((operands[0] @ operands[1]) * (scales[0] * scales[1]), left.dtype)


def product_kernels(products: ProductQuantizers, *, halved: bool | None = None) -> dict[int, ProductKernel]:
    """Return the kernels of the sites whose product an engine computes in integers, by site: of none where
    weights are `halved`.
    """
    kernels: dict[int, ProductKernel] = {}
    if wanted(halved):
        return kernels
    for site, grids in enumerate(zip(products.left, products.right, strict=True)):
        (left, left_middle), (right, right_middle) = map(_zero_points, grids)
        if left in ([0], [left_middle]) and right == [right_middle]:
            kernels[site] = FakeQuantizeProduct(*left, *right)
    return kernels


def _zero_points(grid: nn.Module) -> tuple[list[int], int | None]:
    """Return the distinct zero-points of the quantizer of an operand, and its middle code; nothing where
    there is none.
    """
    if not isinstance(grid, ActivationQuantizer):
        return [], None
    return grid.zero_points().unique().tolist(), grid.format.middle


def _kernel(
    weight: IntegerWeight, quantizer: InputQuantizer | None, *, halved: bool | None
) -> FakeQuantizeKernel:
    if quantizer is None:
        return FakeQuantizeKernel(weight, None, halved=False)
    transposed = weight.operation.window(weight.values.shape[2:]).mirrored
    middle = quantizer.format.middle if transposed else None
    scales = quantizer.scale if isinstance(quantizer, ActivationQuantizer) else None
    return FakeQuantizeKernel(weight, quantizer.zero_points(), middle=middle, halved=halved, scales=scales)


@contextmanager
def graph_kernels(module: nn.Module, *, halved: bool | None = None) -> Iterator[None]:
    """Let the layers, embeddings and attention products of a packed denoiser compute in terms of engines for
    a while: for processors that cut sums off if `halved`, by default for this one.
    """
    before = [(part, part.execution) for part in parts_of(module)]
    for layer in packed_layers(module).values():
        weight = layer.integer_weight()
        kernel = _kernel(weight, layer.input_quantizer, halved=halved) if weight.narrow else None
        layer.execute(None if kernel is None else KernelExecution(kernel))
    for products in submodules(module, ProductQuantizers).values():
        kernels = product_kernels(products, halved=halved)
        products.execute(ProductKernels(sites=kernels) if kernels else None)
    for embedding in packed_embeddings(module).values():
        embedding.execute(KeptCodes(embedding.codes))
    try:
        yield
    finally:
        for part, execution in before:
            part.execute(execution)
