"""Rewrite a captured denoiser into what torch's compiler makes good loops of, on a CPU.

The compiler computes a cheap value again in each loop that reads it. For two kinds of values, of which a step
has hundreds, that is the wrong choice: a row of a table, whose index it then checks for every value of an
activation, and the gain of a normalisation, which it then derives from the sums of the group for every value.
`stored` makes it write such a value to memory once.

* All tables that are read at the same bins become one, and one look-up gives their rows.
* Group normalisations are written by moments of channels, so that activations stay in the layout of integer
  convolutions, channels last. The compiler's own way computes them in planes, and moves each activation there
  and back.
* What is concatenated is written channels last, for the same reason.
"""

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from tfmq.backends.nodes import argument, calls, example, value

ATEN = torch.ops.aten


@torch.library.custom_op("tfmq::stored", mutates_args=())
def stored(x: Tensor) -> Tensor:
    """Return `x`, four axes in channels last, as a tensor that is in memory."""
    return x.clone(memory_format=torch.channels_last if x.ndim == 4 else torch.contiguous_format)


@stored.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last if x.ndim == 4 else torch.contiguous_format)


STORED = torch.ops.tfmq.stored.default


@cache
def teach_stored() -> None:
    """Let the compiler write down what `stored` gets, in the loop that computes it; as an operator of ours it
    would be a call from Python.
    """
    from torch._inductor import ir, lowering

    def lowered(x: Any) -> Any:
        x.realize()
        return ir.ExternKernel.require_channels_last(x) if len(x.get_size()) == 4 else x

    lowering.register_lowering(STORED, type_promotion_kind=None)(lowered)


def rewrite(program: GraphModule) -> None:
    """Rewrite the program of a captured graph in place; see the functions below."""
    teach_stored()
    for change in (join_lookups, spread_norms, store_parts):
        change(program)
        program.graph.eliminate_dead_code()
    program.graph.lint()
    program.recompile()


def _makes(node: Any) -> Tensor:
    """Return the example of what a node makes, an empty tensor where there is none."""
    made = example(node)
    return torch.empty(0) if made is None else made


def _owns(node: Any) -> bool:
    """Whether a node makes a tensor of its own, which nothing read before can change."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and all(result.alias_info is None for result in schema.returns)


def _call(program: GraphModule, target: Any, *arguments: Any) -> Node:
    return program.graph.call_function(target, arguments)


def _constant(program: GraphModule, node: Any) -> Any:
    """Return what a node computes from constants; None where it depends on an input."""
    if not isinstance(node, Node):
        return node
    if node.op == "get_attr":
        return value(program, node)
    operands = (
        [_constant(program, operand) for operand in node.args]
        if node.op == "call_function" and not node.kwargs
        else [None]
    )
    return None if any(operand is None for operand in operands) else node.target(*operands)  # type: ignore[operator]


def join_lookups(program: GraphModule) -> None:
    """Let one look-up give the rows of all tables of a dtype that are read at the bins, the first input, in
    place.
    """
    inputs = [node for node in program.graph.nodes if node.op == "placeholder"]
    found: dict[tuple[torch.dtype, int], list[tuple[Node, Tensor]]] = {}
    for node in program.graph.nodes:
        if calls(node, ATEN.index.Tensor) and list(node.args[1]) == inputs[:1]:
            table = _constant(program, node.args[0])
            if isinstance(table, Tensor):
                found.setdefault((table.dtype, len(table)), []).append((node, table))
    for number, ((_, count), lookups) in enumerate(found.items()):
        name, start = f"joined_tables_{number}", 0
        program.register_buffer(name, torch.cat([table.reshape(count, -1) for _, table in lookups], dim=1))
        with program.graph.inserting_before(inputs[-1].next):
            rows = _call(
                program, STORED, _call(program, ATEN.index.Tensor, program.graph.get_attr(name), inputs[:1])
            )
        for node, table in lookups:
            stop = start + math.prod(table.shape[1:])
            with program.graph.inserting_before(node):
                part = _call(program, ATEN.slice.Tensor, rows, 1, start, stop)
                node.replace_all_uses_with(_call(program, ATEN.view.default, part, [-1, *table.shape[1:]]))
            start = stop


def spread_norms(program: GraphModule) -> None:
    """Compute each group normalisation of a float32 `x` `[B, C, H, W]` by moments of its channels, in place;
    others stay.

    With `m` the mean of a group's values and `q` that of their squares, `y = x a + (bias - m a)` where `a =
    weight / sqrt(q - m**2 + eps)`, as torch's own channels-last kernel has it; see
    `tfmq.export.channels_last.spread_norms` for its error.
    """
    for node in list(program.graph.nodes):
        made = _makes(node)
        if not calls(node, ATEN.group_norm.default) or made.ndim != 4 or made.dtype != torch.float32:
            continue
        if argument(node, "weight") is not None and argument(node, "bias") is not None:
            with program.graph.inserting_before(node):
                node.replace_all_uses_with(_moments(program, node, *made.shape[:2]))


def _moments(program: GraphModule, node: Node, batch: int, count: int) -> Node:
    def call(target: Any, *arguments: Any) -> Node:
        return _call(program, target, *arguments)

    x, groups, weight, bias, epsilon = (
        argument(node, name) for name in ("input", "num_groups", "weight", "bias", "eps")
    )
    by_group = [-1, groups, count // groups]
    mean, square = (
        call(ATEN.mean.dim, call(ATEN.view.default, call(ATEN.mean.dim, values, [2, 3]), by_group), [2], True)
        for values in (x, call(ATEN.mul.Tensor, x, x))
    )
    variance = call(ATEN.relu.default, call(ATEN.sub.Tensor, square, call(ATEN.mul.Tensor, mean, mean)))
    inverse = call(ATEN.rsqrt.default, call(ATEN.add.Tensor, variance, epsilon))
    gain = call(ATEN.mul.Tensor, call(ATEN.view.default, weight, by_group), inverse)
    shift = call(ATEN.sub.Tensor, call(ATEN.view.default, bias, by_group), call(ATEN.mul.Tensor, mean, gain))
    places = [call(STORED, call(ATEN.view.default, values, [batch, count])) for values in (gain, shift)]
    factor, term = (call(ATEN.view.default, values, [batch, count, 1, 1]) for values in places)
    return call(ATEN.add.Tensor, call(ATEN.mul.Tensor, x, factor), term)


def store_parts(program: GraphModule) -> None:
    """Write each part of a concatenation of channels `[B, C, H, W]` in channels last, in place; views
    stay.
    """
    for node in list(program.graph.nodes):
        if calls(node, ATEN.cat.default) and _makes(node).ndim == 4 and node.args[1:] == (1,):
            for part in filter(_owns, node.args[0]):
                _store(program, part)


def _store(program: GraphModule, node: Node) -> None:
    """Let whoever reads what a node makes read it from memory."""
    with program.graph.inserting_after(node):
        made = _call(program, STORED, node)
    node.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made)
