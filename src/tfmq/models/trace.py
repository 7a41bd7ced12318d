"""Trace one denoiser call: what every layer depends on, where concatenations are read, and the temporal
computation as a program.

Dependence is followed through every tensor operation of the call, on fake tensors: no arithmetic, no weights
needed, no class names. A layer that depends on the timestep, and neither on the sample nor on another input
with positions (a prompt's tokens), is temporal, even where its weights are still zero.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
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

from tfmq.models.denoiser import Denoiser, Inputs
from tfmq.models.program import TIMESTEP, Call, LayerTrace, Program, Ref, Segments, Trace
from tfmq.models.record import Label, Record
from tfmq.nn.operation import is_embedding, operation_of, weight_of
from tfmq.nn.product_mode import sites
from tfmq.nn.watch import ModuleCall, all_watched
from tfmq.numerics.operations import Operation
from tfmq.numerics.trees import tensors_in
from tfmq.quantizers.part import Part

# Operators whose output holds only values of the input: copies, casts, nearest upsampling.
ATEN = torch.ops.aten
COPIES = frozenset(
    {ATEN.clone, ATEN._to_copy, ATEN.upsample_nearest1d, ATEN.upsample_nearest2d, ATEN.upsample_nearest3d}
)
NO_SEGMENTS = Segments((), 0, direct=False)


def _segments(record: Record, func: Any, args: Any, inputs: list[Tensor], output: Any) -> Segments | None:
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


def _joined(record: Record, parts: Sequence[Tensor], axis: int) -> Segments | None:
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

    def __init__(self, record: Record, mode: FakeTensorMode | None) -> None:
        super().__init__()
        self.state = record
        self.mode = mode

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*(self._fake(value) for value in args), **kwargs)
        if not self.state.inside:
            inputs = tensors_in((args, kwargs))
            combined = self.state.combine(inputs)
            label = Label(
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

    def __init__(self, record: Record) -> None:
        super().__init__()
        self.state = record

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.state.owners and not self.state.inside and (count := sites(func, args)):
            owner = self.state.owners[-1]
            self.state.products[owner] = self.state.products.get(owner, 0) + count
        return func(*args, **(kwargs or {}))


@contextmanager
def _module_hooks(module: nn.Module, record: Record) -> Iterator[None]:
    """Keep the stack of running modules, and record weighted layers, stock or quantized, as single calls."""
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
    return operation_of(module) is not None or isinstance(module, (nn.Embedding, Part))


def _record_layer(record: Record, call: ModuleCall) -> None:
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
    label = Label(combined.sources, frozenset(producers))
    record.record(Call(None, name, args, kwargs), args, kwargs, output, label)
    record.outputs[name] = record.refs[tensors_in(output)[0]]


def _read(record: Record, layer: nn.Module, operation: Operation, x: Tensor) -> Segments:
    """Return the concatenation that a layer reads as its channels."""
    segments = record.label(x).segments
    # A group of a grouped convolution reads a part of a source, so it has no segments.
    whole = segments is not None and sum(segments.widths) == weight_of(layer).shape[1]
    along = segments is not None and segments.axis == operation.channel_axis % x.ndim
    return segments if segments is not None and whole and along else NO_SEGMENTS


def _run(
    module: nn.Module,
    given: Sequence[tuple[str, Tensor]],
    call: Callable[[Sequence[Tensor]], Any],
    *,
    fake: bool,
) -> Record:
    """Return what is noted of `call`, which runs `module` on the tensors that are `given` with the name of
    what each carries.
    """
    names, tensors = zip(*given, strict=True)
    record = Record(frozenset(name for name, tensor in given if name == "sample" or tensor.ndim >= 3))
    mode: FakeTensorMode | None = None
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if fake:
            mode = stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            tensors = tuple(t if isinstance(t, FakeTensor) else mode.from_tensor(t) for t in tensors)
        for name, tensor in zip(names, tensors, strict=True):
            record.labels[tensor] = Label(frozenset({name}))
            record.refs[tensor] = Ref(-1, name=name)
        stack.enter_context(_module_hooks(module, record))
        stack.enter_context(_Operations(record, mode))
        stack.enter_context(_Products(record))
        call(tensors)
    return record


def trace(denoiser: Denoiser, example: Inputs, *, batch: int = 2) -> Trace:
    """Trace one call of `denoiser` on inputs shaped like `example`, resized to `batch` samples.

    Runs on fake tensors; a model that reads values while it runs (`.item()`) is traced on real ones instead.
    """
    inputs = example.resized(batch)

    def call(tensors: Sequence[Tensor]) -> Tensor:
        left = iter(tensors)
        return denoiser(inputs.map(lambda _: next(left)))

    run = partial(_run, denoiser.module, denoiser.labelled(inputs), call)
    try:
        record = run(fake=True)
    except (DataDependentOutputException, UnsupportedFakeTensorException):
        record = run(fake=False)
    layers = tuple(layer for layer in record.layers.values() if layer.name not in record.unusual)
    temporal = {layer.name for layer in layers if layer.temporal}
    features = tuple(
        layer.name for layer in layers if layer.name in record.features and layer.name in temporal
    )
    program = record.program(temporal)
    return Trace(layers, features, dict(record.products), program, batch, tuple(record.embeddings))


def program_of(
    module: nn.Module,
    given: Sequence[tuple[str, Tensor]],
    call: Callable[[Sequence[Tensor]], Any],
    names: Collection[str],
) -> Program:
    """Return the program of those of the submodules `names` that `call` runs; see `_run`.

    Raises:
        RuntimeError: one of them depends on a sample, or on another input with positions.
    """
    with suppress(RuntimeError, ValueError, IndexError, TypeError):
        return _run(module, given, call, fake=True).program(names)
    return _run(module, given, call, fake=False).program(names)
