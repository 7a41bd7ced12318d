"""The list of a pipeline: its files that no manifest seals (scheduler, decoder, text encoders), and the
components that belong to it.

Each file is listed with its digest, each quantized component with the seal of its manifest, so that damage to
the one and an exchange of the other are found. Lists that earlier releases wrote have files alone.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from tfmq.errors import shown

from .atomic import read_json, write_json
from .digest import file_digest
from .errors import ChecksumError, ForeignFileError, MissingFileError
from .fields import Fields
from .manifest import Manifest

__all__ = ["LISTING_FILE", "verify_listed", "write_listing"]

LISTING_FILE = "tfmq_files.json"
COMPONENTS, FILES = "components", "files"
# Most characters of a listed path, and most bytes of a name in it.
LONGEST_PATH, LONGEST_PART = 1024, 255


@dataclass(frozen=True)
class Listing:
    """What a list holds: digests of files by path, and seals of components by folder, None where an earlier
    release wrote it.
    """

    files: Mapping[str, str]
    components: Mapping[str, str] | None

    @classmethod
    def read(cls, path: Path) -> "Listing":
        """Return the list at `path`.

        Raises:
            MissingFileError, TruncatedFileError, ForeignFileError: there is none, or it is no list.
        """
        fields = Fields.of(read_json(path), str(path))
        if not isinstance(fields.values.get(FILES), dict):
            return cls(_digests(fields), None)
        return cls(_digests(fields.part(FILES)), _digests(fields.part(COMPONENTS)))


def _digests(fields: Fields) -> dict[str, str]:
    return {name: fields.text(name, longest=64) for name in fields.values}


def write_listing(
    directory: Path, *, components: Mapping[Path, Manifest], excluded: tuple[str, ...] = ()
) -> str:
    """List every file below `directory` but those in the folders of `components` and the `excluded` ones;
    return the digest of the list.
    """
    skipped = {LISTING_FILE, *excluded}
    paths = [
        path
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.parent not in components and path.name not in skipped
    ]
    files = {path.relative_to(directory).as_posix(): file_digest(path) for path in paths}
    seals = {
        folder.relative_to(directory).as_posix(): manifest.seal for folder, manifest in components.items()
    }
    write_json(directory / LISTING_FILE, {COMPONENTS: seals, FILES: files})
    return file_digest(directory / LISTING_FILE)


def verify_listed(
    directory: Path, components: Mapping[Path, Manifest], *, expected: str | None = None
) -> None:
    """Check the files that were listed, and that `components`, the quantized ones that are there, are those
    of this pipeline.

    A directory without a list, as `save_pretrained` alone writes it, passes, unless `expected`, the digest of
    the list, says that it had one.

    Raises:
        MissingFileError: the list, a listed file or the folder of a listed component is gone.
        ChecksumError: the list, a file or a component is not what was listed.
        ForeignFileError, TruncatedFileError: the list cannot be read, or names what is no regular file inside
            of the directory.
    """
    path = directory / LISTING_FILE
    if not os.path.lexists(path) and expected is None:
        return
    listing = Listing.read(path)
    advice = f"copy it again, or accept what was changed: tfmq.relist({str(directory)!r})"
    files = {confined(directory, name): digest for name, digest in listing.files.items()}
    for file in files:
        if not file.is_file():
            raise ForeignFileError(f"{path} lists {file}, which is not a regular file; copy it again")
    if expected is not None and file_digest(path) != expected:
        raise ChecksumError(f"{path} is not the list that was saved with the model; {advice}")
    for file, digest in files.items():
        if file_digest(file) != digest:
            raise ChecksumError(f"{file} is not the file that was saved with the model; {advice}")
    if listing.components is not None:
        _verify_components(directory, listing.components, components, advice)


def _verify_components(
    directory: Path, listed: Mapping[str, str], found: Mapping[Path, Manifest], advice: str
) -> None:
    """Check that the quantized components are those that were listed."""
    for name, seal in listed.items():
        folder = confined(directory, name)
        if folder not in found:
            raise ChecksumError(
                f"{folder} holds no quantized model, and the pipeline was saved with one; {advice}"
            )
        if found[folder].seal != seal:
            raise ChecksumError(f"{folder} is of another pipeline than the files beside it; {advice}")
    for folder in found:
        if folder.relative_to(directory).as_posix() not in listed:
            raise ChecksumError(f"{folder} is no part of the pipeline that was saved here; {advice}")


def confined(directory: Path, name: str) -> Path:
    """Return the path below `directory` that a list calls `name`; nothing is opened.

    Raises:
        ForeignFileError: not a relative path, or one that leads out of the directory, by itself or by a link.
        MissingFileError: there is nothing.
    """
    parts = name.split("/")
    normal = len(name) <= LONGEST_PATH and all(
        part not in ("", ".", "..") and len(os.fsencode(part)) <= LONGEST_PART for part in parts
    )
    if not normal or "\0" in name or Path(name).anchor or str(PurePosixPath(name)) != name:
        raise ForeignFileError(
            f"{directory / LISTING_FILE} names {shown(name)}, which is no "
            "path inside of the directory; copy it again"
        )
    path = directory / name
    real = Path(os.path.realpath(path))
    if not any(real.is_relative_to(root) for root in _roots(directory)):
        raise ForeignFileError(f"{path} is a link out of the directory; copy the file itself")
    if not real.exists():
        raise MissingFileError(f"{path} is missing; copy it again")
    return path


def _roots(directory: Path) -> list[Path]:
    """Return where the files of `directory` may be: in it, or in the store of the hub's cache, whose
    snapshots are links to it.
    """
    root = Path(os.path.realpath(directory))
    return [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
