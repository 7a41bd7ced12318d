"""Look at the nodes of a captured program."""

import operator
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node


def calls(node: Any, *targets: Any) -> bool:
    """Whether a node calls one of `targets`."""
    return isinstance(node, Node) and node.op == "call_function" and node.target in targets


def given(node: Any) -> tuple[Any, ...]:
    """Return the arguments of a call by position."""
    return tuple(node.args)


def example(node: Any) -> Tensor | None:
    """Return the example of the tensor that a node makes; None for what is no node, or makes no tensor."""
    made = node.meta.get("val") if isinstance(node, Node) else None
    return made if isinstance(made, Tensor) else None


def schema(node: Any) -> Any:
    """Return what an operator declares of its arguments."""
    return node.target._schema.arguments


def argument(node: Node, name: str) -> Any:
    """Return an argument of an operator by the name that its schema has for it."""
    for position, declared in enumerate(schema(node)):
        if declared.name == name:
            return (
                given(node)[position]
                if position < len(given(node))
                else node.kwargs.get(name, declared.default_value)
            )
    raise ValueError(f"{node.target} has no argument {name}")


def value(program: GraphModule, node: Any) -> Any:
    """Return the tensor that a node reads from the module, or the node itself."""
    return (
        operator.attrgetter(str(node.target))(program)
        if isinstance(node, Node) and node.op == "get_attr"
        else node
    )
