"""Weights that tfmq does not have: where the user's copy is, and what to say where there is none. Nothing is
ever downloaded.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from tfmq.storage.digest import file_digest
from tfmq.storage.errors import ForeignFileError, MissingFileError

# Errors that `torch.load` raises for a file that holds anything but weights. The first one is pickle's own.
NO_WEIGHTS = (torch.serialization.pickle.UnpicklingError, RuntimeError, EOFError, ValueError)  # type: ignore[attr-defined]


@dataclass(frozen=True, kw_only=True)
class WeightFile:
    """A published file: its name, the first digits of its sha256, and where it is published."""

    name: str
    digest: str
    origin: str


@dataclass(frozen=True)
class WeightFolder:
    """Where weight files lie: a folder of the user's, or torch's cache (`TORCH_HOME`)."""

    folder: Path | None = None

    @property
    def hub(self) -> Path:
        """The folder that has `checkpoints/` in it, as torch's cache does."""
        return self.folder or Path(torch.hub.get_dir())

    def find(self, file: WeightFile, *, instead: str) -> Path:
        """Return the path of a file.

        Args:
            file: the file that is needed.
            instead: says what can be had without it; ends the message of the error.

        Raises:
            MissingFileError: it is not there.
            ForeignFileError: its content is not what was published.
        """
        path = self.hub / "checkpoints" / file.name
        if not path.is_file():
            raise MissingFileError(
                f"{path} does not exist: download {file.origin} and put it there, or into "
                f"DIR/checkpoints and pass --weights-dir DIR; {instead}"
            )
        if not file_digest(path).startswith(file.digest):
            raise ForeignFileError(
                f"{path} has another sha256 than published ({file.digest}...); download {file.origin} again"
            )
        return path

    @contextmanager
    def as_cache(self) -> Iterator[None]:
        """Let libraries that look into torch's cache look here while the context is open."""
        before = torch.hub.get_dir()
        torch.hub.set_dir(str(self.hub))
        try:
            yield
        finally:
            torch.hub.set_dir(before)


def check_state(path: Path) -> None:
    """Refuse a file that holds more than tensors in containers: unpickling it would run what it says.

    Raises:
        ForeignFileError: it does, or is no file of torch's.
    """
    try:
        torch.load(path, map_location="cpu", weights_only=True)
    except NO_WEIGHTS as error:
        cause = str(error).partition("\n")[0] or "it ends too early"
        raise ForeignFileError(f"{path} is no file of weights ({cause}); download it again") from error
