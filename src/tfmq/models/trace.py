"""Trace one denoiser call: what every layer depends on, where concatenations are read, and the temporal
computation as a program.

Dependence is followed through every tensor operation of the call, on fake tensors: no arithmetic, no weights
needed, no class names. A layer that depends on the timestep, and neither on the sample nor on another input
with positions (a prompt's tokens), is temporal, even where its weights are still zero.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedFakeTensorException,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from tfmq.models.denoiser import Denoiser, Inputs
from tfmq.models.program import TIMESTEP, Call, LayerTrace, Ref, Segments, Trace, sliced
from tfmq.nn.operation import is_embedding, operation_of, weight_of
from tfmq.nn.product_mode import sites
from tfmq.nn.watch import ModuleCall, all_watched
from tfmq.numerics.operations import Operation
from tfmq.numerics.trees import map_tensors, tensors_in

# Operators whose output holds only values of the input: copies, casts, nearest upsampling.
ATEN = torch.ops.aten
COPIES = frozenset(
    {ATEN.clone, ATEN._to_copy, ATEN.upsample_nearest1d, ATEN.upsample_nearest2d, ATEN.upsample_nearest3d}
)
NO_SEGMENTS = Segments((), 0, direct=False)
# Inputs with finitely many values. A computation that reads no other input can be tabulated.
FINITE = frozenset({TIMESTEP, "class_labels"})


@dataclass(frozen=True)
class _Label:
    sources: frozenset[str] = frozenset()
    producers: frozenset[str] = frozenset()
    segments: Segments | None = None


_NOTHING = _Label()


@dataclass
class _Record:
    spatial: frozenset[str]
    labels: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)
    refs: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)
    calls: list[Call | None] = field(default_factory=list)
    layers: dict[str, LayerTrace] = field(default_factory=dict)
    outputs: dict[str, Ref] = field(default_factory=dict)
    embeddings: dict[str, None] = field(default_factory=dict)
    unusual: set[str] = field(default_factory=set)
    features: dict[str, None] = field(default_factory=dict)
    products: dict[str, int] = field(default_factory=dict)
    owners: list[str] = field(default_factory=list)
    inside: int = 0

    def label(self, tensor: Tensor) -> _Label:
        """Return what is known of a tensor."""
        return self.labels.get(tensor, _NOTHING)

    def record(self, call: Call, args: Any, kwargs: Any, output: Any, label: _Label) -> None:
        """Note a call and give its outputs a label and a place in the program."""
        program_call = None
        if not label.sources & self.spatial:
            program_call = Call(
                call.function,
                call.module,
                map_tensors(self.reference, args),
                map_tensors(self.reference, kwargs),
            )
        self.calls.append(program_call)
        for leaf, tensor in enumerate(tensors_in(output)):
            self.labels[tensor] = label
            self.refs[tensor] = Ref(len(self.calls) - 1, leaf)

    def reference(self, tensor: Tensor) -> Any:
        """Return the place in the program where a tensor is made; itself where it is a constant."""
        return self.refs.get(tensor, tensor)

    def combine(self, inputs: list[Tensor]) -> _Label:
        """Return the label of what is computed from `inputs`; note the temporal layers whose output meets
        other data here.
        """
        labels = [self.label(tensor) for tensor in inputs]
        sources = frozenset().union(*(label.sources for label in labels))
        producers = frozenset().union(*(label.producers for label in labels))
        for label in labels:
            leaves_finite = label.sources <= FINITE and not sources <= FINITE
            meets_positions = not label.sources & self.spatial and sources & self.spatial
            if leaves_finite or meets_positions:
                self.features.update(dict.fromkeys(sorted(label.producers)))
                producers -= label.producers
        return _Label(sources, producers)


def _segments(record: _Record, func: Any, args: Any, inputs: list[Tensor], output: Any) -> Segments | None:
    """Return the channel concatenation that `output` carries: a new one, or that of an input of the same
    width.
    """
    output = next(iter(tensors_in(output)), None)
    if output is None or output.ndim < 3:
        return None
    if func is torch.ops.aten.cat.default:
        return _joined(record, args[0], (args[1] if len(args) > 1 else 0) % output.ndim)
    for tensor in inputs:
        segments = record.label(tensor).segments
        if segments and _same_width(tensor, output, segments.axis):
            copied = func.is_view or func.overloadpacket in COPIES
            return segments if copied else replace(segments, direct=False)
    return None


def _joined(record: _Record, parts: Sequence[Tensor], axis: int) -> Segments | None:
    """Return the concatenation of `parts`; None along the batch, or where a part has no positions."""
    spatial = all(record.label(part).sources & record.spatial for part in parts)
    if not axis or not spatial or len(parts) < 2:
        return None
    return Segments(tuple(part.shape[axis] for part in parts), axis)


def _same_width(left: Tensor, right: Tensor, axis: int) -> bool:
    return left.ndim == right.ndim and left.shape[axis] == right.shape[axis]


class _Operations(TorchDispatchMode):
    """Labels the output of every operation outside of weighted layers.

    Parameters go to an operation as fake tensors: torch looks up what an operation makes of fake tensors of
    the same shapes, and works it out again wherever a real one is among them.
    """

    def __init__(self, record: _Record, mode: FakeTensorMode | None) -> None:
        super().__init__()
        self.state = record
        self.mode = mode

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*(self._fake(value) for value in args), **kwargs)
        if not self.state.inside:
            inputs = tensors_in((args, kwargs))
            combined = self.state.combine(inputs)
            label = _Label(
                combined.sources, combined.producers, _segments(self.state, func, args, inputs, output)
            )
            self.state.record(Call(func, "", args, kwargs), args, kwargs, output, label)
        return output

    def _fake(self, value: Any) -> Any:
        if self.mode is None or type(value) is not nn.Parameter:
            return value
        return self.mode.from_tensor(value)


class _Products(TorchFunctionMode):
    """Counts attention products by the module whose forward calls them."""

    def __init__(self, record: _Record) -> None:
        super().__init__()
        self.state = record

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.state.owners and not self.state.inside and (count := sites(func, args)):
            owner = self.state.owners[-1]
            self.state.products[owner] = self.state.products.get(owner, 0) + count
        return func(*args, **(kwargs or {}))


@contextmanager
def _module_hooks(module: nn.Module, record: _Record) -> Iterator[None]:
    """Keep the stack of running modules, and record weighted layers as single calls."""
    modules = dict(module.named_modules())
    weighted = {name for name, child in modules.items() if _is_weighted(child)}

    def enter(call: ModuleCall) -> None:
        record.owners.append(call.name)
        record.inside += call.name in weighted

    def leave(call: ModuleCall) -> None:
        record.owners.pop()
        if call.name not in weighted:
            return
        record.inside -= 1
        if not record.inside:
            _record_layer(record, call)

    with all_watched(modules, before=enter, after=leave):
        yield


def _is_weighted(module: nn.Module) -> bool:
    return operation_of(module) is not None or isinstance(module, nn.Embedding)


def _record_layer(record: _Record, call: ModuleCall) -> None:
    name, layer, args, kwargs, output = call
    inputs = tensors_in((args, kwargs))
    combined = record.combine(inputs)
    operation = operation_of(layer)
    if len(args) + len(kwargs) > 1:
        # The call passes more than an input, such as the output size of a transposed convolution. A quantized
        # layer does not take that.
        record.unusual.add(name)
    if is_embedding(layer):
        record.embeddings[name] = None
    if operation is not None:
        known = record.layers.get(name)
        sources = combined.sources | (known.depends_on if known else frozenset())
        temporal = TIMESTEP in sources and not sources & record.spatial
        read = _read(record, layer, operation, inputs[0])
        record.layers[name] = LayerTrace(
            name,
            sources,
            temporal,
            read.widths,
            tokenwise=operation.by_token,
            direct=read.direct,
            channels=weight_of(layer).shape[1] * operation.groups,
        )
    producers = {name} & {layer.name for layer in (record.layers.get(name),) if layer and layer.temporal}
    label = _Label(combined.sources, frozenset(producers))
    record.record(Call(None, name, args, kwargs), args, kwargs, output, label)
    record.outputs[name] = record.refs[output]


def _read(record: _Record, layer: nn.Module, operation: Operation, x: Tensor) -> Segments:
    """Return the concatenation that a layer reads as its channels."""
    segments = record.label(x).segments
    # A group of a grouped convolution reads a part of a source, so it has no segments.
    whole = segments is not None and sum(segments.widths) == weight_of(layer).shape[1]
    along = segments is not None and segments.axis == operation.channel_axis % x.ndim
    return segments if segments is not None and whole and along else NO_SEGMENTS


def _run(denoiser: Denoiser, inputs: Inputs, *, fake: bool) -> _Record:
    labelled = denoiser.labelled(inputs)
    record = _Record(frozenset(name for name, tensor in labelled if name == "sample" or tensor.ndim >= 3))
    mode: FakeTensorMode | None = None
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if fake:
            mode = stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            inputs = inputs.map(lambda t: t if isinstance(t, FakeTensor) else mode.from_tensor(t))
        for name, tensor in denoiser.labelled(inputs):
            record.labels[tensor] = _Label(frozenset({name}))
            record.refs[tensor] = Ref(-1, name=name)
        stack.enter_context(_module_hooks(denoiser.module, record))
        stack.enter_context(_Operations(record, mode))
        stack.enter_context(_Products(record))
        denoiser(inputs)
    return record


def trace(denoiser: Denoiser, example: Inputs, *, batch: int = 2) -> Trace:
    """Trace one call of `denoiser` on inputs shaped like `example`, resized to `batch` samples.

    Runs on fake tensors; a model that reads values while it runs (`.item()`) is traced on real ones instead.
    """
    inputs = example.resized(batch)
    try:
        record = _run(denoiser, inputs, fake=True)
    except (DataDependentOutputException, UnsupportedFakeTensorException):
        record = _run(denoiser, inputs, fake=False)
    layers = tuple(layer for layer in record.layers.values() if layer.name not in record.unusual)
    temporal = {layer.name for layer in layers if layer.temporal}
    features = tuple(
        layer.name for layer in layers if layer.name in record.features and layer.name in temporal
    )
    calls, outputs = sliced(
        record.calls, {name: ref for name, ref in record.outputs.items() if name in temporal}
    )
    return Trace(layers, features, dict(record.products), calls, outputs, batch, tuple(record.embeddings))
