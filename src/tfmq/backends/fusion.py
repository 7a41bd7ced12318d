"""Fuse the operators of a captured denoiser: what stands before a quantizer and behind a product goes into
one operator with it.

Four rewrites of the graph, each of which leaves the values as they are up to the rounding of what is no
longer rounded in between (in a float32 model: every bit):

* what does nothing in inference goes (dropout, a division by one);
* quantizers of one tensor with equal grids become one: layers that read the same tensor were calibrated on
  it;
* a normalisation in front of a quantizer alone, with SiLU or adaptive modulation, writes codes
  (`group_norm_codes`, `layer_norm_codes`);
* an activation function and a residual behind a product move into its epilogue.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from tfmq.backends.nodes import argument, calls, example, given, schema, value
from tfmq.export.quiet import quiet_tools
from tfmq.kernels.operators import multiply, norms, quantize  # noqa: F401 - registers the operators

ATEN = torch.ops.aten
TFMQ = torch.ops.tfmq
QUANTIZE = TFMQ.quantize_codes.default
PRODUCTS = (TFMQ.linear_codes.default, TFMQ.convolution_codes.default)
# Names of the epilogue's activation functions by operator and its options.
ACTIVATIONS: dict[Any, Callable[[Node], str]] = {
    ATEN.silu.default: lambda node: "silu",
    ATEN.gelu.default: lambda node: (
        "gelu_tanh" if node.kwargs.get("approximate", "none") == "tanh" else "gelu"
    ),
}


def fused(captured: ExportedProgram) -> GraphModule:
    """Return the graph of a captured call with its operators fused.

    A rewrite lets a tensor be read later than before, so operators that write to one in place are replaced
    first.
    """
    if _mutates(captured.graph_module):
        with quiet_tools():
            captured = captured.run_decompositions({})
    return fuse(captured.module())


def _mutates(program: GraphModule) -> bool:
    schemas = (getattr(node.target, "_schema", None) for node in program.graph.nodes)
    return any(schema.is_mutable for schema in schemas if schema is not None)


def fuse(program: GraphModule) -> GraphModule:
    """Return a graph that writes to no tensor in place with its operators fused, in place."""
    for rewrite in (
        _drop_identity,
        _merge_quantizer,
        _fuse_group_norm,
        _fuse_layer_norm,
        _fuse_activation,
        _fuse_residual,
    ):
        for node in list(program.graph.nodes):
            rewrite(program, node)
        program.graph.eliminate_dead_code()
    program.graph.lint()
    program.recompile()
    return program


def _alone(node: Node) -> bool:
    return len(node.users) == 1


def _changed(node: Node, **changes: Any) -> tuple[Any, ...]:
    """Return all arguments of an operator, some of them changed."""
    return tuple(changes.get(a.name, argument(node, a.name)) for a in schema(node))


def _put(program: GraphModule, before: Node, target: Any, *arguments: Any) -> Node:
    """Insert a call in front of a node, with the meta value of what it makes."""
    with program.graph.inserting_before(before):
        made = program.graph.call_function(target, arguments)
    mode = next(
        node.meta["val"].fake_mode
        for node in program.graph.nodes
        if isinstance(node.meta.get("val"), FakeTensor)
    )

    def shown(given: Node) -> Any:
        return given.meta["val"] if "val" in given.meta else mode.from_tensor(value(program, given))

    with torch.no_grad(), mode:
        made.meta["val"] = target(*torch.fx.node.map_arg(arguments, shown))
    return made


def _replace(node: Node, by: Node) -> None:
    node.replace_all_uses_with(by)


def _drop_identity(program: GraphModule, node: Node) -> None:
    dropped = calls(node, ATEN.dropout.default) and not argument(node, "train")
    divided = calls(node, ATEN.div.Tensor) and given(node)[1] == 1 and _same(node, given(node)[0])
    if dropped or divided:
        _replace(node, given(node)[0])


def _equal(program: GraphModule, left: Any, right: Any) -> bool:
    match value(program, left), value(program, right):
        case Tensor() as a, Tensor() as b if a.shape == b.shape:
            return torch.equal(a, b)
    return left is right or bool(left == right)


def _merge_quantizer(program: GraphModule, node: Node) -> None:
    """Let a quantizer's readers read an earlier one of the same tensor on an equal grid."""
    if not calls(node, QUANTIZE):
        return
    for other in program.graph.nodes:
        if other is node:
            return
        if calls(other, QUANTIZE) and all(
            _equal(program, a, b) for a, b in zip(_viewed(other), _viewed(node), strict=True)
        ):
            _replace(node, other)
            return


def _viewed(node: Node) -> list[Any]:
    """Return the arguments of a quantizer, a view of channels told by what it is a view of."""
    source, *rest = given(node)
    return [*(given(source) if calls(source, ATEN.movedim.int) else (source, None, None)), *rest]


