"""A quantized denoiser as a file that ComfyUI and others open: linear layers as signed bytes, all else in
half precision, by the names of the published layout.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor

from tfmq.integrations.diffusers.original.lost import (
    Lost,
    Published,
    held_layers,
    layers_of,
    plain_layer,
)
from tfmq.integrations.diffusers.original.rows import Rows, to_original
from tfmq.nn.packed_layer import PackedLayer
from tfmq.numerics.blocks import UnheldError
from tfmq.quantizers.dynamic import DynamicQuantizer
from tfmq.storage.atomic import write_tensors
from tfmq.storage.comfy import Int8Layer, encoded

FILE = "denoiser.safetensors"
PREFIX = "model.diffusion_model."


def _held(layer: PackedLayer) -> Int8Layer:
    """Return a layer of signed bytes.

    Raises:
        UnheldError: it cannot be one.
    """
    if layer.scale.shape[1] > 1:
        raise UnheldError("its rows have several scales")
    weight = layer.integer_weight()
    if not weight.narrow:
        raise UnheldError("its integers need more than eight bits")
    full = layer.input_quantizer is None
    return Int8Layer(weight.values.to(torch.int8), layer.scale.float(), layer.rotated, full)


def _joined(held: Mapping[str, Int8Layer], table: Sequence[Rows]) -> dict[str, Int8Layer]:
    """Return the matrices of the layout whose layers are all signed bytes and read their inputs alike."""
    codes = to_original({f"{name}.weight": layer.codes for name, layer in held.items()}, table)
    scales = to_original({f"{name}.weight": layer.scale for name, layer in held.items()}, table)
    found = {}
    for entry in table:
        kinds = {(held[name].rotated, held[name].full_input) for name in layers_of(entry) if name in held}
        if entry.original in codes and len(kinds) == 1:
            found[entry.original] = Int8Layer(codes[entry.original], scales[entry.original], *kinds.pop())
    return found


def _as_theirs(layer: PackedLayer) -> bool:
    """Whether a layer quantizes its input as the format's reader does, if at all."""
    quantizer = layer.input_quantizer
    if quantizer is None:
        return True
    return isinstance(quantizer, DynamicQuantizer) and (
        quantizer.format.bits,
        quantizer.format.symmetric,
    ) == (8, True)


def _halved(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors as the file names them, in float16, or all in bfloat16 where one has a value beyond
    that.
    """
    most = max((float(tensor.abs().max()) for tensor in tensors.values() if tensor.numel()), default=0.0)
    dtype = torch.float16 if most <= torch.finfo(torch.float16).max else torch.bfloat16
    return {PREFIX + name: tensor.to(dtype) for name, tensor in tensors.items()}


def comfy_tensors(model: ModelMixin) -> tuple[dict[str, Tensor], Lost]:
    """Return the tensors of the file of a quantized denoiser, and what they leave out.

    Codes and scales are those of the model, whatever its bits. Where the layout joins layers that diffusers
    keeps apart, such as q, k and v, all of them must be rotated alike to stay integers.

    Raises:
        ValueError: the denoiser is of no layout that has a table.
    """
    published = Published.of(model)
    held, reasons = held_layers(published.packed, _held)
    matrices = _joined(held, published.table)
    written: dict[str, Tensor] = {}
    plain: dict[str, Tensor] = {}
    for entry in published.table:
        if entry.original not in matrices:
            published.leave_out(entry, reasons)
            plain[entry.original] = published.plain(entry)
            continue
        stem = PREFIX + entry.original.removesuffix(".weight")
        fields = encoded(matrices[entry.original])
        written |= {stem + suffix: tensor.cpu() for suffix, tensor in fields.items()}
        published.lost.inputs += [
            name for name in layers_of(entry) if not _as_theirs(plain_layer(published.packed[name]))
        ]
    return written | _halved(plain), published.lost


def export_comfy(model: ModelMixin, directory: Path) -> dict[str, Any]:
    """Write a quantized denoiser to `FILE` in an existing `directory`.

    Returns:
        What was written: `files`, the number of `int8` matrices, the `dtype` of all else, and `left_out`,
        what the format cannot hold, in words.

    Raises:
        ValueError: the denoiser is of no layout that other loaders open.
        StorageFullError: there is no space.
    """
    tensors, lost = comfy_tensors(model)
    write_tensors(directory / FILE, tensors)
    halves = {
        str(t.dtype).removeprefix("torch.")
        for t in tensors.values()
        if t.dtype in (torch.float16, torch.bfloat16)
    }
    count = sum(tensor.dtype == torch.int8 for tensor in tensors.values())
    return {
        "files": [FILE],
        "int8": count,
        "dtype": "".join(halves),
        "left_out": list(lost.lines(floats="half precision", inputs="grids of each token")),
    }
