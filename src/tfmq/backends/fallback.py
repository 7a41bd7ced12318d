"""Let the next way compute a call where an engine cannot compile or run it, and say so in one line."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from tfmq.backends.prepared import Kind, Prepared, Way, kind_of
from tfmq.nn.swap import adapted, plain_forward

# Most characters of an error that a message repeats.
LONGEST = 300


def in_a_line(error: Exception) -> str:
    """Return what an error says, as one line of a length to read."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= LONGEST else text[:LONGEST] + "..."


def complain(failed: Way, error: Exception, instead: Way, *, stacklevel: int = 2) -> None:
    """Warn that `instead` computes what another way could not."""
    warnings.warn(
        f"{failed} cannot run this model: {in_a_line(error)}; {instead} computes such calls instead. "
        f'Choose backend="{instead.backend}" to do so from the start, '
        "and report it where the engine is developed",
        stacklevel=stacklevel + 1,
    )


def first_that_runs(
    prepared: Prepared, module: nn.Module, ways: tuple[Way, ...], arguments: Mapping[str, Any]
) -> tuple[Any, tuple[Way, ...]]:
    """Return the output of the first of `ways` that computes a call, and the ways from that one on.

    The last way is torch's own floating point. What it raises is a mistake of the call, and of no engine: it
    passes.
    """
    failures: list[tuple[Way, RuntimeError]] = []
    for position, way in enumerate(ways[:-1]):
        try:
            output = prepared.run(module, way, arguments)
        except RuntimeError as error:
            failures.append((way, error))
            continue
        return _after(failures, output, ways[position:])
    return _after(failures, prepared.run(module, ways[-1], arguments), ways[-1:])


def _after(
    failures: list[tuple[Way, RuntimeError]], output: Any, ways: tuple[Way, ...]
) -> tuple[Any, tuple[Way, ...]]:
    for way, error in failures:
        complain(way, error, ways[0], stacklevel=5)
    return output, ways


def beside_adapters(
    prepared: Prepared, module: nn.Module, ways: tuple[Way, ...], arguments: Mapping[str, Any]
) -> Any:
    """Return the output of the first of `ways` that computes layer by layer: a graph was made without the
    adapters that stand beside layers, and their strength may change at every call.
    """
    way = next(way for way in ways if way.layerwise)
    if way != prepared.current:
        warnings.warn(
            f"{type(module).__name__} has LoRA adapters beside its layers, which graphs do not hold: {way} "
            "computes it layer by layer while they are there",
            stacklevel=5,
        )
    return prepared.run(module, way, arguments)


class FallbackExecutor:
    """Computes each kind of call by the first of `order` that can; a kind that an engine has failed at is not
    tried again.
    """

    def __init__(self, order: tuple[Way, ...], prepared: Prepared) -> None:
        self.order = order
        self.prepared = prepared
        self.ways: dict[Kind, tuple[Way, ...]] = {}

    def __call__(self, module: nn.Module, arguments: Mapping[str, Any]) -> Any:
        if torch.compiler.is_compiling():
            return plain_forward(module, arguments)
        if adapted(module):
            return beside_adapters(self.prepared, module, self.order, arguments)
        kind = kind_of(arguments)
        output, self.ways[kind] = first_that_runs(
            self.prepared, module, self.ways.get(kind, self.order), arguments
        )
        return output
