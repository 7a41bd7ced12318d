"""The cuda backend: integer layers through the operators of `tfmq.kernels.operators`, by Triton kernels on a
GPU; and the same on any device.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tfmq.backends.backend import Coverage, Options, by_input, keep_unpacked, register_backend
from tfmq.backends.fusion import fused
from tfmq.backends.graph import Build, GraphExecutor, Run
from tfmq.backends.tuned import StoredTiles
from tfmq.errors import require
from tfmq.export.capture import Call, Graph, capture
from tfmq.export.quiet import quiet_tools
from tfmq.kernels.device import (
    OperatorKernel,
    WeightOnlyKernel,
    fits_nibbles,
    geometry_of,
    operator_product,
    refusal,
    shape_refusal,
)
from tfmq.kernels.kernel import IntegerWeight
from tfmq.nn.packed_layer import KernelExecution, PackedLayer
from tfmq.nn.plan import packed_layers
from tfmq.nn.products import ProductKernels, ProductQuantizers
from tfmq.nn.submodules import submodules

Program = Callable[..., tuple[Tensor, ...]]


@register_backend("operators")
class Operators:
    """Every operator by its definition in torch, on any device: slow, what the kernels of `cuda` are held to,
    and the same plumbing.
    """

    def missing(self) -> str:
        """Return nothing: it runs wherever torch does."""
        return ""

    def attach(self, module: nn.Module, options: Options) -> Coverage:
        """Give every layer that the operators take its kernel. With `compile` calls run as captured graphs
        with their operators fused.
        """
        return attach_operators(module, options, build(lambda program: program))


@register_backend("cuda")
class Cuda:
    """Int8 tensor cores through Triton. With `weights="packed"` weights of up to four bits stay packed in
    memory and are unpacked in registers.
    """

    def missing(self) -> str:
        """Return what this machine lacks.

        Raises:
            MissingExtraError: Triton is not installed.
        """
        require("triton", extra="cuda")
        return (
            ""
            if torch.cuda.is_available()
            else (
                'a CUDA device, and this torch finds none; "operators" '
                "computes the same on any device, slowly"
            )
        )

    def attach(self, module: nn.Module, options: Options) -> Coverage:
        """Give every layer that the operators take its kernel, on whatever device it is: a model that is
        offloaded waits on the CPU.

        With `compile` calls run as CUDA graphs of compiled programs, made for the device of the first call of
        a kind.
        """
        require("tfmq.kernels.gpu.register", extra="cuda")
        tiles = require("tfmq.kernels.gpu.tiles", extra="cuda")
        tiles.keep_in(StoredTiles.of_device())
        return attach_operators(
            module,
            options,
            build(lambda program: torch.compile(program, dynamic=False, mode="reduce-overhead")),
        )


def attach_operators(module: nn.Module, options: Options, compiled: Build) -> Coverage:
    """Give every layer a kernel of operators where there is one; the packed codes of those layers rest in
    host memory.
    """
    quantized, floating = by_input(module)
    for name, layer in packed_layers(module).items():
        weight = layer.integer_weight()
        if reason := _refusal(layer, weight):
            floating[name] = reason
            continue
        nibbles = options.weights == "packed" and fits_nibbles(weight)
        kind = OperatorKernel if name in quantized else WeightOnlyKernel
        layer.execute(KernelExecution(kind(weight, nibbles=nibbles), shelves=True))
    for products in submodules(module, ProductQuantizers).values():
        products.execute(ProductKernels(operator_product))
    keep_unpacked(module, options)
    if options.compile:
        module.tfmq_executor = GraphExecutor(module, compiled)  # type: ignore[assignment]
    return Coverage(integer=tuple(name for name in quantized if name not in floating), floating=floating)


def _refusal(layer: PackedLayer, weight: IntegerWeight) -> str:
    """Return why the operators do not take a layer, or nothing."""
    if layer.input_quantizer is not None:
        return refusal(weight, layer.input_quantizer.format.levels)
    takes = (
        weight.narrow and not shape_refusal(weight) and geometry_of(weight.operation, weight.values) is None
    )
    return "" if takes else "its input is not quantized"


def build(finish: Callable[[Program], Program]) -> Build:
    """Return what makes a program of a call: captured, its operators fused, and then whatever `finish` makes
    of it.
    """

    def make(graph: Graph, call: Call) -> Run:
        with torch.no_grad():
            program = finish(fused(capture(graph, call, dynamic=False)))

        def run(bins: Tensor, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            with torch.no_grad(), quiet_tools():
                # A CUDA graph writes its outputs to the same memory at every call.
                return tuple(
                    output.clone()
                    for output in program(bins.contiguous(), *(tensor.contiguous() for tensor in tensors))
                )

        return run

    return make
