"""A quantized denoiser as a file that ComfyUI and others open: linear layers as signed bytes, all else in
half precision, by the names of the published layout.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from tfmq.integrations.diffusers.architecture import stock_architecture, stock_class
from tfmq.integrations.diffusers.original.rows import Rows, to_original
from tfmq.integrations.diffusers.original.tables import TABLES
from tfmq.nn.correction import Correction
from tfmq.nn.layer import PackedLayer
from tfmq.nn.packed import PackedWeight
from tfmq.nn.products import ProductQuantizers
from tfmq.nn.submodules import submodules
from tfmq.nn.temporal import CachedFeature, stock_name
from tfmq.numerics.operations import Linear
from tfmq.quantizers.dynamic import DynamicQuantizer
from tfmq.storage.atomic import write_tensors
from tfmq.storage.comfy import Int8Layer, encoded

FILE = "denoiser.safetensors"
PREFIX = "model.diffusion_model."


@dataclass
class Lost:
    """What the format cannot hold.

    Attributes:
        half: layers whose integers are written dequantized, in half precision, by reason.
        inputs: layers whose grids of inputs become those of each token.
        tables: layers whose table of temporal features is left out; they compute.
        products: owners of attention products that stay in floating point.
        corrections: how many corrections of the prediction are left out.
    """

    half: dict[str, list[str]] = field(default_factory=dict)
    inputs: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    products: list[str] = field(default_factory=list)
    corrections: int = 0

    def joined(self, original: str, reasons: Mapping[str, str | None]) -> None:
        """Note the layers of a matrix that is written in half precision, and why they are no integers."""
        for name, reason in reasons.items():
            why = reason or f"joined with others in {original}, which differ"
            self.half.setdefault(why, []).append(name)


def _reason(layer: PackedWeight) -> str | None:
    """Return why a layer cannot be one of signed bytes; None where it can."""
    if not isinstance(layer, PackedLayer) or not isinstance(layer.operation, Linear):
        return "no linear layer"
    if layer.factor is not None:
        return "its input is rescaled"
    if layer.branch is not None:
        return "a branch is computed beside it"
    if layer.scale.shape[1] > 1:
        return "its rows have several scales"
    return None if layer.integer_weight().narrow else "its integers need more than eight bits"


def _held(layer: PackedLayer) -> Int8Layer:
    codes = layer.integer_weight().values.to(torch.int8)
    return Int8Layer(codes, layer.scale.float(), layer.rotated, layer.input_quantizer is None)


def _layers(entry: Rows) -> list[str]:
    """Return the layers whose weights are joined in a matrix of the layout."""
    return [part.removesuffix(".weight") for part in entry.parts if part.endswith(".weight")]


def _joined(held: Mapping[str, Int8Layer], table: Sequence[Rows]) -> dict[str, Int8Layer]:
    """Return the matrices of the layout whose layers are all signed bytes and read their inputs alike."""
    codes = to_original({f"{name}.weight": layer.codes for name, layer in held.items()}, table)
    scales = to_original({f"{name}.weight": layer.scale for name, layer in held.items()}, table)
    found = {}
    for entry in table:
        kinds = {(held[name].rotated, held[name].full_input) for name in _layers(entry) if name in held}
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


def _stock_state(model: nn.Module, packed: Mapping[str, PackedWeight], names: Any) -> dict[str, Tensor]:
    """Return the tensors of the stock architecture, dequantized, in float32."""
    state = {}
    for name, tensor in model.state_dict().items():
        layer, _, kind = name.rpartition(".")
        state[f"{stock_name(model, layer)}.{kind}" if layer else name] = tensor
    state |= {f"{name}.weight": layer.stock_weight for name, layer in packed.items()}
    return {name: state[name].detach().float().cpu() for name in names}


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
    kind = stock_class(model).__name__
    if kind not in TABLES:
        raise ValueError(f"{kind} has no layout that other loaders open; {', '.join(TABLES)} have")
    table, lost = TABLES[kind](stock := stock_architecture(model)), _lost(model)
    packed = {stock_name(model, name): layer for name, layer in submodules(model, PackedWeight).items()}
    reasons = {name: _reason(layer) for name, layer in packed.items()}
    held = {name: _held(packed[name]) for name, reason in reasons.items() if not reason}  # type: ignore[arg-type]
    matrices = _joined(held, table)
    plain = to_original(_stock_state(model, packed, stock.state_dict()), table)
    written: dict[str, Tensor] = {}
    for entry in table:
        names = _layers(entry)
        if entry.original not in matrices:
            lost.joined(entry.original, {name: reasons[name] for name in names if name in packed})
            continue
        del plain[entry.original]
        stem = PREFIX + entry.original.removesuffix(".weight")
        fields = encoded(matrices[entry.original])
        written |= {stem + suffix: tensor.cpu() for suffix, tensor in fields.items()}
        lost.inputs += [name for name in names if not _as_theirs(packed[name])]  # type: ignore[arg-type]
    return written | _halved(plain), lost


def _lost(model: nn.Module) -> Lost:
    """Return what of the model is no layer."""
    return Lost(
        tables=list(submodules(model, CachedFeature)),
        products=[name.rpartition(".")[0] for name in submodules(model, ProductQuantizers)],
        corrections=len(submodules(model, Correction)),
    )


def lines(lost: Lost) -> Iterator[str]:
    """Yield what is left out, a line for each kind."""
    for reason, names in lost.half.items():
        yield f"{len(names)} layers in half precision ({reason}): {', '.join(names)}"
    kinds = {
        "layers have grids of each token in the place of their own": lost.inputs,
        "tables of temporal features are left out": lost.tables,
        "modules have attention products in floating point": lost.products,
    }
    for kind, names in kinds.items():
        if names:
            yield f"{len(names)} {kind}: {', '.join(names)}"
    if lost.corrections:
        yield "the correction of the prediction is left out"


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
    return {"files": [FILE], "int8": count, "dtype": "".join(halves), "left_out": list(lines(lost))}
