"""Quantized layers of safetensors files as ComfyUI stores them (docs/comfy.md).

`LAYER.comfy_quant`, a JSON object as bytes, or an entry of the header's `_quantization_metadata`, says the
format of `LAYER.weight`, and `LAYER.weight_scale` its scales. Files of the older "scaled fp8" have one tensor
`scaled_fp8` and `LAYER.scale_weight` instead.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tfmq.errors import LONGEST, cut, shown
from tfmq.numerics.packing import pack_unsigned
from tfmq.numerics.rotation import is_group

from .container import once
from .errors import ForeignFileError, TensorMismatchError

__all__ = ["Int8Layer", "encoded", "split_layers"]

METADATA = "_quantization_metadata"
MARK, SCALE, INPUT_SCALE = ".comfy_quant", ".weight_scale", ".input_scale"
SCALED, OLD_SCALE, OLD_INPUT = "scaled_fp8", ".scale_weight", ".scale_input"
# What a layer wants of attention, which is another matter than its weights.
ATTENTION = ".comfy_attention.config"
INT8 = "int8_tensorwise"
FLOATS = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}
# Bytes of a layer's description, and channels of a rotated group: far more than any file has.
LONGEST_MARK, MOST_ROTATED, DEFAULT_GROUP = 4096, 2**16, 256
# Characters of the description of all layers in a header: a thousand layers take a hundredth of that.
MOST_TEXT = 2**23
# Each token has the grid of its own largest value.
INPUT: Mapping[str, Any] = {"bits": 8, "symmetric": True, "dynamic": "token", "segments": []}
Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Int8Layer:
    """A linear layer of signed bytes.

    Attributes:
        codes: the weight's integers, int8 `[C_out, C_in]`; if `rotated`, of groups of rotated channels.
        scale: the scale of each row, float32 `[C_out, 1]`, positive and finite.
        rotated: number of channels of a rotated group; 0 means that none are rotated.
        full_input: whether the file asks for a product in floating point, its input left as it comes.
    """

    codes: Tensor
    scale: Tensor
    rotated: int = 0
    full_input: bool = False

    def described(self) -> dict[str, Any]:
        """Return the entry of the layer in a structure (docs/format.md)."""
        rotated = {"rotated": self.rotated} if self.rotated else {}
        given = None if self.full_input else dict(INPUT)
        return {"bits": 8, "symmetric": True, "segments": [], "input": given, **rotated}

    def stored(self) -> dict[str, Tensor]:
        """Return its tensors in that format, by name; each has a row for each of the weight's."""
        codes = (self.codes.to(torch.int16) + 128).to(torch.uint8)
        return {"packed": pack_unsigned(codes, bits=8), "scale": self.scale}


def encoded(layer: Int8Layer) -> dict[str, Tensor]:
    """Return what stands beside the weight of a layer, by suffix of its name."""
    described: dict[str, Any] = {"format": INT8}
    if layer.rotated:
        described |= {"convrot": True, "convrot_groupsize": layer.rotated}
    if layer.full_input:
        described["full_precision_matrix_mult"] = True
    mark = torch.tensor(list(json.dumps(described).encode()), dtype=torch.uint8)
    return {".weight": layer.codes, SCALE: layer.scale, MARK: mark}


def split_layers(
    tensors: Tensors, metadata: Mapping[str, str], *, source: object
) -> tuple[dict[str, Tensor], dict[str, Int8Layer]]:
    """Return the tensors of a file without what describes quantized ones, and its layers of int8 by name.

    The weights of the latter stay among the tensors, as integers. Those of float8 become float32, scaled: the
    nearest values that float32 has, 24 bits of each. Their scales of inputs are left out.

    Raises:
        ForeignFileError: a description that cannot be read, or of a format that is not read here.
        TensorMismatchError: a weight or a scale of another dtype, shape or value than its description needs,
            or one without the other.
    """
    file = _File(dict(tensors), str(source))
    for layer, described in file.descriptions(metadata):
        if not isinstance(described, Mapping):
            raise file.foreign(layer, f"is {shown(described)}, not an object")
        kind = described.get("format")
        if kind == INT8:
            file.int8(layer, described)
        elif isinstance(kind, str) and kind in FLOATS:
            file.float8(layer, FLOATS[kind])
        else:
            known = ", ".join((INT8, *FLOATS))
            raise file.foreign(layer, f"has the format {shown(kind)}; {known} are read")
    file.check_rest()
    return file.tensors, file.layers


