"""OpenVINO models of captured graphs: fake-quantizers as the plug-in fuses them to INT8."""

from typing import Any

import numpy as np
import openvino as ov
import torch
from openvino import opset13 as ops

from tfmq.export.quiet import quiet_tools


def _codes(node: Any) -> list[Any]:
    zero_point, levels = (int(node.get_values_from_const_input(index)) for index in (1, 2))
    low, high = np.float32(-zero_point), np.float32(levels - 1 - zero_point)
    return ops.fake_quantize(node.get_input(0), low, high, low, high, levels).outputs()


def _integer_weight(node: Any) -> list[Any]:
    values, scale = node.get_input(0), node.get_input(1)
    rank = len(values.get_partial_shape())
    axes = np.array([-1] + [1] * (rank - 1))
    wide = ops.reshape(scale, axes, special_zero=False)
    low, high = ops.multiply(wide, np.float32(-128)), ops.multiply(wide, np.float32(127))
    # Integers of four bits lie on the eight-bit grid too, which is what executes fastest.
    return ops.fake_quantize(ops.multiply(values, wide), low, high, low, high, 256).outputs()


def convert(program: torch.export.ExportedProgram) -> ov.Model:
    """Return the OpenVINO model of a captured graph."""
    with quiet_tools():
        from openvino.frontend.pytorch import ConversionExtension

        extensions = [ConversionExtension("tfmq.codes.default", _codes), ConversionExtension("tfmq.integer_weight.default", _integer_weight)]
        return ov.convert_model(program, extension=extensions)
