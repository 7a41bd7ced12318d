"""One call of a denoiser as a graph, with its step bins as an input, so that nothing in it branches on
values.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import is_concrete_int
from torch.utils._pytree import tree_flatten, tree_unflatten

from tfmq.export.quiet import quiet_tools
from tfmq.export.signature import TENSOR, Signature
from tfmq.nn.swap import TIMESTEP, plain_forward, steps_of
from tfmq.nn.temporal import cached_features, given_features, tabulated
from tfmq.numerics.errors import sqnr_db
from tfmq.numerics.trees import tensors_in

# dB of SQNR. Two runs of the same arithmetic agree far better than this; another branch would agree far
# worse.
SAME_DB = 40.0


@dataclass(frozen=True)
class Call:
    """The arguments of one denoiser call: its signature and its tensors, the timesteps `[B]` among them."""

    signature: Signature
    tensors: tuple[Tensor, ...]
    batch: int

    @classmethod
    def of(cls, module: nn.Module, arguments: Mapping[str, Any]) -> "Call":
        """Take the arguments of a call apart; one timestep for the batch is repeated for each sample.

        The batch is the first axis of the first tensor that has several axes: the sample.
        """
        name: str | None = getattr(module, TIMESTEP)
        sample = next(tensor for tensor in tensors_in(dict(arguments)) if tensor.ndim > 1)
        tree = dict(arguments)
        if name is not None:
            timestep = torch.as_tensor(arguments[name], device=sample.device).flatten()
            tree[name] = timestep.expand(len(sample))
        tensors = tuple(tensors_in(tree))
        return cls(Signature.of(tree, tensors, batch=len(sample), timestep=name), tensors, len(sample))

    def parts(self, size: int) -> Iterator["Call"]:
        """Yield calls of `size` samples each, a number that divides the batch."""
        pairs = [*zip(self.tensors, self.signature.batched, strict=True)]
        for start in range(0, self.batch, size):
            some = tuple(tensor[start : start + size] if batched else tensor for tensor, batched in pairs)
            yield replace(self, tensors=some, batch=size)

    def resized(self, batch: int) -> tuple[Tensor, ...]:
        """Return the tensors with the first sample repeated `batch` times."""
        pairs = zip(self.tensors, self.signature.batched, strict=True)
        return tuple(
            tensor[:1].expand(batch, *tensor.shape[1:]).clone() if batched else tensor
            for tensor, batched in pairs
        )


class Graph(nn.Module):
    """A denoiser as a function `(bins [B], features [B, D], *tensors) -> tensors`.

    The bins look up the grids of activations. The temporal features that have tables are an input, whether
    they come from the tables or, at timesteps that these do not know, from the layers behind them: neither
    are in this graph. A model without tables has no such input.
    """

    def __init__(self, module: nn.Module, signature: Signature) -> None:
        super().__init__()
        self.module = module
        self.signature = signature
        self.tables = bool(cached_features(module))

    def output(self, bins: Tensor, tensors: Sequence[Tensor]) -> Any:
        """Return what the denoiser returns at calibrated timesteps, in its own structure."""
        with steps_of(self.module).at_bins(bins):
            return self.called(tensors)

    def called(self, tensors: Sequence[Tensor]) -> Any:
        """Call the denoiser's own forward within the step context that is set."""
        given = iter(tensors)
        leaves = [next(given) if constant is TENSOR else constant for constant in self.signature.constants]
        return plain_forward(self.module, tree_unflatten(leaves, self.signature.structure))

    @property
    def positions(self) -> int:
        """How many bins there are."""
        return len(steps_of(self.module).timesteps)

    @property
    def names(self) -> tuple[str, ...]:
        """What the inputs are called, in the order of `arguments`."""
        return ("bins", *(("temporal_features",) if self.tables else ()), *self.signature.names)

    @property
    def batched(self) -> tuple[bool, ...]:
        """Whether the first axis of an input is the batch, in the order of `arguments`."""
        return (*(True for _ in range(len(self.names) - len(self.signature.names))), *self.signature.batched)

    def arguments(self, bins: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return the inputs of the graph for `tensors` at the timesteps of `bins` `[B]`."""
        return (bins, *((tabulated(self.module, bins),) if self.tables else ()), *tensors)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return the tensors of the denoiser's output for the bins, the features where there are tables, and
        the tensors of a call.
        """
        bins, *rest = inputs
        with given_features(self.module, rest.pop(0)) if self.tables else nullcontext():
            return tuple(tree_flatten(self.output(bins, rest))[0])


class KeyedGraph(Graph):
    """A denoiser as a function `tensors -> tensors` that finds the bins from the timesteps itself: nearest
    calibrated one, tables included.

    It computes the layers behind the tables too, and takes from the tables what they know.
    """

    def __init__(self, module: nn.Module, signature: Signature) -> None:
        super().__init__(module, signature)
        self.tolerance: float = steps_of(module).tolerance

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of the tensors of a call: there are no bins among the inputs."""
        return self.signature.names

    def arguments(self, bins: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return the tensors of a call with timesteps that lie between those of the tables."""
        return self._between(bins, tensors)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Look the bins up by the timesteps, and return the tensors of the denoiser's output."""
        steps = steps_of(self.module)
        if self.signature.timestep is None:
            with steps.first():
                return tuple(tree_flatten(self.called(inputs))[0])
        timestep = inputs[self.signature.timestep].to(torch.float32)
        edges = (steps.timesteps[1:] + steps.timesteps[:-1]) / 2
        # Count as `torch.bucketize` does, by operators that every engine has.
        bins = (edges[None] < timestep[:, None]).to(torch.long).sum(dim=1)
        exact = (steps.timesteps[bins] - timestep).abs() <= self.tolerance
        with steps.at_bins(bins, exact):
            return tuple(tree_flatten(self.called(inputs))[0])

    def _between(self, bins: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return the tensors with the timesteps halfway between those of `bins` and their neighbours, which
        were not calibrated if there is room.
        """
        timesteps, position = steps_of(self.module).timesteps, self.signature.timestep
        if position is None:
            return tuple(tensors)
        near = torch.where(bins + 1 < len(timesteps), bins + 1, (bins - 1).clamp(min=0))
        halfway = ((timesteps[bins] + timesteps[near]) / 2).to(tensors[position].dtype)
        return (*tensors[:position], halfway, *tensors[position + 1 :])


@torch.no_grad()
def capture(graph: Graph, call: Call, *, dynamic: bool) -> torch.export.ExportedProgram:
    """Return the graph of `call`, for its batch or with `dynamic` for any."""
    batch = max(2, call.batch) if dynamic else call.batch
    tensors = call.resized(batch) if dynamic else call.tensors
    arguments = graph.arguments(torch.zeros(batch, dtype=torch.long, device=tensors[0].device), tensors)
    shapes = (tuple({0: torch.export.Dim.AUTO} if varies else None for varies in graph.batched),)
    graph(*arguments)  # Kernels make their constants.
    with quiet_tools():
        program = torch.export.export(
            graph, arguments, dynamic_shapes=shapes if dynamic else None, strict=False
        )
    # Erase assertions: they would keep everything alive that they look at, such as the layers behind the
    # tables.
    for node in [node for node in program.graph.nodes if "_assert_" in str(node.target)]:
        program.graph.erase_node(node)
    program.graph.eliminate_dead_code()
    return program


def any_batch(program: torch.export.ExportedProgram, graph: Graph) -> bool:
    """Whether a graph that was captured for any batch is that: code that takes the batch for a number fixes
    it.
    """
    inputs = {node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"}
    given = [inputs[name] for name in program.graph_signature.user_inputs]
    return not any(
        varies and is_concrete_int(tensor.shape[0])
        for tensor, varies in zip(given, graph.batched, strict=True)
    )


@torch.no_grad()
def trace(graph: Graph, call: Call) -> Any | None:
    """Return the graph for any batch as one run shows it, several times faster than `capture`; None where one
    run does not show all of it.

    A branch on values or on the batch would be frozen as that run took it. So the traced graph has to give
    what the model gives for another batch, other values and other timesteps.
    """
    device, count = call.tensors[0].device, graph.positions

    def arguments(batch: int, first: int, factor: float) -> tuple[Tensor, ...]:
        tensors = [
            tensor * factor if tensor.is_floating_point() else tensor for tensor in call.resized(batch)
        ]
        return graph.arguments((first + torch.arange(batch, device=device)) % count, tensors)

    # Activations of each sample are in memory at once, so the other batch is the smallest.
    example, other = arguments(2, 0, 1.0), arguments(1, 1, 0.5)
    expected = graph(*other)  # Kernels make their constants.
    with quiet_tools(), warnings.catch_warnings():
        # Tracing warns of every branch; the comparison below shows which ones matter.
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
        try:
            traced = torch.jit.trace(lambda *inputs: graph(*inputs), example, check_trace=False)
            torch._C._jit_pass_dce(traced.graph)
            # An optimized run would keep every weight in float32 beside its integers, as a constant.
            with torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
                found = traced(*other)
        except RuntimeError:
            return None
    same = all(
        one.shape == two.shape and sqnr_db(one, two) > SAME_DB
        for one, two in zip(expected, found, strict=True)
    )
    return traced if same else None
