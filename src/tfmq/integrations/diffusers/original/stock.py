"""A stock denoiser of the size that an original file has, and the places of its tensors."""

from collections.abc import Mapping
from typing import Any

import diffusers
from accelerate import init_empty_weights
from diffusers import ModelMixin
from torch import Tensor

from tfmq.integrations.diffusers.original.encoders import shapes_of
from tfmq.integrations.diffusers.original.families import Family
from tfmq.integrations.diffusers.original.files import ILL_FITTING
from tfmq.integrations.diffusers.original.rows import Rows
from tfmq.integrations.diffusers.original.tables import TABLES


def _built(family: Family, config: Mapping[str, Any]) -> ModelMixin:
    with init_empty_weights():
        model: ModelMixin = getattr(diffusers, family.denoiser).from_config(config)
    return model.eval()


def stock_denoiser(
    family: Family, tensors: Mapping[str, Tensor], like: Mapping[str, Any] | None = None
) -> ModelMixin:
    """Return the denoiser of a family, sized as its original `tensors` say, without weights.

    What shapes do not say, such as the number of heads, is as `like` has it, the configuration of another
    denoiser, if the tensors of both have the same shapes; else as in the published models.

    Raises:
        ValueError: a tensor is missing, or of an impossible shape, or `like` describes no model.
    """
    config = family.configuration(shapes_of(tensors))
    if family.sample_size is not None:
        config["sample_size"] = family.sample_size
    model = _built(family, config)
    if like is None:
        return model
    try:
        other = _built(family, like)
    except (*ILL_FITTING, ValueError) as error:
        raise ValueError(
            f"the {family.component} of the base has an impossible configuration: {error}"
        ) from error
    same = shapes_of(model.state_dict()) == shapes_of(other.state_dict())
    return other if same else model


def lengths_of(model: ModelMixin) -> dict[str, int]:
    """Return the rows of each tensor of a model."""
    return {name: tensor.shape[0] for name, tensor in model.state_dict().items() if tensor.ndim}


def placed(family: Family, model: ModelMixin, tensors: Mapping[str, Tensor]) -> list[Rows]:
    """Return the table of a family's `model`.

    Raises:
        ValueError: one of the original `tensors` has no place in it; lists them.
    """
    table = TABLES[family.denoiser](model)
    if left := sorted(tensors.keys() - {entry.original for entry in table}):
        raise ValueError(f"{len(left)} tensors have no place in {family.title}: {', '.join(left[:8])}")
    return table
