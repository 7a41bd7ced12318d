"""An output directory that changes once its content is complete, and the results read back from one."""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from tfmq.storage.atomic import full_disk_named, read_json
from tfmq.storage.checkpoint import check_text, prepare_output
from tfmq.storage.errors import ForeignFileError, OutputExistsError


def refuse_foreign(directory: Path, *, owned: Sequence[str]) -> None:
    """Refuse a directory with files that do not match the name patterns `owned`; one that does not exist is
    fine.

    Raises:
        OutputExistsError: it holds such a file, or is no directory.
        ValueError: its path is not UTF-8 text.
    """
    check_text(directory)
    if not directory.exists():
        return
    if not directory.is_dir():
        raise OutputExistsError(f"{directory} is not a directory; choose another output directory")
    foreign = sorted(
        entry.name
        for entry in directory.iterdir()
        if not any(fnmatchcase(entry.name, pattern) for pattern in owned)
    )
    if foreign:
        raise OutputExistsError(
            f"{directory} already holds {foreign[0]}, which is not from an "
            "earlier run; choose another output directory"
        )


@contextmanager
def completed_directory(directory: Path, *, owned: Sequence[str]) -> Iterator[Path]:
    """Yield an empty folder whose files move to `directory` when the block ends; if it fails, `directory`
    stays as it was.

    Files and folders of an earlier run, those that match the name patterns `owned`, are replaced.

    Raises:
        OutputExistsError: `directory` holds anything else, or is no directory.
        PermissionError, StorageFullError: it cannot be written to.
    """
    target = Path(os.path.abspath(directory))
    existed = target.exists()
    prepare_output(target, overwrite=True)
    refuse_foreign(target, owned=owned)
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with full_disk_named(partial):
            partial.mkdir()
            yield partial
        for entry in target.iterdir():
            _remove(entry)
        for entry in partial.iterdir():
            entry.replace(target / entry.name)
    except BaseException:
        if not existed:
            target.rmdir()
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def read_result(path: Path, fields: Sequence[str], *, verb: str) -> dict[str, Any]:
    """Return the JSON object that a verb of tfmq wrote to `path`.

    Raises:
        MissingFileError, TruncatedFileError: it is not there, or empty.
        ForeignFileError: it is something else: it lacks one of `fields`.
    """
    values = read_json(path)
    missing = [name for name in fields if name not in values]
    if missing:
        raise ForeignFileError(f"{path} lacks {missing[0]}; it is not from tfmq {verb}: run that again")
    return values
