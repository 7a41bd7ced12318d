"""Quantization while diffusers loads a model: each weight becomes nearest codes as it is read, and nothing is
calibrated.

    UNet2DConditionModel.from_pretrained(FOLDER, quantization_config=TFMQConfig(bits="w8a8"))

Without calibration there are no ranges of activations and no temporal tables. Linear layers find the grid of
each token at run time; convolutions, which have no such grid, compute with quantized weights in floating
point. `tfmq quantize` gives better images and faster convolutions, and takes a job instead of seconds.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tfmq.nn.layer import CalibratedLayer, pack
from tfmq.nn.operation import operation_of, weight_of
from tfmq.nn.packed_layer import PackedLayer
from tfmq.nn.structure import describe
from tfmq.nn.swap import attach_steps, replace_module
from tfmq.numerics.grids import IntegerFormat
from tfmq.quantizers.dynamic import DynamicQuantizer
from tfmq.quantizers.steps import StepContext
from tfmq.quantizers.weight import fit_grid


class Bits(NamedTuple):
    """Bits of weights and of the inputs of linear layers, None for full precision."""

    weights: int
    activations: int | None


BITS: Mapping[str, Bits] = {
    "w8a8": Bits(8, 8),
    "w4a8": Bits(4, 8),
    "w8a32": Bits(8, None),
    "w4a32": Bits(4, None),
}
# The first and the last layer keep eight bits, as in every preset.
ENDS = 8
# Channels of a group of 4-bit weights. Their ranges are not searched for, which would take minutes where
# loading takes seconds; small groups make up for it.
GROUP = 32
# Largest share of a model's weights that keeps eight bits beside the ends, in the smallest layers. Those that
# embed the timestep, which all others read, are among them.
SMALL = 0.25


def bits_of(name: str) -> Bits:
    """Return the bits that a name asks for.

    Raises:
        ValueError: there are none of that name.
    """
    if name not in BITS:
        raise ValueError(f"bits={name!r} is not one of {', '.join(BITS)}")
    return BITS[name]


def _smallest(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Return the smallest layers, which together have at most the share `SMALL` of the weights."""
    sizes = {name: weight_of(model.get_submodule(name)).numel() for name in names}
    order = sorted(names, key=lambda name: sizes[name])
    held = accumulate(sizes[name] for name in order)
    return [name for name, total in zip(order, held, strict=True) if total <= SMALL * sum(sizes.values())]


@torch.no_grad()
def leave_files(model: nn.Module) -> None:
    """Copy what is left in floating point, such as biases: as it was read it is a part of a shard's mapped
    file, and would keep all of that in memory.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.clone()


class AtLoad:
    """Quantizes the layers of one model while it is loaded.

    Args:
        model: stock, on the meta device.
        bits: one of `BITS`.

    Raises:
        ValueError: no such bits, or the model has no layer that can be quantized.
    """

    def __init__(self, model: nn.Module, bits: str) -> None:
        self.asked, self.bits = bits, bits_of(bits)
        names = [name for name, module in model.named_modules() if operation_of(module) is not None]
        if not names:
            raise ValueError(f"a {type(model).__name__} has no layer that tfmq quantizes; load it as it is")
        wide = {names[0], names[-1], *_smallest(model, names)}
        self.weights = {name: ENDS if name in wide else self.bits.weights for name in names}

    def takes(self, parameter: str) -> bool:
        """Whether a parameter is a weight that becomes codes."""
        layer, _, kind = parameter.rpartition(".")
        return kind == "weight" and layer in self.weights

    @torch.no_grad()
    def put(self, model: nn.Module, parameter: str, weight: Tensor, *, device: Any) -> None:
        """Put a layer with the codes of `weight`, which a file has as `parameter`, in the place of the stock
        one.

        Raises:
            ValueError: the weight holds NaN or infinity.
        """
        name = parameter.rpartition(".")[0]
        stock: Any = model.get_submodule(name)
        operation = operation_of(stock)
        assert operation is not None
        if not bool(weight.isfinite().all()):
            raise ValueError(f"{parameter} holds NaN or infinity; the file is damaged")
        bias: Tensor | None = stock.bias
        if bias is not None and bias.is_meta:
            bias = torch.zeros(bias.shape, dtype=weight.dtype, device=device)
        layer = self._layer(name, SimpleNamespace(weight=weight.to(device), bias=bias), operation)
        replace_module(model, name, layer)

    def _layer(self, name: str, source: Any, operation: Any) -> PackedLayer:
        bits, rows = self.weights[name], operation.rows(source.weight)
        fmt = IntegerFormat(bits, symmetric=bits == ENDS)
        grid = fit_grid(rows, fmt, group=GROUP if bits < ENDS else 0, method="min_max")
        # A convolution sums over places, which have no grid in common.
        dynamic = self.bits.activations is not None and operation.by_token
        quantizer = DynamicQuantizer(IntegerFormat(self.bits.activations or ENDS, symmetric=True))
        return pack(CalibratedLayer(source, operation, grid, quantizer if dynamic else None))

    def manifest(self, model: Any) -> dict[str, Any]:
        """Make every call set the one step there is, and return the sealed manifest of the loaded model."""
        # diffusers imports this module while it imports its models.
        from tfmq.integrations.diffusers.architecture import uncalibrated_manifest

        # No part depends on the timestep.
        attach_steps(model, StepContext(torch.zeros(1)), timestep=None)
        return uncalibrated_manifest(model, describe(model), {"at_load": {"bits": self.asked}})
