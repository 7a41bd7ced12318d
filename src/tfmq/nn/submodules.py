"""Find the submodules of a class, and those of some names."""

from collections.abc import Iterable
from typing import TypeVar

from torch import nn

Kind = TypeVar("Kind", bound=nn.Module)


def submodules(module: nn.Module, kind: type[Kind]) -> dict[str, Kind]:
    """Return `module` and what is below it as far as it is of the class `kind`, by name.

    >>> list(submodules(nn.Sequential(nn.Linear(1, 1), nn.ReLU()), nn.Linear))
    ['0']
    """
    return {name: child for name, child in module.named_modules() if isinstance(child, kind)}


def named(module: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    """Return the submodules `names` of `module`, in that order.

    Raises:
        AttributeError: `module` has no submodule of such a name.

    >>> named(nn.Sequential(nn.Linear(1, 1), nn.ReLU()), ["1"])
    {'1': ReLU()}
    """
    return {name: module.get_submodule(name) for name in names}
