"""Execute a quantized model once another library has loaded it. The package sets how, since backends stand
above this folder.
"""

from typing import Protocol

from torch import nn


class Execute(Protocol):
    """Makes a quantized denoiser compute by a backend from now on, in place."""

    def __call__(self, module: nn.Module, backend: str) -> object: ...


_execute: list[Execute] = []


def execute_with(execute: Execute) -> None:
    """Let `execute` have every model that is loaded from now on."""
    _execute[:] = [execute]


def loaded(module: nn.Module, backend: str) -> None:
    """Make a model that has been loaded compute by `backend`; without `execute_with` it is simulated."""
    for execute in _execute:
        execute(module, backend)
