"""Another forward for one module, or an end where some run, for a while, and who reads from whom."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from tfmq.nn.watch import ModuleCall, all_watched, watched


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


@torch.no_grad()
def readers_of_one(layers: Mapping[str, nn.Module], run: Callable[[], Any]) -> list[list[str]]:
    """Return `layers` in lists: those that read the very same tensor one after the other, as q, k and v do,
    while `run` calls what has them all, and the others alone.
    """
    calls: list[list[str]] = []
    read: tuple[Tensor, int] | None = None

    def see(call: ModuleCall) -> None:
        nonlocal read
        x = call.args[0]
        if read is None or read[0] is not x or read[1] != x._version:
            calls.append([])
        calls[-1].append(call.name)
        read = x, x._version

    with all_watched(layers, after=see):
        run()
    counts = Counter(chain.from_iterable(calls))
    once = [[name for name in names if counts[name] == 1] for names in calls]
    return [names for names in once if names] + [[name] for name in layers if counts[name] != 1]


class _Ended(Exception):
    """Ends a call that is watched."""


@contextmanager
def ended(layers: Mapping[str, nn.Module], see: Callable[[ModuleCall], bool]) -> Iterator[None]:
    """Call `see` whenever one of `layers` has run; where it returns true, what runs in the context ends
    there.
    """

    def end(call: ModuleCall) -> None:
        if see(call):
            raise _Ended

    with suppress(_Ended), all_watched(layers, after=end):
        yield


@torch.no_grad()
def dependents(layers: Mapping[str, nn.Module], run: Callable[[], Any]) -> dict[str, set[str]]:
    """Return which of `layers` read something of the output of each, while `run` calls what has them all.

    An output that is NaN tells: whoever reads of it reads NaN, too.
    """

    def poisoned(name: str) -> set[str]:
        found: set[str] = set()

        def see(call: ModuleCall) -> None:
            if bool(call.args[0].isnan().any()):
                found.add(call.name)

        poison = watched(layers[name], after=lambda call: torch.full_like(call.output, torch.nan))
        with poison, all_watched(layers, after=see):
            run()
        return found

    return {name: poisoned(name) for name in layers}
