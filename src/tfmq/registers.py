"""The one way to add to a register: a dict of what recipes call by name."""

from collections.abc import MutableMapping
from typing import TypeVar

Value = TypeVar("Value")


def register(known: MutableMapping[str, Value], name: str, value: Value) -> None:
    """Put `value` into a register under `name`.

    Raises:
        ValueError: the name is taken.
    """
    if name in known:
        raise ValueError(f"{name} is registered already; choose a name beside {', '.join(known)}")
    known[name] = value
