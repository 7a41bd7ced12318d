"""Silence what torch's exporters and compilers say of their own code."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_tools() -> Iterator[None]:
    """Ignore deprecations, which concern the tools and nobody who calls them, for a while."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        yield
