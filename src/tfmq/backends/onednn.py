"""The torch backend: integer layers through the library inside torch on x86, eager or compiled; no other
dependency.
"""

import platform
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tfmq.allocator import give_back, page_out
from tfmq.backends.backend import Coverage, Options, by_input, keep_unpacked, register_backend
from tfmq.backends.graph import GraphExecutor, Run
from tfmq.backends.inductor import rewrite
from tfmq.export.capture import Call, Graph, capture
from tfmq.export.quiet import quiet_tools
from tfmq.kernels.attention import integer_attention
from tfmq.kernels.kernel import IntegerWeight, LayerKernel
from tfmq.kernels.onednn import OnednnKernel, UnpackingKernel, available, multiplies, supports
from tfmq.kernels.onednn_products import product
from tfmq.nn.packed_layer import KernelExecution, PackedLayer
from tfmq.nn.products import ProductKernels, ProductQuantizers
from tfmq.nn.submodules import submodules


@register_backend("torch")
class Torch:
    """u8 x s8 linear layers and convolutions by oneDNN, attention u8 x s8, other products on integers in
    float registers.
    """

    def missing(self) -> str:
        """Return what this machine lacks."""
        return (
            ""
            if available()
            else f"oneDNN's integer operators, which this torch for {platform.machine()} does not have"
        )

    def attach(self, module: nn.Module, options: Options) -> Coverage:
        """Give every layer that the library computes exactly its kernel."""
        layers, floating = by_input(module)
        for name, layer in layers.items():
            weight = _unpacked(layer)
            assert layer.input_quantizer is not None
            if not supports(weight, layer.input_quantizer.format.levels):
                floating[name] = _reason(weight)
                continue
            zero_points = layer.input_quantizer.zero_points()
            kernel: LayerKernel = (
                OnednnKernel(weight, zero_points, again=partial(_unpacked, layer))
                if options.weights == "unpacked"
                else UnpackingKernel(layer.integer_weight, zero_points)
            )
            layer.execute(KernelExecution(kernel))
        for products in submodules(module, ProductQuantizers).values():
            products.execute(ProductKernels(product, attention=integer_attention if multiplies() else None))
        keep_unpacked(module, options)
        if options.compile:
            module.tfmq_executor = GraphExecutor(module, compiled)  # type: ignore[assignment]
        return Coverage(integer=tuple(name for name in layers if name not in floating), floating=floating)


def compiled(graph: Graph, call: Call) -> Run:
    """Compile the graph of a call for its batch. The first run takes minutes on two cores."""
    with quiet_tools():
        from torch._inductor import config

        # The executor has a program for each kind of call, so there is nothing to guard, which would take a
        # millisecond a step. Older releases of torch guard all the same.
        unguarded = getattr(torch.compiler, "skip_all_guards_unsafe", None)
        options: dict[str, Any] | None = {"guard_filter_fn": unguarded} if unguarded else None
        captured = capture(graph, call, dynamic=False).module()
        rewrite(captured)
        program = torch.compile(captured, dynamic=False, options=options)

    def run(bins: Tensor, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        # Freezing makes constants of the weights; without it every call would lay them out again. From C++
        # the hundreds of calls of a step take a few per cent less of it than from Python.
        with torch.no_grad(), config.patch(freezing=True, cpp_wrapper=True), quiet_tools():
            return tuple(program(bins.contiguous(), *(tensor.contiguous() for tensor in tensors)))

    return run


def _unpacked(layer: PackedLayer) -> IntegerWeight:
    """Return a layer's integers; the library has its own copy soon, so nothing reads the packed codes for a
    while.
    """
    # Give back the memory that packing the previous layer took.
    give_back()
    weight = layer.integer_weight()
    page_out(layer.packed)
    return weight


def _reason(weight: IntegerWeight) -> str:
    if not weight.narrow:
        return "its integer weights do not fit into eight signed bits (an asymmetric 8-bit grid)"
    return "its shape has no integer operator"
