"""Run a denoiser as compiled graphs, one for each signature and batch that occurs."""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from inspect import Parameter
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from tfmq.backends.backend import EngineError
from tfmq.backends.features import TemporalFeatures
from tfmq.backends.kept import used
from tfmq.export.capture import Call, Graph
from tfmq.nn.swap import steps_of
from tfmq.nn.temporal import cached_features
from tfmq.quantizers.steps import StepContext
from tfmq.stopwatch import timed

Run = Callable[[Tensor, tuple[Tensor, ...]], tuple[Tensor, ...]]
Build = Callable[[Graph, Call], Run]
Key = tuple[str, int]

# Number of kinds of call whose graphs stay compiled. Each graph holds its own copy of every weight, so the
# least recently used one goes. Four are enough for two batch sizes of two prompt lengths.
KEPT = 4
# Seconds of a call from which on a graph computes larger batches too, part by part. A batch at once would be
# hardly faster there, and its graph would hold each weight once more and take minutes to compile.
LONG = 0.5
# Characters of an engine's message that are passed on: some engines print the whole graph.
MESSAGE = 600
# Name of the argument by which models of diffusers choose how they wrap the tensors that they return.
WRAPPED = "return_dict"
# How each model wraps what it returns, by the key of a call's signature and the value of `WRAPPED` in it.
# Executors of one model share it, since finding out takes a call in simulated arithmetic.
_STRUCTURES: WeakKeyDictionary[nn.Module, dict[tuple[str, Any], TreeSpec]] = WeakKeyDictionary()


class GraphExecutor:
    """Builds a graph when a call of a new kind comes, and keeps it while it is among the `KEPT` last ones
    used.

    Where a call takes long, a graph computes larger batches too, part by part.

    The graph takes the temporal features as an input (`TemporalFeatures`).

    Calls that differ only in arguments at their defaults, or in how the output is wrapped, share a graph: a
    pipeline says more of them than whoever calls its denoiser alone.

    A call raises `EngineError` where the engine, called `engine` in the message, cannot compile a graph or
    run it for the first time. What the model itself refuses, such as inputs that do not fit, is raised as it
    is.
    """

    def __init__(self, module: nn.Module, build: Build, *, engine: str = "torch's compiler") -> None:
        self.build = build
        self.engine = engine
        self.features = TemporalFeatures(module) if cached_features(module) else None
        self.denoisers: OrderedDict[Key, Run] = OrderedDict()
        # The shortest call of each graph.
        self.seconds: dict[Key, float] = {}
        # Whether a graph's tensors are those of every call: a model may return more of them in another wrap.
        self.shared = True

    def __deepcopy__(self, memo: dict[int, Any]) -> "GraphExecutor":
        # A graph holds the weights it was built with, which do not change; the copy of a model runs the same
        # ones.
        return self

    def __call__(self, module: nn.Module, arguments: Mapping[str, Any]) -> Any:
        steps: StepContext = steps_of(module)
        told = _told(module, arguments)
        wrapped = told.get(WRAPPED)
        call = Call.of(module, {**told, WRAPPED: False} if self.shared and WRAPPED in told else told)
        structure = _structure(module, steps, (call.signature.key, wrapped), told)
        output = self._output(module, steps, call)
        if self.shared and len(output) != structure.num_leaves:
            self.shared = False
            return self(module, arguments)
        return tree_unflatten(list(output), structure)

    def _output(self, module: nn.Module, steps: StepContext, call: Call) -> list[Tensor]:
        """Return what the denoiser puts out."""
        size = self._size(call)
        known = steps.index.expand(call.batch).split(size)
        features = (
            [()] * len(known)
            if self.features is None
            else [(rows,) for rows in self.features.of(module, call).split(size)]
        )
        found = []
        for part, bins, rows in zip(call.parts(size), known, features, strict=True):
            key = part.signature.key, size
            run = used(self.denoisers, key, partial(self._denoiser, module, part), most=KEPT)
            output, seconds = timed(partial(run, bins, (*rows, *part.tensors)))
            self.seconds[key] = min(seconds, self.seconds.get(key, seconds))
            found.append(output)
        return list(found[0]) if len(found) == 1 else [torch.cat(each) for each in zip(*found, strict=True)]

    def _denoiser(self, module: nn.Module, call: Call) -> Run:
        return self._compiled(Graph(module, call.signature), call)

    def _size(self, call: Call) -> int:
        """Return how many samples of a call are computed together: all of them, or as many as a graph has
        that is there and takes long for them.
        """
        name, batch = call.signature.key, call.batch
        if (name, batch) in self.denoisers:
            return batch
        sizes = [size for key, size in self.denoisers if key == name and batch % size == 0]
        return max((size for size in sizes if self.seconds.get((name, size), 0.0) >= LONG), default=batch)

    def _compiled(self, graph: Graph, call: Call) -> Run:
        try:
            run = self.build(graph, call)
            # Run once: some engines compile at the first run.
            bins, *inputs = graph.arguments(
                torch.zeros(call.batch, dtype=torch.long, device=call.tensors[0].device), call.tensors
            )
            run(bins, tuple(inputs))
        except EngineError:
            raise
        except (RuntimeError, TypeError) as error:
            # A TypeError is a dtype that the engine, or numpy on the way to it, does not have.
            text = " ".join(str(error).split())
            raise EngineError(
                f"{self.engine} cannot compile the denoiser for a batch of {call.batch}: {text[:MESSAGE]}"
            ) from error
        return run


def _told(module: nn.Module, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call that are not at their defaults, and whether its output is wrapped where
    the model lets its caller choose.
    """
    parameters: Mapping[str, Parameter] = module.tfmq_signature.parameters  # type: ignore[union-attr, assignment]
    told = {
        name: value
        for name, value in arguments.items()
        if name not in parameters or parameters[name].default is not value
    }
    if WRAPPED in parameters:
        told[WRAPPED] = arguments.get(WRAPPED, parameters[WRAPPED].default)
    return told


def _structure(
    module: nn.Module, steps: StepContext, key: tuple[str, Any], arguments: Mapping[str, Any]
) -> TreeSpec:
    """Return how the model wraps the tensors that it returns for calls with such a key."""
    known = _STRUCTURES.setdefault(module, {})
    if key not in known:
        call = Call.of(module, arguments)
        _, known[key] = tree_flatten(_returned(Graph(module, call.signature), steps, call))
    return known[key]


def _returned(graph: Graph, steps: StepContext, call: Call) -> Any:
    """Return what the model returns of a call, of which the wrap alone matters: of its first row, on fake
    tensors, which take no arithmetic; on real ones where its code looks at values, and of the whole call
    where it fixes the batch.
    """
    bins = steps.index.expand(call.batch)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with suppress(RuntimeError, ValueError, IndexError, TypeError), mode:
        return graph.output(bins[:1], [mode.from_tensor(tensor) for tensor in call.resized(1)])
    with suppress(RuntimeError, ValueError, IndexError):
        return graph.output(bins[:1], call.resized(1))
    return graph.output(bins, call.tensors)
