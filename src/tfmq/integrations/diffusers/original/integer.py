"""The denoiser of a single file whose linear layers are integers already, in the format of tfmq: the same
codes, scales and rotations.
"""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from tfmq.integrations.diffusers.architecture import configuration
from tfmq.integrations.diffusers.original.families import Family
from tfmq.integrations.diffusers.original.fit import fit
from tfmq.integrations.diffusers.original.rows import Rows, from_original
from tfmq.integrations.diffusers.original.stock import lengths_of, placed, stock_denoiser
from tfmq.integrations.diffusers.quantizer import mark_quantized
from tfmq.nn.structure import assemble
from tfmq.nn.swap import STEPS
from tfmq.numerics.packing import pack_unsigned
from tfmq.storage.checkpoint import seal
from tfmq.storage.comfy import Int8Layer
from tfmq.version import __version__

BITS, MIDDLE = 8, 128
# Each token has the grid of its own largest value, as in the files.
INPUT: Mapping[str, Any] = {"bits": BITS, "symmetric": True, "dynamic": "token", "segments": []}


def _parts(table: list[Rows], layers: Mapping[str, Int8Layer]) -> dict[str, Int8Layer]:
    """Return what each layer of the diffusers model is part of."""
    return {
        part.removesuffix(".weight"): layers[name]
        for entry in table
        if (name := entry.original.removesuffix(".weight")) in layers and entry.original.endswith(".weight")
        for part in entry.parts
    }


def _structure(parts: Mapping[str, Int8Layer], model: ModelMixin) -> dict[str, Any]:
    """Return the structure of a denoiser with these layers.

    Raises:
        ValueError: one is no linear layer in diffusers' model.
    """
    groups: dict[tuple[int, bool], list[str]] = {}
    for name, layer in parts.items():
        if not isinstance(module := model.get_submodule(name), nn.Linear):
            raise ValueError(f"{name} is int8 and a {type(module).__name__}; linear layers alone are read so")
        groups.setdefault((layer.rotated, layer.full_input), []).append(name)
    layers = [
        {
            "bits": BITS,
            "symmetric": True,
            "segments": [],
            "input": None if full else dict(INPUT),
            **({"rotated": rotated} if rotated else {}),
            "names": names,
        }
        for (rotated, full), names in groups.items()
    ]
    empty: dict[str, list[Any]] = {"products": [], "tables": [], "skipped": []}
    # No part depends on the timestep.
    return {"steps": 1, "networks": [""], "layers": layers, **empty}


def integer_denoiser(
    family: Family, tensors: Mapping[str, Tensor], layers: Mapping[str, Int8Layer], *, name: str
) -> ModelMixin:
    """Return the quantized denoiser of a family, which saves with its manifest. Its other parameters are in
    float32.

    Args:
        family: its layout.
        tensors: of the original, without their prefix; weights of `layers` are their codes.
        layers: by their original names.
        name: of the file, for its provenance.

    Raises:
        ValueError: keys do not fit; lists them.
    """
    model = stock_denoiser(family, tensors)
    table, lengths = placed(family, model, tensors), lengths_of(model)
    parts = _parts(table, layers)
    scales = {f"{name}.weight": layer.scale for name, layer in layers.items()}
    converted = from_original(tensors, table, lengths)
    scaled = from_original(scales, table, lengths)
    structure = _structure(parts, model)
    state = {f"{STEPS}.timesteps": torch.zeros(1)}
    for key, tensor in converted.items():
        layer = key.removesuffix(".weight")
        if layer in parts and key != layer:
            codes = (tensor.to(torch.int16) + MIDDLE).to(torch.uint8)
            state |= {f"{layer}.packed": pack_unsigned(codes, bits=BITS), f"{layer}.scale": scaled[key]}
        else:
            state[key] = tensor.float()
    assemble(model, structure)
    fit(model, state, assign=True).requires_grad_(False)
    provenance = {
        "imported": {"format": "comfy", "file": name},
        "tfmq": __version__,
        "torch": torch.__version__,
    }
    fields = {"quant_method": "tfmq", "structure": structure, "provenance": provenance}
    fields["architecture"] = configuration(model)
    mark_quantized(model, seal(model.state_dict(), fields, table=False))
    return model
