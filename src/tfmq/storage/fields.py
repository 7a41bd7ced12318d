"""Values taken out of a JSON object by their type; what is of another type is refused by its place in the
file.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from tfmq.errors import shown

from .errors import ForeignFileError

__all__ = ["LONGEST_NAME", "Fields"]

# Most characters of a name, and most names in a list.
LONGEST_NAME = 512
# Largest magnitude of a number. It shuts out infinity, and integers that no float can hold.
LARGEST = 1e300

Value = TypeVar("Value")


@dataclass(frozen=True)
class Fields:
    """One object of a JSON file.

    Args:
        values: what the object holds.
        source: names the file in messages.
        path: where in the file the object is, with a final dot; empty for the outermost object.

    Every method raises `ForeignFileError` for a value that is missing or not what the method returns.
    """

    values: Mapping[str, Any]
    source: str
    path: str = ""

    @classmethod
    def of(cls, value: Any, source: str, path: str = "") -> "Fields":
        """Return `value` as an object."""
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise refusal(source, path.rstrip(".") or "the manifest", value, "an object")
        return cls(value, source, path)

    def has(self, name: str) -> bool:
        """Whether there is a value other than null."""
        return self.values.get(name) is not None

    def optional(self, name: str, read: Callable[["Fields", str], Value]) -> Value | None:
        """Return what the method `read` gives for a value, None where there is none."""
        return read(self, name) if self.has(name) else None

    def refuse(self, name: str, wanted: str) -> ForeignFileError:
        """Return the error of a value that is not `wanted`."""
        if name not in self.values:
            return ForeignFileError(
                f"{self.source}: {self.path}{name} is missing; it must be {wanted}; copy or save it again"
            )
        return refusal(self.source, f"{self.path}{name}", self.values[name], wanted)

    def only(self, known: frozenset[str]) -> None:
        """Refuse a value of a name that is not `known`: a newer writer knows what it means."""
        if strange := sorted(self.values.keys() - known):
            raise self.refuse(strange[0], f"absent: this tfmq knows {', '.join(sorted(known))}; upgrade tfmq")

    def _of_kind(
        self, name: str, kind: type[Value], wanted: str, fits: Callable[[Value], bool] = lambda value: True
    ) -> Value:
        """Return a value of the class `kind` that `fits`; else it is not what was `wanted`."""
        value = self.values.get(name)
        if not isinstance(value, kind) or not fits(value):
            raise self.refuse(name, wanted)
        return value

    def flag(self, name: str) -> bool:
        """Return true or false."""
        return self._of_kind(name, bool, "true or false")

    def integer(self, name: str, least: int, most: int) -> int:
        """Return an integer of `least` to `most`."""
        value = self.values.get(name)
        if type(value) is not int or not least <= value <= most:
            raise self.refuse(name, f"an integer of {least} to {most}")
        return value

    def number(self, name: str) -> float:
        """Return a finite number."""
        value = self.values.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= LARGEST:
            raise self.refuse(name, "a finite number")
        return float(value)

    def text(self, name: str, *, longest: int = LONGEST_NAME) -> str:
        """Return a text of 1 to `longest` characters."""
        wanted = f"a text of 1 to {longest} characters"
        return self._of_kind(name, str, wanted, lambda text: 0 < len(text) <= longest)

    def choice(self, name: str, allowed: tuple[str, ...]) -> str:
        """Return one of the `allowed` texts."""
        return self._of_kind(name, str, f"one of {', '.join(allowed)}", allowed.__contains__)

    def part(self, name: str) -> "Fields":
        """Return an object."""
        if name not in self.values:
            raise self.refuse(name, "an object")
        return Fields.of(self.values[name], self.source, f"{self.path}{name}.")

    def items(self, name: str) -> list[Any]:
        """Return a list."""
        value = self.values.get(name)
        if not isinstance(value, list | tuple):
            raise self.refuse(name, "a list")
        return list(value)

    def parts(self, name: str) -> Iterator["Fields"]:
        """Yield the objects of a list."""
        for place, item in enumerate(self.items(name)):
            yield Fields.of(item, self.source, f"{self.path}{name}[{place}].")

    def names(self, name: str, *, empty: bool = False) -> tuple[str, ...]:
        """Return a list of names of modules, each at most once; `empty` allows the empty one, which is the
        module at the top.
        """
        found = self.items(name)
        wanted = f"a list of distinct names of {int(not empty)} to {LONGEST_NAME} characters"
        if not all(
            isinstance(item, str) and int(not empty) <= len(item) <= LONGEST_NAME for item in found
        ) or len(set(found)) < len(found):
            raise self.refuse(name, wanted)
        return tuple(found)

    def widths(self, name: str, *, most: int) -> tuple[int, ...]:
        """Return a list of integers, each 1 or more, at most `most` in all."""
        found = self.items(name)
        if not all(type(item) is int and 1 <= item <= most for item in found) or sum(found) > most:
            raise self.refuse(name, f"a list of integers of at least 1, at most {most} in all")
        return tuple(found)


def refusal(source: str, place: str, value: Any, wanted: str) -> ForeignFileError:
    """Return the error of a value that is not `wanted`."""
    return ForeignFileError(
        f"{source}: {place} is {shown(value)}; it must be {wanted}; copy or save it again"
    )
