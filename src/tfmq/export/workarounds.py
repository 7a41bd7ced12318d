"""Rewrite what OpenVINO cannot compile. docs/upstream.md describes each fault, with a model of a few nodes
that shows it.
"""

import openvino as ov
from openvino import opset13 as ops


def scale_by_single_weights(model: ov.Model) -> None:
    """Write each product with a weight `[1, 1]` as the multiplication that it is, in place: `x` `[..., 1]`
    times the one value, to the bit the same.

    On one thread the CPU plug-in (2026.4.1) makes one kernel of matrix products that follow each other, and
    fails with "Layout rank can't be larger than tensor rank" where such a weight is among them.
    """
    for node in model.get_ordered_ops():
        if node.get_type_name() != "MatMul":
            continue
        x, weight = node.input_values()
        one = weight.get_partial_shape().is_static and list(weight.get_shape()) == [1, 1]
        if one and len(x.get_partial_shape()) > 1 and not node.get_attributes()["transpose_a"]:
            node.output(0).replace(ops.multiply(x, weight).output(0))
