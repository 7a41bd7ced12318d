"""The torch backend: integer layers through the library inside torch on x86, eager or compiled; no other dependency."""

import platform

from torch import nn

from tfmq.backends.backend import Coverage, Options, keep_unpacked, register
from tfmq.kernels.kernel import IntegerWeight
from tfmq.kernels.onednn import OnednnKernel, UnpackingKernel, available, product, supports
from tfmq.nn.plan import packed_layers
from tfmq.nn.products import ProductQuantizers


@register("torch")
class Torch:
    """u8 x s8 linear layers and convolutions by oneDNN, attention products on integers in float registers."""

    def missing(self) -> str:
        """Return what this machine lacks."""
        return "" if available() else f"oneDNN's integer operators, which this torch for {platform.machine()} does not have"

    def attach(self, module: nn.Module, options: Options) -> Coverage:
        """Give every layer that the library computes exactly its kernel."""
        integer, floating = [], {}
        for name, layer in packed_layers(module).items():
            if layer.input_quantizer is None:
                floating[name] = "its input is not quantized"
                continue
            weight = layer.integer_weight()
            if not supports(weight, layer.input_quantizer.format.levels):
                floating[name] = _reason(weight)
                continue
            layer.kernel = OnednnKernel(weight) if options.weights == "unpacked" else UnpackingKernel(layer.integer_weight)
            integer.append(name)
        for child in module.modules():
            if isinstance(child, ProductQuantizers):
                child.kernel = product
        keep_unpacked(module, options)
        return Coverage(integer=tuple(integer), floating=floating)


def _reason(weight: IntegerWeight) -> str:
    if not weight.narrow:
        return "its integer weights do not fit into eight signed bits (an asymmetric 8-bit grid)"
    return "its shape or padding has no integer operator"
