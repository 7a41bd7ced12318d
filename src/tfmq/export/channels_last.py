"""What keeps an OpenVINO model in the memory layout of its integer convolutions, channels last, from one of them to the next.

The plug-in's own group normalisation wants planes. Between convolutions it costs three more passes over each activation: into planes, back, and
its own. Written as sums over places, an average of a few channels and a multiplication, it takes any layout, and its last pass becomes one with
the activation function and the quantizer behind it.
"""

from typing import Any

import numpy as np
import openvino as ov
from openvino import opset13 as ops

PLACES = np.array([2, 3])


def rewrite(model: ov.Model) -> None:
    """Rewrite group normalisations and splits of a model in place; see `spread_norms` and `join_splits`."""
    spread_norms(model)
    join_splits(model)
    model.validate_nodes_and_infer_types()


def spread_norms(model: ov.Model) -> None:
    """Compute each group normalisation of an `x` `[B, C, H, W]` by moments of its channels, in place; others stay.

    With `m` the mean of a group's values and `v` that of their squared distances from `m`,

        y = x a + (bias - m a),    a = weight / sqrt(v + eps)

    The distances are taken before they are squared, so that a large mean costs no digits.
    """
    for node in model.get_ordered_ops():
        if node.get_type_name() != "GroupNormalization":
            continue
        shape = node.input_value(0).get_partial_shape()
        if len(shape) == 4 and shape[1].is_static:
            node.output(0).replace(_moments(node, shape[1].get_length()).output(0))


def _moments(node: Any, channels: int) -> Any:
    (x, weight, bias), groups = node.input_values(), int(node.get_attributes()["num_groups"])
    epsilon = np.float32(node.get_attributes()["epsilon"])

    def by_place(values: Any) -> Any:
        return ops.reshape(values, np.array([0, channels, 1, 1]), special_zero=True)

    def mean(values: Any) -> Any:
        """Return the mean of each group for each of its channels, `[B, C]`: of no place, so that nobody computes on it at each place."""
        each = ops.reshape(ops.reduce_mean(values, PLACES, keep_dims=False), np.array([0, groups, channels // groups]), special_zero=True)
        repeated = ops.tile(ops.reduce_mean(each, np.array([2]), keep_dims=True), np.array([1, 1, channels // groups]))
        return ops.reshape(repeated, np.array([0, channels]), special_zero=True)

    centre = mean(x)
    distance = ops.subtract(x, by_place(centre))
    spread = ops.sqrt(ops.add(mean(ops.multiply(distance, distance)), epsilon))
    gain = ops.divide(ops.unsqueeze(weight, np.array(0)), spread)
    shift = ops.subtract(ops.unsqueeze(bias, np.array(0)), ops.multiply(centre, gain))
    return ops.add(ops.multiply(x, by_place(gain)), by_place(shift))


def join_splits(model: ov.Model) -> None:
    """Let whoever reads the parts of a concatenation that is split where it was joined read what was joined, in place."""
    for node in model.get_ordered_ops():
        source = node.input_value(0).get_node() if node.get_type_name() == "VariadicSplit" else None
        if source is None or source.get_type_name() != "Concat" or source.get_input_size() != node.get_output_size():
            continue
        axis = int(node.input_value(1).get_node().get_data())
        rank = len(source.output(0).get_partial_shape())
        parts = [source.input_value(index) for index in range(source.get_input_size())]
        widths = [part.get_partial_shape()[axis % rank] for part in parts]
        same = source.get_axis() % rank == axis % rank and all(width.is_static for width in widths)
        if same and [width.get_length() for width in widths] == [int(width) for width in node.input_value(2).get_node().get_data()]:
            for output, part in zip(node.outputs(), parts, strict=True):
                output.replace(part)
