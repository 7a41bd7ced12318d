"""A resumable job: a directory with a fingerprint and one file for each finished stage."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from tfmq.errors import shown
from tfmq.stopwatch import timed

from .atomic import read_json, read_tensors, remove_orphans, write_json, write_tensors
from .errors import JobMismatchError, MissingFileError

__all__ = ["Journal"]

FINGERPRINT = "job.json"
SECONDS = "seconds"


def _difference(before: Any, now: Any, path: str) -> str:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted(before.keys() | now.keys()):
            if before.get(key) != now.get(key):
                return _difference(before.get(key), now.get(key), f"{path}.{key}" if path else key)
    return f"{path} was {shown(before)} and is {shown(now)}"


class Journal:
    """The stages of one job under `directory`; with None every stage is computed and nothing is kept.

    Args:
        directory: created when missing.
        fingerprint: everything that the result depends on, as JSON values.
        resume: continue what is there; otherwise start over.

    Attributes:
        seconds_before: what the stages took that earlier runs finished, as far as they have been read back.

    Raises:
        JobMismatchError: `resume` with another fingerprint.
    """

    def __init__(self, directory: Path | None, fingerprint: Mapping[str, Any], *, resume: bool) -> None:
        self.directory = directory
        self.seconds_before = 0.0
        if directory is None:
            return
        if resume and directory.exists():
            self._check(fingerprint)
        else:
            shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True, exist_ok=True)
        write_json(directory / FINGERPRINT, fingerprint)

    def _check(self, fingerprint: Mapping[str, Any]) -> None:
        assert self.directory is not None
        try:
            before = read_json(self.directory / FINGERPRINT)
        except MissingFileError:
            # The job was killed before its first byte of work, so there is nothing to lose.
            return
        if before != fingerprint:
            raise JobMismatchError(
                f"cannot resume {self.directory}: {_difference(before, dict(fingerprint), '')}; "
                "start over without --resume"
            )

    def of(self, name: str) -> "Journal":
        """Return the journal, in a folder within this one, of a part of the job with stages of its own."""
        part = Journal(None, {}, resume=False)
        if self.directory is not None:
            part.directory = self.directory / name
            part.directory.mkdir(parents=True, exist_ok=True)
        return part

    def done(self, name: str) -> bool:
        """Whether the stage was finished."""
        return self.directory is not None and (self.directory / f"{name}.safetensors").exists()

    def read(self, name: str) -> dict[str, Tensor]:
        """Return the tensors of a finished stage.

        Raises:
            MissingFileError: it was not finished, or nothing is kept.
        """
        if self.directory is None:
            raise MissingFileError(f"the stage {name} was not kept: the job has no directory")
        return read_tensors(self.directory / f"{name}.safetensors")[0]

    def stage(self, name: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return the tensors of a finished stage, or compute them and write them atomically."""
        if self.directory is None:
            return compute()
        path = self.directory / f"{name}.safetensors"
        if not path.exists():
            tensors, seconds = timed(compute)
            write_tensors(path, tensors, metadata={SECONDS: repr(seconds)})
            return read_tensors(path)[0]
        tensors, metadata = read_tensors(path)
        self.seconds_before += float(metadata.get(SECONDS, 0.0))
        return tensors

    def sweep(self) -> None:
        """Delete the half-written files of a job that was killed; for the one process of a job, since
        another's file may be half written now.
        """
        if self.directory is not None:
            remove_orphans(self.directory)

    def remove(self) -> None:
        """Delete the job's files."""
        if self.directory is not None:
            shutil.rmtree(self.directory, ignore_errors=True)
