"""The denoiser of a single file whose linear layers are integers already, in the format of tfmq: the same
codes, scales and rotations.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from tfmq.integrations.diffusers.architecture import uncalibrated_manifest
from tfmq.integrations.diffusers.original.families import Family
from tfmq.integrations.diffusers.original.fit import fit
from tfmq.integrations.diffusers.original.rows import Rows, from_original
from tfmq.integrations.diffusers.original.stock import lengths_of, placed, stock_denoiser
from tfmq.integrations.diffusers.quantizer import mark_quantized
from tfmq.nn.structure import assemble
from tfmq.nn.swap import STEPS


class IntegerLayer(Protocol):
    """A linear layer of a foreign file that the format of tfmq has exactly."""

    def described(self) -> dict[str, Any]:
        """Return its entry in a structure, without names (docs/format.md)."""

    def stored(self) -> Mapping[str, Tensor]:
        """Return its tensors in that format, such as `packed` and `scale`: each has a row for each of the
        weight's, and is cut where the weight is.
        """


def _parts(table: list[Rows], layers: Mapping[str, IntegerLayer]) -> dict[str, IntegerLayer]:
    """Return what each layer of the diffusers model is part of."""
    return {
        part.removesuffix(".weight"): layers[name]
        for entry in table
        if (name := entry.original.removesuffix(".weight")) in layers and entry.original.endswith(".weight")
        for part in entry.parts
    }


def _structure(parts: Mapping[str, IntegerLayer], model: ModelMixin) -> dict[str, Any]:
    """Return the structure of a denoiser with these layers.

    Raises:
        ValueError: one is no linear layer in diffusers' model.
    """
    groups: dict[str, dict[str, Any]] = {}
    for name, layer in parts.items():
        if not isinstance(module := model.get_submodule(name), nn.Linear):
            kind = type(module).__name__
            raise ValueError(f"{name} is quantized and a {kind}; linear layers alone are read so")
        described = layer.described()
        groups.setdefault(repr(described), {**described, "names": []})["names"].append(name)
    empty: dict[str, list[Any]] = {"products": [], "tables": [], "skipped": []}
    # No part depends on the timestep.
    return {"steps": 1, "networks": [""], "layers": list(groups.values()), **empty}


def _state(
    layers: Mapping[str, IntegerLayer], table: list[Rows], lengths: Mapping[str, int]
) -> dict[str, Tensor]:
    """Return the tensors of the layers by their names in diffusers' model."""
    kinds: dict[str, dict[str, Tensor]] = {}
    for name, layer in layers.items():
        for kind, tensor in layer.stored().items():
            kinds.setdefault(kind, {})[f"{name}.weight"] = tensor
    return {
        f"{part.removesuffix('.weight')}.{kind}": tensor
        for kind, tensors in kinds.items()
        for part, tensor in from_original(tensors, table, lengths).items()
    }


def integer_denoiser(
    family: Family,
    tensors: Mapping[str, Tensor],
    layers: Mapping[str, IntegerLayer],
    *,
    source: Mapping[str, str],
    like: Mapping[str, Any] | None = None,
) -> ModelMixin:
    """Return the quantized denoiser of a family, which saves with its manifest. Its other parameters are in
    float32.

    Args:
        family: its layout.
        tensors: tensors of the original by their names without the prefix; weights of `layers` are codes.
        layers: the quantized layers by their original names.
        source: the format and the name of the file, for its provenance.
        like: see `stock_denoiser`.

    Raises:
        ValueError: keys do not fit; lists them.
    """
    model = stock_denoiser(family, tensors, like)
    table, lengths = placed(family, model, tensors), lengths_of(model)
    plain = {
        name: tensor.float() for name, tensor in tensors.items() if name.removesuffix(".weight") not in layers
    }
    structure = _structure(_parts(table, layers), model)
    state = {
        f"{STEPS}.timesteps": torch.zeros(1),
        **from_original(plain, table, lengths),
        **_state(layers, table, lengths),
    }
    assemble(model, structure)
    fit(model, state, assign=True).requires_grad_(False)
    mark_quantized(model, uncalibrated_manifest(model, structure, {"imported": dict(source)}))
    return model
