"""Refuse values that a field of a recipe cannot have."""

from tfmq.errors import shown
from tfmq.numerics.groups import SMALLEST


def choice(name: str, value: object, allowed: tuple[str | bool, ...]) -> None:
    """Refuse a `value` of the field `name` that is not among those `allowed`: 1 is no True."""
    if not any(type(value) is type(one) and value == one for one in allowed):
        raise ValueError(f"{name} is {shown(value)}; it must be one of {', '.join(map(str, allowed))}")


def each(name: str, values: tuple[str, ...], allowed: tuple[str, ...]) -> None:
    """Refuse `values` of the field `name` that are not all `allowed`, or that have one twice."""
    for value in values:
        choice(name, value, allowed)
    if len(set(values)) < len(values):
        raise ValueError(f"{name} has one twice: {', '.join(values)}")


def natural(name: str, number: int) -> None:
    """Refuse a negative `number` in the field `name`."""
    if number < 0:
        raise ValueError(f"{name} must not be negative, got {number}")


def group(name: str, *sizes: int) -> None:
    """Refuse sizes of groups that hardly any channel is in."""
    for size in sizes:
        if size and size < SMALLEST:
            raise ValueError(f"{name} must be 0 or at least {SMALLEST} channels, got {size}")
