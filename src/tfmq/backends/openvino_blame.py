"""Find the layer at which OpenVINO fails to compile a model, for a message that says more than a line of the
engine's source.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from tfmq.nn.packed_layer import PackedLayer

# Seconds that the search for the layer to blame may take; all it improves is the message.
SECONDS = 20.0
_LEAVES = ("Parameter", "Constant", "Result")


def blamed(model: Any, layers: Mapping[str, PackedLayer], compiles: Callable[[Any], bool]) -> str:
    """Return where an `openvino.Model` fails to compile: the node, and the layer that it computes or follows;
    nothing if that takes too long.

    Looks for the shortest part of the model, in the order of execution, that `compiles` says no to.
    """
    nodes = [node for node in model.get_ordered_ops() if node.get_type_name() not in _LEAVES]
    low, high, until = 0, len(nodes) - 1, time.monotonic() + SECONDS
    while low < high:
        if time.monotonic() > until:
            return ""
        middle = (low + high) // 2
        low, high = (middle + 1, high) if compiles(_first(model, nodes[: middle + 1])) else (low, middle)
    node = nodes[low]
    name = _layer_of(node, layers)
    return f"{node.get_type_name()} {node.get_friendly_name()}" + (f" of the layer {name}" if name else "")


def _first(model: Any, nodes: list[Any]) -> Any:
    """Return a model of some of the nodes; it puts out whatever others read of them."""
    import openvino as ov

    inside = {node.get_name() for node in nodes}
    read = [
        port
        for node in nodes
        for port in node.outputs()
        if any(t.get_node().get_name() not in inside for t in port.get_target_inputs())
    ]
    return ov.Model(read, model.get_parameters())


def _layer_of(node: Any, layers: Mapping[str, PackedLayer]) -> str:
    """Return the layer whose weight a node reads, or the nearest node before it that reads one."""
    pending, seen = deque([node]), set()
    while pending:
        current = pending.popleft()
        if current.get_name() in seen:
            continue
        seen.add(current.get_name())
        if current.get_type_name() == "Constant" and current.get_element_type().to_string() == "i8":
            return next((name for name, layer in layers.items() if _holds(layer, current.get_data())), "")
        pending += [value.get_node() for value in current.input_values()]
    return ""


def _holds(layer: PackedLayer, values: Any) -> bool:
    """Whether integers are the weight of a layer, or of one of its input segments."""
    widths: Iterable[int] = layer.segments or layer.shape[1:2]
    if values.ndim != len(layer.shape) or values.shape[1] not in widths or len(values) != layer.shape[0]:
        return False
    return any(np.array_equal(part.numpy(), values) for part, _ in layer.integer_weight().parts())
