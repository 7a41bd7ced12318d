"""A stock denoiser of the size that an original file has, and the places of its tensors."""

from collections.abc import Mapping

import diffusers
from accelerate import init_empty_weights
from diffusers import ModelMixin
from torch import Tensor

from tfmq.integrations.diffusers.original.encoders import shapes_of
from tfmq.integrations.diffusers.original.families import Family
from tfmq.integrations.diffusers.original.rows import Rows
from tfmq.integrations.diffusers.original.tables import TABLES


def stock_denoiser(family: Family, tensors: Mapping[str, Tensor]) -> ModelMixin:
    """Return the denoiser of a family, sized as its original `tensors` say, without weights.

    Raises:
        ValueError: a tensor is missing, or of an impossible shape.
    """
    config = family.configuration(shapes_of(tensors))
    if family.sample_size is not None:
        config["sample_size"] = family.sample_size
    with init_empty_weights():
        model: ModelMixin = getattr(diffusers, family.denoiser).from_config(config)
    return model.eval()


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
