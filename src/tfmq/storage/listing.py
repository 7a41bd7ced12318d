"""The files of a pipeline that no manifest seals (scheduler, decoder, text encoders), each with its digest, so that damage to them is found too."""

from collections.abc import Collection
from pathlib import Path

from .atomic import read_json, write_json
from .digest import file_digest
from .errors import ChecksumError, MissingFileError

__all__ = ["LISTING_FILE", "verify_listed", "write_listing"]

LISTING_FILE = "tfmq_files.json"


def write_listing(directory: Path, *, sealed: Collection[Path]) -> None:
    """Write the SHA-256 of every file below `directory` by its path, but of those in the folders `sealed`, which have manifests of their own."""
    paths = [path for path in sorted(directory.rglob("*")) if path.is_file() and path.parent not in sealed and path.name != LISTING_FILE]
    write_json(directory / LISTING_FILE, {path.relative_to(directory).as_posix(): file_digest(path) for path in paths})


def verify_listed(directory: Path) -> None:
    """Check the files that were listed; a directory without a list, as `save_pretrained` alone writes it, passes.

    Raises:
        MissingFileError: a listed file is gone.
        ChecksumError: it is not what was listed.
        ForeignFileError, TruncatedFileError: the list cannot be read.
    """
    if not (directory / LISTING_FILE).exists():
        return
    for name, digest in read_json(directory / LISTING_FILE).items():
        path = directory / name
        if not path.exists():
            raise MissingFileError(f"{path} is missing; copy it again")
        if file_digest(path) != digest:
            advice = f"copy it again, or delete {directory / LISTING_FILE} to accept what was changed"
            raise ChecksumError(f"{path} is not the file that was saved with the model; {advice}")
