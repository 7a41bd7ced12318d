"""A UNet with one number of heads at all widths, where diffusers' has one width of a head."""

import inspect
from collections.abc import Callable
from typing import Any

from diffusers import UNet2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention_processor import Attention

from tfmq.nn.submodules import submodules


def _configured(init: Callable[..., None]) -> Any:
    """Register the arguments of `init` as diffusers does, which reads them from its signature: the stock
    model's, and its own in their place.
    """
    stock, own = (inspect.signature(function).parameters for function in (UNet2DModel.__init__, init))
    named = {
        name: parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for name, parameter in stock.items()
        if name != "self"
    }
    named |= {
        name: parameter for name, parameter in own.items() if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    init.__signature__ = inspect.Signature([own["self"], *named.values()])  # type: ignore[attr-defined]
    return register_to_config(init)


class UNet2DHeadsModel(UNet2DModel):
    """diffusers' `UNet2DModel` with `num_attention_heads` heads in every attention, each as wide as the level
    divided by that number.

    So were unconditional latent-diffusion models with `num_heads` in their configuration trained (Rombach et
    al., 2022: LSUN-Churches). All other arguments are those of `UNet2DModel`, by name; `attention_head_dim`
    is None.

    Raises:
        ValueError: `attention_head_dim` is given, or the width of an attention is no multiple of the number
            of heads.
    """

    @_configured
    def __init__(self, *, num_attention_heads: int, attention_head_dim: None = None, **stock: Any) -> None:
        if attention_head_dim is not None:
            raise ValueError(
                f"attention_head_dim must be None, not {attention_head_dim}: "
                f"num_attention_heads ({num_attention_heads}) decides it"
            )
        super().__init__(attention_head_dim=None, **stock)
        for name, module in submodules(self, Attention).items():
            width, rest = divmod(module.inner_dim, num_attention_heads)
            if rest:
                raise ValueError(
                    f"num_attention_heads: {num_attention_heads} does not divide "
                    f"{module.inner_dim}, the width of {name}"
                )
            module.heads = module.sliceable_head_dim = num_attention_heads
            module.scale = width**-0.5
