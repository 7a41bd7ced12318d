"""ONNX models of captured graphs: QuantizeLinear and DequantizeLinear around stock operators, weights as
int8.
"""

import logging
from collections.abc import Sequence
from typing import Any

import onnx
import torch
from onnxscript import opset18

from tfmq.export.quiet import quiet_tools

# Version of ONNX's operators that models are exported in.
OPSET = 18
# Its operators are typed by element, which symbolic values do not have.
op: Any = opset18


def _codes(x: Any, zero_point: int, levels: int) -> Any:
    zero = op.Constant(value=onnx.helper.make_tensor("zero_point", onnx.TensorProto.UINT8, [], [zero_point]))
    one = op.Constant(value_float=1.0)
    if levels < 256:
        # The operator saturates at the limits of eight bits and at no others.
        x = op.Clip(
            x,
            op.Constant(value_float=float(-zero_point)),
            op.Constant(value_float=float(levels - 1 - zero_point)),
        )
    return op.DequantizeLinear(op.QuantizeLinear(x, one, zero), one, zero)


def _integer_weight(values: Any, scale: Any, axis: int) -> Any:
    return op.DequantizeLinear(values, scale, axis=axis)


def convert(
    program: torch.export.ExportedProgram, *, inputs: Sequence[str], outputs: Sequence[str]
) -> onnx.ModelProto:
    """Return the ONNX model of a captured graph, its inputs and outputs called by these names, the batch axis
    by `batch`.
    """
    table: dict[Any, Any] = {
        torch.ops.tfmq.codes.default: _codes,
        torch.ops.tfmq.integer_weight.default: _integer_weight,
    }
    log = logging.getLogger("torch.onnx")
    level = log.level
    try:
        log.setLevel(logging.ERROR)
        with quiet_tools():
            converted = torch.onnx.export(
                program, (), dynamo=True, verbose=False, opset_version=OPSET, custom_translation_table=table,
                input_names=list(inputs), output_names=list(outputs),
            )  # fmt: skip
    finally:
        log.setLevel(level)
    assert converted is not None
    model: onnx.ModelProto = converted.model_proto
    for value in (*model.graph.input, *model.graph.output):
        first = value.type.tensor_type.shape.dim[0]
        if first.dim_param:
            first.dim_param = "batch"
    return model
