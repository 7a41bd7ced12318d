"""What a pipeline computes with beside its denoiser: text encoders, and the two halves of its autoencoder."""

import sys
from collections.abc import Iterator, Mapping

from diffusers import DiffusionPipeline, ModelMixin
from torch import nn

from tfmq.integrations.diffusers.precision import component_modules
from tfmq.models.denoiser import Timeless
from tfmq.nn.swap import networks_of

# Names of the halves of an autoencoder, which its own `encode` and `decode` call, tile by tile where they are
# told to. Few weights are outside of them.
HALVES = ("decoder", "encoder")


def find_networks(
    pipeline: DiffusionPipeline, denoisers: Mapping[str, object]
) -> tuple[dict[str, dict[str, Timeless]], dict[str, str]]:
    """Return the networks of each component that can be quantized, by name, and of every other component with
    weights why it cannot; `denoisers` are neither.

    A decoder is called `vae.decoder`, a text encoder as its component.
    """
    found, left = {}, {}
    for name, component in component_modules(pipeline).items():
        if name in denoisers:
            continue
        reason = _reason(component)
        networks = {} if reason else dict(_networks(name, component))
        if networks:
            found[name] = networks
        else:
            left[name] = reason or "it is no decoder, encoder of images or encoder of text"
    return found, left


def _reason(component: nn.Module) -> str:
    """Return why a component cannot be quantized, whatever is in it; nothing where it may."""
    if networks_of(component):
        return "it is quantized already"
    if not isinstance(component, ModelMixin) and not _reads_text(component):
        return f"a {type(component).__name__} has no form on disk that tfmq knows"
    if getattr(component, "hf_quantizer", None) is not None:
        return "it is quantized by another method"
    return ""


def _reads_text(component: nn.Module) -> bool:
    """Whether a component is a text encoder of transformers, which need not be installed."""
    if "transformers.modeling_utils" not in sys.modules:
        return False
    from tfmq.integrations.text import reads_text

    return reads_text(component)


def _networks(name: str, component: nn.Module) -> Iterator[tuple[str, Timeless]]:
    if _reads_text(component):
        yield name, Timeless(component)
    children = dict(component.named_children())
    for half in HALVES if callable(getattr(component, "decode", None)) else ():
        if half in children:
            yield f"{name}.{half}", Timeless(children[half])
