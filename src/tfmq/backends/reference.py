"""The reference backend: exact integers for every layer and attention product, slow, on any device. The
oracle of the others.
"""

from torch import nn

from tfmq.backends.backend import Coverage, Options, by_input, keep_unpacked, register_backend
from tfmq.kernels.reference import ReferenceKernel, reference_product
from tfmq.nn.packed_layer import KernelExecution
from tfmq.nn.plan import packed_layers
from tfmq.nn.products import ProductKernels, ProductQuantizers
from tfmq.nn.submodules import submodules


@register_backend("reference")
class Reference:
    """Integers of every layer with a quantized input. Weight-only layers are floating point by definition."""

    def missing(self) -> str:
        """Return nothing: it runs wherever torch does."""
        return ""

    def attach(self, module: nn.Module, options: Options) -> Coverage:
        """Give every layer its exact kernel."""
        layers, floating = by_input(module)
        for layer in layers.values():
            assert layer.input_quantizer is not None
            kernel = ReferenceKernel(layer.integer_weight(), layer.input_quantizer.format.levels)
            layer.execute(KernelExecution(kernel))
        for products in submodules(module, ProductQuantizers).values():
            products.execute(ProductKernels(reference_product))
        keep_unpacked(module, options)
        return Coverage(integer=tuple(layers), floating=floating)


@register_backend("simulated")
class Simulated:
    """Floating point on values that lie on the integer grids: the arithmetic of calibration, differentiable
    and on any device.
    """

    def missing(self) -> str:
        """Return nothing: it runs wherever torch does."""
        return ""

    def attach(self, module: nn.Module, options: Options) -> Coverage:
        """Keep unpacked weights, if that is wanted."""
        keep_unpacked(module, options)
        return Coverage(integer=(), floating=dict.fromkeys(packed_layers(module), "simulated"))
