"""LoRA adapters: fused into the weights before quantization, refused after it."""

from typing import Any, NoReturn

from torch import nn

ENTRIES = ("load_lora_adapter", "add_adapter")
ADVICE = "load the LoRA into the full-precision pipeline, call pipeline.fuse_lora() and pipeline.unload_lora_weights(), and quantize that"


def _refused(*_: Any, **__: Any) -> NoReturn:
    raise ValueError(f"the model is quantized, and integer layers take no LoRA; {ADVICE}")


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
