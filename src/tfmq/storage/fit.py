"""Check that the tensors of a checkpoint are those that its structure needs, before a module is built for
them.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from tfmq.numerics.grids import IntegerFormat
from tfmq.numerics.grids import Table as ValueTable
from tfmq.numerics.groups import largest
from tfmq.numerics.packing import packed_shape, unpack_unsigned
from tfmq.numerics.segments import scales

from .errors import TensorMismatchError
from .parts import Branch, Correction, Input, Layer, Structure, Table

__all__ = ["check_parts"]

PACKED = ".packed"
# Codes that are unpacked at once to be looked at.
CHUNK = 2**22


def check_parts(tensors: Mapping[str, Tensor], structure: Structure, *, source: object) -> None:
    """Check names, kinds, shapes and values of the quantized tensors; `source` names the manifest in
    messages.

    A stock parameter that is missing, or of another shape than the architecture has, is left to whoever loads
    it.

    Raises:
        TensorMismatchError: a tensor is missing, has another kind or shape, packed weights have no layer, a
            scale is not positive and finite, a zero-point is off its grid, or the timesteps are not finite
            and ascending.
    """
    parts = _Parts(tensors, structure, str(source))
    parts.timesteps()
    for name, layer in structure.layers.items():
        parts.layer(structure.stored_name(name), layer)
    for owner, products in structure.products.items():
        for side, operands in (("left", products.left), ("right", products.right)):
            for place, operand in enumerate(operands):
                parts.input(f"{owner}.tfmq_products.{side}.{place}".lstrip("."), operand)
    for name, table in structure.tables.items():
        parts.table(name, table)
    for name, correction in structure.corrections.items():
        parts.correction(name, correction)
    known = {structure.stored_name(name) + PACKED for name in structure.layers}
    if strange := sorted(name for name in tensors if name.endswith(PACKED) and name not in known):
        raise TensorMismatchError(
            f"{source} names no layer for {strange[0]}, which holds packed "
            "weights; copy or save the checkpoint again"
        )


class _Parts:
    """The tensors of one checkpoint, taken by name."""

    def __init__(self, tensors: Mapping[str, Tensor], structure: Structure, source: str) -> None:
        self.tensors, self.structure, self.source = tensors, structure, source

    def present(self, name: str) -> Tensor:
        """Return a tensor that has to be there."""
        if name not in self.tensors:
            raise TensorMismatchError(
                f"{self.source} needs the tensor {name}, which is missing; copy or save the checkpoint again"
            )
        return self.tensors[name]

    def take(self, name: str, shape: tuple[int | None, ...], *, integer: bool) -> Tensor:
        """Return a tensor of uint8, or else of floating point, and of `shape`; None stands for any length but
        0.
        """
        tensor = self.present(name)
        fits = len(tensor.shape) == len(shape) and all(
            length > 0 if wanted is None else length == wanted
            for length, wanted in zip(tensor.shape, shape, strict=True)
        )
        if not fits or (tensor.dtype != torch.uint8 if integer else not tensor.is_floating_point()):
            wanted_shape = ", ".join("any" if length is None else str(length) for length in shape)
            kind = "uint8" if integer else "floating point"
            raise self.wrong(name, f"is {tensor.dtype} {list(tensor.shape)}, not {kind} [{wanted_shape}]")
        return tensor

    def wrong(self, name: str, found: str) -> TensorMismatchError:
        """Return the error of a tensor that is there and not right."""
        return TensorMismatchError(
            f"{self.source} describes another tensor {name}: it {found}; copy or save the checkpoint again"
        )

    def timesteps(self) -> None:
        """Check the calibrated timesteps."""
        for network in self.structure.networks:
            name = f"{network}.tfmq_steps.timesteps".lstrip(".")
            steps = self.take(name, (self.structure.steps,), integer=False)
            if not bool(torch.isfinite(steps).all()) or not bool((steps.diff() > 0).all()):
                raise self.wrong(name, "is not finite and ascending")

    def grid(self, prefix: str, shape: tuple[int, ...], *, bits: int, zero_point: bool = True) -> None:
        """Check the scales and the zero-points of grids of `bits` bits."""
        scale = self.take(f"{prefix}.scale", shape, integer=False)
        if not bool((torch.isfinite(scale) & (scale > 0)).all()):
            raise self.wrong(f"{prefix}.scale", "has a scale that is not positive and finite")
        if zero_point:
            self.zeros(prefix, shape, bits=bits)

    def zeros(self, prefix: str, shape: tuple[int | None, ...], *, bits: int) -> Tensor:
        """Return zero-points, of `shape`, that are codes of `bits` bits."""
        found = self.take(f"{prefix}.zero_point", shape, integer=True)
        if int(found.max()) >= 2**bits:
            raise self.wrong(f"{prefix}.zero_point", f"has a zero-point off the grid of {bits} bits")
        return found

    def layer(self, name: str, layer: Layer) -> None:
        """Check a packed layer and the quantizer of its input."""
        packed = self.take(f"{name}{PACKED}", (None, None), integer=True)
        channels, codes = sum(layer.segments), packed.shape[1] * 8 // layer.bits
        if channels > codes:
            raise self.wrong(
                f"{name}{PACKED}",
                f"has at most {codes} codes a row, fewer than the {channels} channels of its segments",
            )
        self.grid(
            name,
            (packed.shape[0], scales(layer.segments)),
            bits=layer.bits,
            zero_point=not (layer.symmetric or layer.group),
        )
        if layer.group:
            self.groups(name, layer, (packed.shape[0], sum(layer.segments) // layer.group or None), codes)
        if layer.values:
            self.codes(f"{name}{PACKED}", packed, layer)
        self.input(f"{name}.input_quantizer", layer.input)
        if layer.rescaled:
            factor = self.take(f"{name}.factor", (None,), integer=False)
            if not bool((torch.isfinite(factor) & (factor > 0)).all()):
                raise self.wrong(f"{name}.factor", "has a factor that is not positive and finite")
        if layer.ordered:
            self.order(f"{name}.order", channels)
        if layer.branch is not None:
            self.branch(name, layer, layer.branch, tuple(packed.shape))

    def order(self, name: str, channels: int) -> None:
        """Check that a tensor has each of so many channels once."""
        order = self.present(name)
        if order.dtype != torch.int32 or tuple(order.shape) != (channels,):
            raise self.wrong(name, f"is {order.dtype} {list(order.shape)}, not int32 [{channels}]")
        if not torch.equal(order.sort().values, torch.arange(channels, dtype=torch.int32)):
            raise self.wrong(name, f"has not each of {channels} channels once")

    def branch(self, name: str, layer: Layer, branch: Branch, packed: tuple[int, ...]) -> None:
        """Check the factors beside a layer, whose packed codes have the shape `packed`."""
        stored = branch.dtype.removesuffix("_weight_only")
        up, down = (self.factor(f"{name}.branch.{part}", stored) for part in ("up", "down"))
        rows, kernel = len(down), tuple(down.shape[1:])
        if tuple(up.shape) != (packed[0], branch.rank):
            raise self.wrong(f"{name}.branch.up", f"has not {packed[0]} rows of {branch.rank} values")
        if rows % branch.rank or not rows or packed[0] % (rows // branch.rank):
            raise self.wrong(f"{name}.branch.down", f"has not {branch.rank} rows for each group of channels")
        if packed_shape((packed[0], *kernel), bits=layer.bits) != packed:
            raise self.wrong(f"{name}.branch.down", "has other rows than the codes of the layer")
        if stored == "int8":
            segments = scales(layer.segments) if branch.dtype == "int8" else 1
            for part, shape in (("down", (rows, segments)), ("up", (packed[0], 1))):
                scale = self.take(f"{name}.branch.{part}_scale", shape, integer=False)
                if not bool((torch.isfinite(scale) & (scale > 0)).all()):
                    raise self.wrong(f"{name}.branch.{part}_scale", "has a scale that is not positive")

    def factor(self, name: str, dtype: str) -> Tensor:
        """Return a factor of a branch, of finite values in the dtype that is described."""
        tensor = self.present(name)
        if tensor.dtype != getattr(torch, dtype) or tensor.ndim < 2:
            raise self.wrong(name, f"is {tensor.dtype} {list(tensor.shape)}, not a matrix of {dtype}")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise self.wrong(name, "has a value that is not finite")
        return tensor

    def groups(self, name: str, layer: Layer, shape: tuple[int | None, ...], codes: int) -> None:
        """Check the multiples of groups, whose products with the integers of the grid are signed bytes, and
        their zero-points, of `shape`, of a weight that has at most so many `codes` a row.
        """
        multiplier = self.take(f"{name}.multiplier", shape, integer=True)
        if multiplier.shape[1] * layer.group > codes:
            raise self.wrong(f"{name}.multiplier", f"has more groups than {codes} codes a row make")
        fmt = (
            ValueTable("of the file", layer.values)
            if layer.values
            else IntegerFormat(layer.bits, layer.symmetric)
        )
        zeros = (
            torch.full_like(multiplier, fmt.middle)
            if layer.symmetric
            else self.zeros(name, tuple(multiplier.shape), bits=layer.bits)
        )
        if bool(((multiplier < 1) | (multiplier > largest(fmt, zeros.float()))).any()):
            raise self.wrong(
                f"{name}.multiplier", "has a multiple of 0, or one that leaves eight signed bits"
            )

    def codes(self, name: str, packed: Tensor, layer: Layer) -> None:
        """Check that the codes of a layer are places of its table."""
        count = packed.shape[1] * 8 // layer.bits
        largest = max(
            int(unpack_unsigned(rows, bits=layer.bits, shape=(len(rows), count)).max())
            for rows in packed.split(max(1, CHUNK // count))
        )
        if largest >= len(layer.values):
            raise self.wrong(name, f"has the code {largest}, beyond a table of {len(layer.values)} values")

    def input(self, name: str, operand: Input | None) -> None:
        """Check the quantizer of an operand; a dynamic one has no tensors."""
        if operand is not None and not operand.dynamic:
            rows = self.structure.steps if operand.per_step else 1
            self.grid(name, (rows, scales(operand.segments)), bits=operand.bits)

    def correction(self, name: str, correction: Correction) -> None:
        """Check the rows of a correction."""
        for kind in ("gain", "bias"):
            values = self.take(f"{name}.{kind}", (self.structure.steps, correction.channels), integer=False)
            if not bool(torch.isfinite(values).all()):
                raise self.wrong(f"{name}.{kind}", "has a value that is not finite")

    def table(self, name: str, table: Table) -> None:
        """Check the table of a temporal feature."""
        steps = self.structure.steps
        packed = self.tensors.get(f"{name}.block{PACKED}")
        width = None if packed is None or packed.ndim == 0 else packed.shape[0]
        values = self.take(f"{name}.table.values", (steps, width), integer=table.format == "int8")
        if table.format == "int8":
            self.grid(f"{name}.table", (steps,), bits=8)
        elif not bool(torch.isfinite(values).all()):
            raise self.wrong(f"{name}.table.values", "has a value that is not finite")
        use = self.take(f"{name}.use_table", (steps,), integer=True)
        if bool((use > 1).any()) or (table.everywhere and not bool(use.all())):
            raise self.wrong(
                f"{name}.use_table",
                "has another choice than 0 or 1, or 0 in a table that serves every timestep",
            )
