"""LoRA adapters: fused before quantization, beside the layers of a quantized model, or in its codes by way of
the full-precision one.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from tfmq.calibration.drift import LayerDrift, drift, extremes, static_inputs
from tfmq.models.sampler import Sampler
from tfmq.nn.plan import packed_layers, packed_weights
from tfmq.nn.swap import adapted, is_quantized, release_parts, steps_of
from tfmq.nn.temporal import cached_features
from tfmq.storage.directory import METHOD
from tfmq.temporal.block import TemporalBlock
from tfmq.temporal.rebake import rebake_tables

ADVICE = (
    "load the LoRA into the full-precision pipeline, call pipeline.fuse_lora() "
    "and pipeline.unload_lora_weights(), and quantize that"
)


def _admitted(config: Any) -> Any:
    # peft is imported by whoever has an adapter.
    from tfmq.integrations.diffusers.lora import admit

    return admit(config)


def _created(create: Callable[..., Any]) -> Callable[..., Any]:
    return wraps(create)(lambda *args, **kwargs: _admitted(create(*args, **kwargs)))


def _added(add: Callable[..., Any]) -> Callable[..., Any]:
    return wraps(add)(lambda self, config, *args, **kwargs: add(self, _admitted(config), *args, **kwargs))


def _loaded(load: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(load)
    def attempt(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return load(self, *args, **kwargs)
        except BaseException:
            # What was refused half-way leaves peft's layers around some, without an adapter.
            if is_quantized(self) and not adapted(self):
                self.unload_lora()
            raise

    return attempt


def _fusing(fuse: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(fuse)
    def anew(self: Any, *args: Any, **kwargs: Any) -> Any:
        if is_quantized(self):
            release_parts(self)
        return fuse(self, *args, **kwargs)

    return anew


def admit_adapters() -> None:
    """Make diffusers' loaders put adapters beside packed layers, by peft's own arithmetic.

    peft has a register of classes for layers that it does not know, one for each configuration, which
    diffusers makes where it loads an adapter. Graphs of engines hold no branch that comes later, so that
    fusing takes a model back to the simulation.
    """
    from diffusers.loaders import lora_base, peft

    for owner, name, change in (
        (peft, "_create_lora_config", _created),
        (lora_base, "_create_lora_config", _created),
        (peft.PeftAdapterMixin, "load_lora_adapter", _loaded),
        (peft.PeftAdapterMixin, "add_adapter", _added),
        (peft.PeftAdapterMixin, "fuse_lora", _fusing),
        (peft.PeftAdapterMixin, "unfuse_lora", _fusing),
    ):
        known = getattr(owner, name)
        if not getattr(known, METHOD, False):
            changed = change(known)
            setattr(changed, METHOD, True)
            setattr(owner, name, changed)


def check_fused(model: nn.Module) -> None:
    """Refuse to quantize a model with adapters beside its layers.

    Raises:
        ValueError: there are some; the architecture that is loaded later would not have them.
    """
    if adapted(model):
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
    if not adapted(stock):
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
