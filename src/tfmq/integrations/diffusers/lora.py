"""LoRA beside integers: peft's own adapter layers around packed ones.

peft computes `base(x) + scaling B (A x)` around any base layer, by one class for linear layers and one for
each kind of convolution. All that these ask of a base layer in advance is its geometry, which a stock layer
of uninitialised values tells them; the packed layer then stands in its place. Strength, choice and removal
of adapters are peft's.
"""

from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import layer as stock
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import nn

from tfmq.nn.branch import SideBranch
from tfmq.nn.packed_layer import PackedLayer
from tfmq.nn.temporal import CachedFeature, SkippedLayer
from tfmq.nn.transform import opposed

# Kinds of operations that peft has no adapter for.
UNADAPTED = ("transposed convolution",)


def stock_of(layer: nn.Module) -> nn.Module:
    """Return a stock layer of the shape of a packed one, with values of whatever is in memory.

    Raises:
        ValueError: peft has no adapters for its kind.
    """
    if not isinstance(layer, PackedLayer):
        return layer
    if layer.operation.kind in UNADAPTED:
        raise ValueError(f"peft has no LoRA for a {layer.operation.kind}; leave it out of the adapter")
    bias = layer.bias is not None
    dtype = layer.scale.dtype if layer.bias is None else layer.bias.dtype
    return layer.operation.module(layer.shape, bias=bias, device=layer.scale.device, dtype=dtype)


class Beside(stock.LoraLayer):
    """What adapters of packed layers have in common, whatever their kind."""

    base_layer: Any

    def __init__(self, base_layer: nn.Module, adapter_name: str, **options: Any) -> None:
        super().__init__(stock_of(base_layer), adapter_name, **options)  # type: ignore[arg-type]
        self.base_layer = base_layer
        # The branches that stood beside the layer before adapters were merged into them.
        self.before: list[SideBranch | None] = []

    @property
    def lora_variants(self) -> dict[tuple[str, ...], None]:
        """Plain LoRA alone: others, such as DoRA, ask for the weight in full precision."""
        return {(): None}

    def update_layer(
        self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any
    ) -> None:
        """Make room for an adapter.

        Raises:
            ValueError: its first values would be those of the weight in full precision.
        """
        if isinstance(config.init_lora_weights, str) and config.init_lora_weights != "gaussian":
            raise ValueError(
                f"init_lora_weights={config.init_lora_weights!r} changes the weight of a layer, and a "
                "quantized one stays as it is; initialise by True, False or 'gaussian'"
            )
        packed = self.base_layer
        self.base_layer = stock_of(packed)
        try:
            super().update_layer(adapter_name, r, lora_alpha, config, **kwargs)
        finally:
            self.base_layer = packed

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters to the branch beside the layer, which is exact: its codes stay.

        Raises:
            ValueError: the branch shares the codes of the layer, or the adapter has a bias.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.lora_A:
                continue
            self.before.append(self.base_layer.branch)
            self.base_layer.branch = self._with(name)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Put back the branch that there was before adapters were merged."""
        if self.before:
            self.base_layer.branch = self.before[0]
        self.before.clear()
        self.merged_adapters.clear()

    def _with(self, name: str) -> SideBranch:
        layer: PackedLayer = self.base_layer
        down, up = (part.get_parameter(f"{name}.weight") for part in (self.lora_A, self.lora_B))
        operation, branch = layer.operation, layer.branch
        if self.lora_bias[name] or operation.groups > 1 or (branch is not None and branch.shared):
            raise ValueError(
                "an adapter with a bias, of grouped channels, or of a layer whose branch has int8 "
                "factors cannot be fused; leave it beside the layer, which computes the same"
            )
        # The branch reads the layer's transformed input, an adapter reads it as it comes.
        rows = opposed(down.float(), layer.factor, layer.rotated, layer.order, operation.groups)
        columns = self.scaling[name] * up.float().flatten(1)
        if branch is not None:
            rows, columns = torch.cat([branch.rows(), rows]), torch.cat([branch.mixes(), columns], dim=1)
        found = SideBranch(operation, layer.shape, len(rows), dtype="float32").to(rows.device)
        found.down.copy_(rows)
        found.up.copy_(columns)
        return found


class PackedLinear(Beside, stock.Linear):
    """An adapter around a packed linear layer."""


class PackedConv1d(Beside, stock.Conv1d):
    """An adapter around a packed convolution over one axis."""


class PackedConv2d(Beside, stock.Conv2d):
    """An adapter around a packed convolution over two axes."""


class PackedConv3d(Beside, stock.Conv3d):
    """An adapter around a packed convolution over three axes."""


KINDS = (PackedLinear, PackedConv1d, PackedConv2d, PackedConv3d)


def around(target: nn.Module, adapter_name: str, **options: Any) -> nn.Module:
    """Return peft's layer around a packed one."""
    base = target.get_base_layer() if isinstance(target, stock.LoraLayer) else target
    return KINDS[max(0, len(base.shape) - 2)](base, adapter_name, **options)  # type: ignore[arg-type]


def refuse(target: nn.Module, adapter_name: str, **options: Any) -> nn.Module:
    """Refuse an adapter of a temporal feature.

    Raises:
        ValueError: its output comes from a table.
    """
    raise ValueError(
        "the LoRA changes a temporal feature, whose output comes from a table here; leave such layers out of "
        "it, or put it into codes and tables by tfmq.fuse_lora(quantized, full_precision)"
    )


MAPPING: dict[type[nn.Module], Callable[..., nn.Module]] = {
    PackedLayer: around,
    CachedFeature: refuse,
    SkippedLayer: refuse,
}


def admit(config: Any) -> Any:
    """Return a configuration of peft that knows packed layers, if it is one of a LoRA."""
    if isinstance(config, LoraConfig):
        config._register_custom_module(MAPPING)  # type: ignore[arg-type]
    return config
