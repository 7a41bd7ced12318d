"""Run a denoiser as compiled graphs, one for each signature and batch that occurs."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from tfmq.export.capture import Call, Graph
from tfmq.nn.swap import STEPS, plain_forward
from tfmq.nn.temporal import CachedFeature, SkippedLayer

Run = Callable[[Tensor, tuple[Tensor, ...]], tuple[Tensor, ...]]
Build = Callable[[Graph, Call], Run]


class GraphExecutor:
    """Builds a graph when a call of a new kind comes, and keeps it.

    Timesteps that a temporal table does not know need the layers behind the tables, which no graph has: such a call runs layer by layer.
    """

    def __init__(self, module: nn.Module, build: Build) -> None:
        self.build = build
        self.tables = any(isinstance(child, CachedFeature | SkippedLayer) for child in module.modules())
        self.runs: dict[tuple[str, int], tuple[Run, TreeSpec]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> "GraphExecutor":
        # A graph holds the weights it was built with, which do not change; the copy of a model runs the same ones.
        return self

    def __call__(self, module: nn.Module, arguments: Mapping[str, Any]) -> Any:
        steps = getattr(module, STEPS)
        if self.tables and not steps.all_exact:
            return plain_forward(module, arguments)
        call = Call.of(module, arguments)
        bins = steps.index.expand(call.batch)
        key = call.signature.key, call.batch
        if key not in self.runs:
            graph = Graph(module, call.signature)
            _, structure = tree_flatten(graph.output(bins, call.tensors))
            self.runs[key] = self.build(graph, call), structure
        run, structure = self.runs[key]
        return tree_unflatten(list(run(bins, call.tensors)), structure)
