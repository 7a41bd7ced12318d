"""Rewrite OpenVINO models so that activations stay channels last, the layout of integer convolutions, from
one convolution to the next.

The plug-in's own group normalisation works on planes. Between convolutions it costs three passes over each
activation: into planes, its own, and back. Here it is written as sums over pixels, an average of a few
channels and a multiplication. That takes any layout, and the plug-in fuses the last pass with the activation
function and the quantizer behind it.
"""

from typing import Any

import numpy as np
import openvino as ov
from openvino import opset13 as ops

PLACES, LAST = np.array([2, 3]), np.array([2])


def rewrite(model: ov.Model) -> None:
    """Rewrite group normalisations, splits and look-ups of a model in place; see the functions below."""
    spread_norms(model)
    join_splits(model)
    join_lookups(model)
    model.validate_nodes_and_infer_types()


def spread_norms(model: ov.Model) -> None:
    """Compute each group normalisation of an `x` `[B, C, H, W]` by moments of its channels, in place; others
    stay.

    With `m` the mean of a group's values and `q` that of their squares,

        y = x a + (bias - m a),    a = weight / sqrt(q - m**2 + eps)

    as torch's own channels-last kernel has it: a mean of `r` times the group's deviation costs a relative
    error of about `6e-8 r**2` in the variance. A step has dozens of normalisations, and each node of a few
    values costs as much as thousands of multiplications: hence no more nodes than these.
    """
    for node in model.get_ordered_ops():
        if node.get_type_name() != "GroupNormalization":
            continue
        shape = node.input_value(0).get_partial_shape()
        if len(shape) == 4 and all(size.is_static for size in list(shape)[1:]):
            _, channels, height, width = (size.get_length() if size.is_static else -1 for size in shape)
            node.output(0).replace(_moments(node, channels, height * width).output(0))


def _moments(node: Any, channels: int, places: int) -> Any:
    """Return the nodes for one normalisation: channels are summed up over places, then groups over their
    channels.
    """
    (x, weight, bias), groups = node.input_values(), int(node.get_attributes()["num_groups"])
    epsilon = np.float32(node.get_attributes()["epsilon"])

    def by_group(values: Any) -> Any:
        return ops.reshape(values, np.array([-1, groups, channels // groups]), special_zero=False)

    def by_place(values: Any) -> Any:
        return ops.reshape(values, np.array([-1, channels, 1, 1]), special_zero=False)

    mean = ops.reduce_mean(by_group(ops.reduce_mean(x, PLACES, keep_dims=True)), LAST, keep_dims=True)
    # Take roots of sums of squares, not squared distances: that saves a pass over the pixels and writes
    # nothing.
    root = ops.reduce_l2(by_group(ops.reduce_l2(x, PLACES, keep_dims=True)), LAST, keep_dims=True)
    square = ops.multiply(ops.multiply(root, root), np.float32(groups / (channels * places)))
    variance = ops.relu(ops.subtract(square, ops.multiply(mean, mean)))
    gain = ops.divide(by_group(weight), ops.sqrt(ops.add(variance, epsilon)))
    shift = ops.subtract(by_group(bias), ops.multiply(mean, gain))
    # Gain and shift keep one value for each channel until here, or the plug-in would compute them for every
    # pixel.
    return ops.add(ops.multiply(x, by_place(gain)), by_place(shift))


def join_splits(model: ov.Model) -> None:
    """Let whoever reads the parts of a concatenation that is split where it was joined read what was joined,
    in place.
    """
    for node in model.get_ordered_ops():
        source = node.input_value(0).get_node() if node.get_type_name() == "VariadicSplit" else None
        if source is not None and source.get_type_name() == "Concat" and _undoes(node, source):
            for output, part in zip(node.outputs(), source.input_values(), strict=True):
                output.replace(part)


def _undoes(split: Any, joined: Any) -> bool:
    """Whether a split takes a concatenation apart where it was joined."""
    axis = int(split.input_value(1).get_node().get_data())
    rank = len(joined.output(0).get_partial_shape())
    widths = [part.get_partial_shape()[axis % rank] for part in joined.input_values()]
    return (
        joined.get_axis() % rank == axis % rank
        and all(width.is_static for width in widths)
        and [width.get_length() for width in widths] == list(split.input_value(2).get_node().get_data())
    )


def join_lookups(model: ov.Model) -> None:
    """Let one look-up give the rows of all tables that are read at the same index, in place: a step has
    hundreds, of a few values each.
    """
    found: dict[tuple[Any, ...], list[Any]] = {}
    for node in model.get_ordered_ops():
        if node.get_type_name() == "Gather" and _is_lookup(node):
            table, index = node.input_value(0), node.input_value(1)
            found.setdefault(
                (
                    index.get_node().get_name(),
                    index.get_index(),
                    table.get_element_type().to_string(),
                    table.get_shape()[0],
                ),
                [],
            ).append(node)
    for nodes in found.values():
        tables = [
            node.input_value(0).get_node().get_data().reshape(node.input_value(0).get_shape()[0], -1)
            for node in nodes
        ]
        joined = ops.constant(np.concatenate(tables, axis=1), dtype=nodes[0].get_element_type())
        rows = ops.gather(joined, nodes[0].input_value(1), np.array(0))
        parts = ops.variadic_split(rows, np.array(1), np.array([table.shape[1] for table in tables]))
        for node, part in zip(nodes, parts.outputs(), strict=True):
            node.output(0).replace(
                ops.reshape(
                    part, np.array([-1, *node.input_value(0).get_shape()[1:]]), special_zero=False
                ).output(0)
            )


def _is_lookup(node: Any) -> bool:
    """Whether a node takes rows of a constant table at an index `[B]` of bins."""
    table, index, axis = (node.input_value(position) for position in range(3))
    return (
        table.get_node().get_type_name() == "Constant"
        and index.get_node().get_type_name() != "Constant"
        and axis.get_node().get_type_name() == "Constant"
        and int(axis.get_node().get_data()) == 0
        and len(index.get_partial_shape()) == 1
        and len(table.get_shape()) > 0
    )
