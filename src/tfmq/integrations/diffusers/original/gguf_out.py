"""A quantized denoiser as a GGUF file that ComfyUI-GGUF, diffusers and others open: linear layers as blocks
of integers, all else in half precision or float32, by the names of the published layout.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor

from tfmq.errors import require
from tfmq.integrations.diffusers.original.families import ADDED
from tfmq.integrations.diffusers.original.lost import (
    Lost,
    Published,
    held_layers,
    layers_of,
    layout_of,
    plain_layer,
)
from tfmq.integrations.diffusers.original.rows import Rows, to_original
from tfmq.nn.packed_layer import PackedLayer
from tfmq.numerics.blocks import BLOCK, UnheldError, format_of, to_blocks
from tfmq.storage.gguf_writer import GgufTensor, write_gguf

FILE = "denoiser.gguf"
# What loaders call the layouts; of UNets, SDXL has embeddings of its own.
ARCHITECTURES = {"FluxTransformer2DModel": "flux", "SD3Transformer2DModel": "sd3"}


@dataclass(frozen=True)
class Integers:
    """A weight as integers, int8 `[C_out, C_in]`, in units of the step of each block, float32
    `[C_out, C_in / 32]`.
    """

    values: Tensor
    step: Tensor


@dataclass(frozen=True)
class Written:
    """The tensors of a file, what they leave out, and the largest share by which a scale was rounded."""

    tensors: dict[str, GgufTensor]
    lost: Lost
    rounding: float


def _held(layer: PackedLayer) -> Integers:
    """Return the integers of a layer. Those of groups that divide into blocks are in units of the step of
    their group, others in units of the scale.

    Raises:
        UnheldError: blocks cannot hold them.
    """
    if layer.rotated:
        raise UnheldError("its input is rotated")
    grid, width = layer.grid, layer.shape[1]
    if any(part % BLOCK for part in grid.segments or (width,)):
        raise UnheldError(f"its inputs, or those of a scale, do not divide into blocks of {BLOCK}")
    codes, inside = layer.codes.float(), grid.group % BLOCK > 0
    values = grid.integers(codes) if inside else grid.format.integers(codes, grid.zeros(2))
    steps = (replace(grid, group=0, multiplier=None) if inside else grid).steps(2)
    if not (int(values.min()) >= -128 and int(values.max()) <= 127):
        raise UnheldError("its integers need more than eight bits")
    return Integers(values.to(torch.int8), steps.expand(len(steps), width)[:, ::BLOCK].contiguous())


def _blocks(
    held: Mapping[str, Integers], table: Sequence[Rows], reasons: dict[str, str]
) -> tuple[dict[str, GgufTensor], float]:
    """Return the matrices of the layout whose layers are all held, each in the smallest format that has its
    integers, and the largest share by which a scale was rounded. Adds to `reasons`, by layer.
    """
    values = to_original({f"{name}.weight": layer.values for name, layer in held.items()}, table)
    steps = to_original({f"{name}.weight": layer.step for name, layer in held.items()}, table)
    found, rounding = {}, 0.0
    for entry in table:
        if entry.original not in values:
            continue
        matrix = values[entry.original]
        fmt = format_of(matrix)
        try:
            data, share = to_blocks(matrix, steps[entry.original], fmt)
        except UnheldError as error:
            reasons |= dict.fromkeys(layers_of(entry), str(error))
            continue
        found[entry.original], rounding = GgufTensor(fmt.name, data), max(rounding, share)
    return found, rounding


def _plain(name: str, tensor: Tensor) -> GgufTensor:
    """Return a tensor of floating point: matrices and convolutions in half precision where that has their
    values with its full digits, all else in float32, as other writers do.
    """
    half = tensor.half()
    near = (half.float() - tensor).abs().max() <= tensor.abs().max() * 2**-11
    if tensor.ndim > 1 and name.endswith(".weight") and bool(near):
        return GgufTensor("F16", half)
    return GgufTensor("F32", tensor)


def gguf_tensors(model: ModelMixin) -> Written:
    """Return the tensors of the file of a quantized denoiser.

    Layers keep their integers, whatever their bits: in Q4_0 where all are of -8 to 7, else in Q4_1 where
    those of each block span 16 numbers with zero, else in Q8_0. Scales become half precision.

    Raises:
        ValueError: the denoiser is of no layout that has a table.
    """
    published = Published.of(model)
    held, reasons = held_layers(published.packed, _held)
    blocks, rounding = _blocks(held, published.table, reasons)
    written = dict(blocks)
    for entry in published.table:
        if entry.original not in blocks:
            published.leave_out(entry, reasons)
            written[entry.original] = _plain(entry.original, published.plain(entry))
            continue
        published.lost.inputs += [
            name
            for name in layers_of(entry)
            if plain_layer(published.packed[name]).input_quantizer is not None
        ]
    return Written(written, published.lost, rounding)


def export_gguf(model: ModelMixin, directory: Path) -> dict[str, Any]:
    """Write a quantized denoiser to `FILE` in an existing `directory`.

    Returns:
        What was written: `files`, the number of tensors of each of the `types`, the largest `rounding` of a
        scale, as a share of it, and `left_out`, what the format cannot hold, in words.

    Raises:
        ValueError: the denoiser is of no layout that other loaders open.
        MissingExtraError: the package `gguf` is not installed.
        StorageFullError: there is no space.
    """
    require("gguf", extra="gguf")
    written = gguf_tensors(model)
    unet = "sdxl" if ADDED in written.tensors else "sd1"
    write_gguf(directory / FILE, written.tensors, architecture=ARCHITECTURES.get(layout_of(model), unet))
    types = Counter(stored.kind for stored in written.tensors.values())
    return {
        "files": [FILE],
        "types": dict(types.most_common()),
        "rounding": written.rounding,
        "left_out": list(written.lost.lines(floats="floating point", inputs="inputs in full precision")),
    }
