"""A user's own model, named by a Python file and a function in it that returns a sampler."""

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

from tfmq.models.sampler import Sampler
from tfmq.nn.swap import is_quantized

NEEDED = ("denoiser", "run", "example", "describe")


class ModuleFileError(ValueError):
    """A file and function that were to give a sampler do not; says what is wrong with them."""


@dataclass(frozen=True)
class ModuleFile:
    """`FILE.py:FUNCTION`: the function is called without arguments and returns a sampler of the
    full-precision model, built anew each time.

    The file is run once in a process, with its folder first among the places that Python imports from, as
    `python FILE.py` would have it.
    """

    path: Path
    function: str

    @staticmethod
    def parse(text: str) -> "ModuleFile":
        """Return what a text names.

        Raises:
            ModuleFileError: it is not `FILE.py:FUNCTION`.
        """
        path, _, function = text.rpartition(":")
        if not path.endswith(".py") or not function.isidentifier():
            raise ModuleFileError(
                f"{text!r} is no FILE.py:FUNCTION; the function returns a sampler, such as tfmq.LoopSampler"
            )
        return ModuleFile(Path(path).absolute(), function)

    def __str__(self) -> str:
        return f"{self.path}:{self.function}"

    def sampler(self) -> Sampler:
        """Call the function.

        Raises:
            ModuleFileError: there is no such file or function, one of them fails, or what is returned is no
                sampler of a full-precision model.
        """
        sampler = self._attempt(f"{self.function} of {self.path}", self._called())
        lacking = [name for name in NEEDED if not hasattr(sampler, name)]
        if lacking:
            kind = type(sampler).__name__
            raise ModuleFileError(
                f"{self.function} of {self.path} returned a {kind}, which is no sampler: it "
                f"has no {', '.join(lacking)}; return a tfmq.LoopSampler, "
                "or what docs/extending.md says of loops of one's own"
            )
        if is_quantized(sampler.denoiser.module):
            raise ModuleFileError(
                f"{self.function} of {self.path} returned a quantized model; it "
                "has to build the full-precision one at each call"
            )
        found: Sampler = sampler
        return found

    def _called(self) -> Callable[[], Any]:
        if not self.path.is_file():
            raise ModuleFileError(
                f"{self.path} does not exist; name the file with the function: FILE.py:FUNCTION"
            )
        name = f"tfmq_module_{self.path.stem}_{crc32(str(self.path).encode(errors='surrogateescape')):08x}"
        if name not in sys.modules:
            self._attempt(str(self.path), lambda: self._run(name))
        function = getattr(sys.modules[name], self.function, None)
        if not callable(function):
            raise ModuleFileError(f"{self.path} has no function {self.function}")
        return function

    def _run(self, name: str) -> None:
        """Run the file as the module `name`."""
        spec = importlib.util.spec_from_file_location(name, self.path)
        assert spec is not None and spec.loader is not None
        if str(self.path.parent) not in sys.path:
            sys.path.insert(0, str(self.path.parent))
        sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(sys.modules[name])
        except BaseException:
            del sys.modules[name]
            raise

    def _attempt(self, what: str, call: Callable[[], Any]) -> Any:
        """Return what a user's code returns; whatever it raises is put down to it."""
        try:
            return call()
        except Exception as error:
            raise ModuleFileError(f"{what} raised {type(error).__name__}: {error}") from error
