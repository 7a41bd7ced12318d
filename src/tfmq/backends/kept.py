"""What is made when it is first used, and kept while it is among the last used."""

from collections import OrderedDict
from collections.abc import Callable
from typing import TypeVar

Name = TypeVar("Name")
Kept = TypeVar("Kept")


def used(kept: "OrderedDict[Name, Kept]", key: Name, make: Callable[[], Kept], *, most: int) -> Kept:
    """Return what is kept under a key, made if it is not there; what was used longest ago goes when there are
    more than `most`.
    """
    if key not in kept:
        kept[key] = make()
        if len(kept) > most:
            kept.popitem(last=False)
    kept.move_to_end(key)
    return kept[key]
