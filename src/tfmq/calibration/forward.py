"""Another forward for one module, or somebody who watches some, for a while."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

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
