"""Find the submodules of a class."""

from typing import TypeVar

from torch import nn

Kind = TypeVar("Kind", bound=nn.Module)


def submodules(module: nn.Module, kind: type[Kind]) -> dict[str, Kind]:
    """Return `module` and what is below it as far as it is of the class `kind`, by name.

    >>> list(submodules(nn.Sequential(nn.Linear(1, 1), nn.ReLU()), nn.Linear))
    ['0']
    """
    return {name: child for name, child in module.named_modules() if isinstance(child, kind)}
