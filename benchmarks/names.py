"""Names on a command line, separated by commas, of which each must be known."""

import argparse
from collections.abc import Callable, Iterable


def names_of(known: Iterable[str]) -> Callable[[str], list[str]]:
    """Return a type for `argparse`: some of the `known` names, or `all`."""
    choices = list(known)

    def parse(text: str) -> list[str]:
        names = choices if text == "all" else text.split(",")
        unknown = [name for name in names if name not in choices]
        if unknown:
            raise argparse.ArgumentTypeError(f"there is no {unknown[0]!r}; choose from {', '.join(choices)}")
        return names

    return parse