class _File:
    """The tensors of a file, from which descriptions are taken one by one."""

    def __init__(self, tensors: dict[str, Tensor], source: str) -> None:
        self.tensors, self.source = tensors, source
        self.layers: dict[str, Int8Layer] = {}

    def foreign(self, layer: str, found: str) -> ForeignFileError:
        """Return the error of a description."""
        return ForeignFileError(f"{self.source}: the description of {cut(layer, LONGEST)} {found}")

    def wrong(self, name: str, found: str) -> TensorMismatchError:
        """Return the error of a tensor."""
        return TensorMismatchError(f"{self.source}: {cut(name, LONGEST)} {found}; copy or download it again")

    def descriptions(self, metadata: Mapping[str, str]) -> Iterator[tuple[str, Any]]:
        """Yield the layers with their descriptions, and take these out."""
        marks = {name.removesuffix(MARK): self._mark(name) for name in self.tensors if name.endswith(MARK)}
        listed = self._listed(metadata) if METADATA in metadata else self._old()
        for layer, described in listed.items():
            # Some writers list formats alone.
            full = {"format": described} if isinstance(described, str) else described
            if marks.setdefault(layer, full) != full:
                raise self.foreign(
                    layer, f"is {shown(marks[layer])} beside it and {shown(full)} in the header"
                )
        for name in list(self.tensors):
            if name.endswith((MARK, ATTENTION)):
                del self.tensors[name]
        yield from marks.items()

    def _mark(self, name: str) -> Any:
        mark = self.tensors[name]
        if mark.dtype != torch.uint8 or mark.ndim != 1 or mark.numel() > LONGEST_MARK:
            found = f"is {mark.dtype} {list(mark.shape)}, not at most {LONGEST_MARK} bytes"
            raise self.wrong(name, found)
        return self._json(name, bytes(mark.tolist()).decode(errors="replace"))

    def _json(self, name: str, text: str) -> Any:
        try:
            if len(text) > MOST_TEXT:
                raise ValueError(f"{len(text)} characters, more than {MOST_TEXT}")
            return json.loads(text, object_pairs_hook=once)
        except (ValueError, RecursionError) as error:
            raise self.foreign(name, f"is not JSON ({cut(str(error), LONGEST)})") from error

    def _listed(self, metadata: Mapping[str, str]) -> Mapping[str, Any]:
        match self._json(METADATA, metadata[METADATA]):
            case {"layers": dict() as layers}:
                return layers
            case found:
                raise self.foreign(METADATA, f"is {shown(found)}, not an object with layers")

    def _old(self) -> Mapping[str, Any]:
        """Return the layers of a file with scaled fp8 as of 2025, renamed as they are today."""
        marks = [name for name in self.tensors if name.rpartition(".")[2] == SCALED]
        found: dict[str, Any] = {}
        for name in marks:
            two, prefix = self.tensors.pop(name).numel() == 2, name.removesuffix(SCALED)
            full = {"full_precision_matrix_mult": True} if two else {}
            for scale in [key for key in self.tensors if key.startswith(prefix) and key.endswith(OLD_SCALE)]:
                layer = scale.removesuffix(OLD_SCALE)
                self.tensors[layer + SCALE] = self.tensors.pop(scale)
                self.tensors.pop(layer + OLD_INPUT, None)
                found[layer] = {"format": "float8_e4m3fn", **full}
        return found

    def _weight(self, layer: str, dtypes: tuple[torch.dtype, ...]) -> Tensor:
        name = f"{layer}.weight"
        if name not in self.tensors:
            raise self.wrong(name, "is missing, though it is described")
        weight = self.tensors[name]
        if weight.dtype not in dtypes or weight.ndim != 2 or 0 in weight.shape:
            wanted = " or ".join(map(str, dtypes))
            raise self.wrong(name, f"is {weight.dtype} {list(weight.shape)}, not a matrix of {wanted}")
        return weight

    def _scale(self, layer: str, rows: int) -> Tensor:
        """Return the scales of the rows, `[rows, 1]`; one for all counts for each."""
        name = layer + SCALE
        if name not in self.tensors:
            raise self.wrong(name, "is missing, though its layer is described")
        scale = self.tensors.pop(name)
        shapes = ((), (1,), (1, 1), (rows,), (rows, 1))
        if not scale.is_floating_point() or tuple(scale.shape) not in shapes:
            raise self.wrong(
                name, f"is {scale.dtype} {list(scale.shape)}, not a scale or one for each of {rows} rows"
            )
        wide = scale.float().reshape(-1, 1).expand(rows, 1).contiguous()
        bad = ~(torch.isfinite(wide) & (wide > 0)).flatten()
        if bool(bad.any()):
            row = int(bad.int().argmax())
            raise self.wrong(
                name, f"has a scale that is not positive and finite: {float(wide[row])} in row {row}"
            )
        return wide

    def int8(self, layer: str, described: Mapping[str, Any]) -> None:
        """Take a layer of signed bytes."""
        codes = self._weight(layer, (torch.int8,))
        inner = described.get("params")
        fields = {**(inner if isinstance(inner, Mapping) else {}), **described}
        rotated, full = fields.get("convrot", False), fields.get("full_precision_matrix_mult", False)
        if not (isinstance(rotated, bool) and isinstance(full, bool)):
            raise self.foreign(layer, f"is {shown(described)}, whose flags are not true or false")
        size = self._group(layer, fields.get("convrot_groupsize", DEFAULT_GROUP), codes) if rotated else 0
        self.layers[layer] = Int8Layer(codes, self._scale(layer, len(codes)), size, full)
        self.tensors.pop(layer + INPUT_SCALE, None)

    def _group(self, layer: str, size: Any, codes: Tensor) -> int:
        if type(size) is not int or not is_group(size) or size > MOST_ROTATED:
            raise self.foreign(layer, f"has the group size {shown(size)}, not a power of four")
        if codes.shape[1] % size:
            raise self.foreign(
                layer, f"rotates {size} channels together, which do not divide {codes.shape[1]}"
            )
        return size

    def float8(self, layer: str, dtype: torch.dtype) -> None:
        """Replace a layer of small floats, which some files call bytes, by its values."""
        weight = self._weight(layer, (dtype, torch.uint8))
        if layer + SCALE not in self.tensors:
            self.tensors[layer + SCALE] = torch.ones(())
        values = weight.view(dtype).float() * self._scale(layer, len(weight))
        if not bool(torch.isfinite(values).all()):
            raise self.wrong(f"{layer}.weight", "has values that are not finite")
        self.tensors[f"{layer}.weight"] = values
        self.tensors.pop(layer + INPUT_SCALE, None)

    def check_rest(self) -> None:
        """Refuse quantized tensors that nothing describes."""
        beside = (SCALE, INPUT_SCALE, OLD_SCALE, OLD_INPUT, ".weight_scale_2", ".pre_quant_scale")
        for name, tensor in self.tensors.items():
            bare = tensor.dtype == torch.int8 and name.removesuffix(".weight") not in self.layers
            if bare or name.endswith(beside):
                raise self.wrong(name, "belongs to a quantized layer that nothing describes")
