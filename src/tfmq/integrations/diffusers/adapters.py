"""LoRA adapters: fused before quantization, or into a quantized model by way of the full-precision one;
refused beside integer layers.
"""

from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from tfmq.calibration.drift import LayerDrift, drift, extremes, static_inputs
from tfmq.models.sampler import Sampler
from tfmq.nn.plan import packed_layers, packed_weights
from tfmq.nn.swap import steps_of
from tfmq.nn.temporal import cached_features
from tfmq.temporal.block import TemporalBlock
from tfmq.temporal.rebake import rebake_tables

ENTRIES = ("load_lora_adapter", "add_adapter")
ADVICE = (
    "load the LoRA into the full-precision pipeline, call pipeline.fuse_lora() "
    "and pipeline.unload_lora_weights(), and quantize that"
)


def _refused(*_: Any, **__: Any) -> NoReturn:
    raise ValueError(
        f"the model is quantized, and integer layers take no LoRA; {ADVICE}, or "
        "fuse it with tfmq.fuse_lora(quantized, full_precision)"
    )


def refuse_adapters(model: nn.Module) -> None:
    """Make a quantized diffusers model answer every attempt to add an adapter with what to do instead."""
    for name in ENTRIES:
        setattr(model, name, _refused)


def check_fused(model: nn.Module) -> None:
    """Refuse to quantize a model with adapters beside its layers.

    Raises:
        ValueError: there are some; the architecture that is loaded later would not have them.
    """
    if getattr(model, "peft_config", None):
        raise ValueError(f"{type(model).__name__} carries LoRA adapters beside its layers; {ADVICE}")


def _fused(model: Any, scale: float) -> dict[str, Tensor]:
    """Fuse the adapters of a full-precision model, in place, and return the weights of the layers that had
    one.
    """
    adapted = [
        name
        for name, child in model.named_modules()
        if isinstance(getattr(child, "base_layer", None), nn.Module)
    ]
    model.fuse_lora(lora_scale=scale)
    model.unload_lora()
    return {name: model.get_submodule(name).weight.detach() for name in adapted}


@torch.no_grad()
def fuse_adapters(module: nn.Module, full: Sampler, *, steps: int, scale: float) -> tuple[LayerDrift, ...]:
    """Put the adapters of the full-precision denoiser of `full` into the quantized `module`, both in place;
    return what leaves its range.

    One image is drawn without and one with the adapters. Layers that an adapter changes are rounded to
    nearest, on grids of their own; tables are filled from the fused model; ranges of activations stay.

    Raises:
        ValueError: there are no adapters, or one is on a layer that the quantized model does not have.
    """
    stock: Any = full.denoiser.module
    if not getattr(stock, "peft_config", None):
        raise ValueError(
            f"{type(stock).__name__} carries no LoRA; load one into the "
            "full-precision pipeline first, and do not fuse it"
        )
    context, layers = steps_of(module), packed_layers(module)
    stock.disable_lora()
    with extremes(full.denoiser, layers, context) as base:
        full.run(range(1), steps=steps, seed=0)
    stock.enable_lora()
    weights = _fused(stock, scale)
    if unknown := sorted(weights.keys() - {name for name, _ in module.named_modules()}):
        raise ValueError(
            f"the LoRA changes {unknown[0]}, which the quantized model does "
            "not have; pass the model that it was made from"
        )
    with extremes(full.denoiser, layers, context) as changed:
        full.run(range(1), steps=steps, seed=0)
    packed = packed_weights(module)
    for name, weight in weights.items():
        if name in packed:
            packed[name].round(weight)
        else:
            module.get_parameter(f"{name}.weight").copy_(weight)
    if cached_features(module):
        rebake_tables(module, TemporalBlock(full.denoiser, full.example()), context.timesteps.clone())
    return drift(static_inputs(layers), context, base, changed)
