"""Another forward for one module, or somebody who watches some, for a while, and who reads from whom."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let `module` compute by `forward`, which takes the same arguments, instead of its own, which does not
    run; hooks do.
    """
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


@contextmanager
def watched(layers: Mapping[str, nn.Module], see: Callable[[str, Tensor, Tensor], None]) -> Iterator[None]:
    """Call `see(name, input, output)` whenever one of `layers` runs."""

    def hook(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda _, args, output: see(name, args[0], output)

    handles = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def readers_of_one(layers: Mapping[str, nn.Module], run: Callable[[], Any]) -> list[list[str]]:
    """Return `layers` in lists: those that read the very same tensor one after the other, as q, k and v do,
    while `run` calls what has them all, and the others alone.
    """
    calls: list[list[str]] = []
    read: tuple[Tensor, int] | None = None

    def see(name: str, x: Tensor, _: Tensor) -> None:
        nonlocal read
        if read is None or read[0] is not x or read[1] != x._version:
            calls.append([])
        calls[-1].append(name)
        read = x, x._version

    with watched(layers, see):
        run()
    counts = Counter(chain.from_iterable(calls))
    once = [[name for name in names if counts[name] == 1] for names in calls]
    return [names for names in once if names] + [[name] for name in layers if counts[name] != 1]


class _Ended(Exception):
    """Ends a call that is watched."""


@contextmanager
def ended(layers: Mapping[str, nn.Module], see: Callable[[str, Tensor, Tensor], bool]) -> Iterator[None]:
    """Call `see(name, input, output)` whenever one of `layers` runs; where it returns true, what runs in the
    context ends there.
    """

    def end(name: str, x: Tensor, output: Tensor) -> None:
        if see(name, x, output):
            raise _Ended

    with suppress(_Ended), watched(layers, end):
        yield


@torch.no_grad()
def dependents(layers: Mapping[str, nn.Module], run: Callable[[], Any]) -> dict[str, set[str]]:
    """Return which of `layers` read something of the output of each, while `run` calls what has them all.

    An output that is NaN tells: whoever reads of it reads NaN, too.
    """

    def poisoned(name: str) -> set[str]:
        found: set[str] = set()

        def see(reader: str, x: Tensor, _: Tensor) -> None:
            if bool(x.isnan().any()):
                found.add(reader)

        handle = layers[name].register_forward_hook(lambda _, __, output: torch.full_like(output, torch.nan))
        try:
            with watched(layers, see):
                run()
        finally:
            handle.remove()
        return found

    return {name: poisoned(name) for name in layers}