def _same(left: Any, right: Any) -> bool:
    """Whether two nodes make tensors of one shape and dtype."""
    a, b = example(left), example(right)
    return a is not None and b is not None and a.shape == b.shape and a.dtype == b.dtype


def _fuse_group_norm(program: GraphModule, node: Node) -> None:
    """`quantize(channels_last([silu](group_norm(x))))`, nothing else reading in between."""
    if not (calls(node, QUANTIZE) and calls(given(node)[0], ATEN.movedim.int) and _alone(given(node)[0])):
        return
    source: Any = given(node)[0].args[0]
    activation = "silu" if calls(source, ATEN.silu.default) else ""
    norm = given(source)[0] if activation else source
    if not (
        calls(norm, ATEN.group_norm.default)
        and _alone(source)
        and _alone(norm)
        and norm.meta["val"].ndim == 4
    ):
        return
    weight, bias = argument(norm, "weight"), argument(norm, "bias")
    if weight is None or bias is None:
        return
    last = _put(program, node, ATEN.movedim.int, given(norm)[0], 1, -1)
    what = (argument(norm, "num_groups"), weight, bias, argument(norm, "eps"), activation)
    _replace(node, _put(program, node, TFMQ.group_norm_codes.default, last, *what, *given(node)[1:]))


def _fuse_layer_norm(program: GraphModule, node: Node) -> None:
    """`quantize(layer_norm(x) [* (1 + gain) + shift])`, nothing else reading in between."""
    if not calls(node, QUANTIZE) or list(given(node)[6]):
        return
    source: Any = given(node)[0]
    norm, gain, shift = _modulated(source) if calls(source, ATEN.add.Tensor) else (source, None, None)
    if not (
        calls(norm, ATEN.layer_norm.default)
        and _alone(norm)
        and _alone(source)
        and len(argument(norm, "normalized_shape")) == 1
    ):
        return
    modulation = [
        None if part is None else _put(program, node, ATEN.squeeze.dim, part, 1) for part in (gain, shift)
    ]
    affine = (argument(norm, "weight"), argument(norm, "bias"), argument(norm, "eps"))
    _replace(
        node,
        _put(
            program,
            node,
            TFMQ.layer_norm_codes.default,
            given(norm)[0],
            *affine,
            *modulation,
            *given(node)[1:6],
        ),
    )


def _modulated(node: Node) -> tuple[Any, Any, Any]:
    """Return what `x * (1 + gain) + shift` is made of, gain and shift `[B or 1, 1, C]`; thrice None where it
    is anything else.
    """
    product, shift = given(node)[:2]
    if not (calls(product, ATEN.mul.Tensor) and _alone(product)):
        return None, None, None
    x, factor = given(product)
    if not (calls(factor, ATEN.add.Tensor) and given(factor)[1] == 1):
        return None, None, None
    gain = given(factor)[0]
    rows: list[list[int]] = [[] if made is None else list(made.shape) for made in map(example, (gain, shift))]
    fits = rows[0] == rows[1] and len(rows[0]) == 3 and rows[0][1] == 1
    return (x, gain, shift) if fits and x.meta["val"].ndim == 3 else (None, None, None)


def _product_behind(node: Any) -> tuple[Node | None, bool]:
    """Return the product that a node shows, and whether through a view that puts channels back; None if
    others read it too.
    """
    if not (isinstance(node, Node) and _alone(node)):
        return None, False
    viewed = calls(node, ATEN.movedim.int) and given(node)[1] == -1
    product = given(node)[0] if viewed else node
    fits = calls(product, *PRODUCTS) and _alone(product)
    return (product, viewed) if fits else (None, False)


def _renew(program: GraphModule, node: Node, product: Node, view: Node, **changes: Any) -> None:
    """Put a product with other arguments in the place of a node; `view` is what showed it."""
    made = _put(program, node, product.target, *_changed(product, **changes))
    _replace(node, made if view is product else _put(program, node, view.target, made, *given(view)[1:]))


def _fuse_activation(program: GraphModule, node: Node) -> None:
    if node.op != "call_function" or node.target not in ACTIVATIONS:
        return
    view: Any = given(node)[0]
    product, _ = _product_behind(view)
    if (
        product is not None
        and argument(product, "activation") == ""
        and argument(product, "residual") is None
    ):
        _renew(program, node, product, view, activation=ACTIVATIONS[node.target](node))


def _fuse_residual(program: GraphModule, node: Node) -> None:
    if not calls(node, ATEN.add.Tensor) or argument(node, "alpha") != 1:
        return
    for view, residual in (given(node)[:2], given(node)[1::-1]):
        product, viewed = _product_behind(view)
        if (
            product is None
            or view is residual
            or not (_same(view, residual) and _same(view, node))
            or argument(product, "residual") is not None
        ):
            continue
        last = _put(program, node, ATEN.movedim.int, residual, 1, -1) if viewed else residual
        _renew(program, node, product, view, residual=last)
        return
