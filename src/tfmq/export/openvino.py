"""OpenVINO models of captured graphs: fake-quantizers as the plug-in fuses them to INT8."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import openvino as ov
import torch
from openvino import opset13 as ops

from tfmq.export.capture import Call, Graph, any_batch, capture, trace
from tfmq.export.channels_last import rewrite
from tfmq.export.quiet import quiet_tools
from tfmq.export.workarounds import scale_by_single_weights


def _codes(node: Any) -> list[Any]:
    zero_point, levels = (int(node.get_values_from_const_input(index)) for index in (1, 2))
    low, high = np.float32(-zero_point), np.float32(levels - 1 - zero_point)
    return ops.fake_quantize(node.get_input(0), low, high, low, high, levels).outputs()


def _integer_weight(node: Any) -> list[Any]:
    values, scale, axis = node.get_input(0), node.get_input(1), int(node.get_values_from_const_input(2))
    rank = len(values.get_partial_shape())
    axes = np.array([-1 if index == axis else 1 for index in range(rank)])
    wide = ops.reshape(scale, axes, special_zero=False)
    low, high = ops.multiply(wide, np.float32(-128)), ops.multiply(wide, np.float32(127))
    # Integers of four bits lie on the eight-bit grid too, which is what executes fastest.
    return ops.fake_quantize(
        ops.multiply(ops.convert(values, "f32"), wide), low, high, low, high, 256
    ).outputs()


def convert(graph: Graph, call: Call, *, fixed: bool = False) -> ov.Model:
    """Return the OpenVINO model of a graph: for any batch, or for the batch of `call` if the model's code
    fixes it, as is known beforehand with `fixed`.

    Its inputs are called by the graph's names; one that the graph does not read may be missing.
    """
    model = None if fixed else _of_any_batch(graph, call)
    if model is None:
        model = _of_one_batch(graph, call)
    scale_by_single_weights(model)
    rewrite(model)
    for port in model.inputs:
        # Drop other names: an input that is read instead of a part of a concatenation has the part's names
        # too.
        port.set_names(port.get_names() & set(graph.names))
    # What is not in integers here is not to be made so by the plug-in, which would quantize what a weight of
    # bytes alone is multiplied with.
    model.set_rt_info("0", ["runtime_options", "DYNAMIC_QUANTIZATION_GROUP_SIZE"])
    return model


def _of_any_batch(graph: Graph, call: Call) -> ov.Model | None:
    traced = trace(graph, call)
    if traced is not None:
        model = _named(
            from_torch(traced),
            dict(zip((value.debugName() for value in traced.graph.inputs()), graph.names, strict=True)),
        )
        shapes = sizes(graph, call, -1)
        model.reshape({port.get_any_name(): shapes[port.get_any_name()] for port in model.inputs})
        return model
    program = capture(graph, call, dynamic=True)
    return _named(from_torch(program), _captured(graph)) if any_batch(program, graph) else None


def _of_one_batch(graph: Graph, call: Call) -> ov.Model:
    model = _named(from_torch(capture(graph, call, dynamic=False)), _captured(graph))
    # The inputs of the converted model have open shapes: set the sizes that capture took for constants.
    shapes = sizes(graph, call, call.batch)
    model.reshape({port.get_any_name(): shapes[port.get_any_name()] for port in model.inputs})
    return model


def _captured(graph: Graph) -> dict[str, str]:
    """Return the names of a graph's inputs by what they are called in a captured program."""
    return {f"inputs_{index}": name for index, name in enumerate(graph.names)}


def _named(model: ov.Model, names: Mapping[str, str]) -> ov.Model:
    """Call the inputs of a model as `names` has it for their names in the source."""
    for port in model.inputs:
        port.set_names({next(name for own, name in names.items() if own in port.get_names())})
    return model


def from_torch(source: Any) -> ov.Model:
    """Return the model of a traced graph, or of a captured program.

    This is what `openvino.convert_model` does, without what it does besides: it takes its time for
    preprocessing, of which there is none, and it reports each conversion to its developers, from a
    process that it forks.
    """
    with quiet_tools():
        from openvino._offline_transformations import (
            apply_moc_transformations,
            compress_quantize_weights_transformation,
        )
        from openvino.frontend import FrontEndManager
        from openvino.frontend.pytorch import ConversionExtension
        from openvino.frontend.pytorch.fx_decoder import TorchFXPythonDecoder
        from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

        front_end = FrontEndManager().load_by_framework("pytorch")
        for name, operator in {"codes": _codes, "integer_weight": _integer_weight}.items():
            for called in (f"tfmq.{name}.default", f"tfmq::{name}"):
                front_end.add_extension(ConversionExtension(called, operator))
        captured = isinstance(source, torch.export.ExportedProgram)
        make = TorchFXPythonDecoder.from_exported_program if captured else TorchScriptPythonDecoder
        # Held until the end: the front end calls it and does not keep it.
        decoder = make(source)
        model = front_end.convert(front_end.load(decoder))
        apply_moc_transformations(model, cf=False, smart_reshape=True)
        compress_quantize_weights_transformation(model)
        return model


def sizes(graph: Graph, call: Call, batch: int) -> dict[str, list[int]]:
    """Return the shape of each input of a graph by name, for a batch (-1 for any)."""
    own = graph.arguments(torch.zeros(call.batch, dtype=torch.long), call.tensors)
    return {
        name: [batch, *tensor.shape[1:]] if batched else list(tensor.shape)
        for name, tensor, batched in zip(graph.names, own, graph.batched, strict=True)
    }
