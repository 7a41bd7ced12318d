"""A checkpoint directory: `tfmq_model.safetensors` and the manifest `tfmq.json` that describes and seals it.

A directory whose writing was interrupted never loads. Each file is replaced atomically, and the manifest,
which carries the digest of the tensors, comes last: stopped before it, a new directory has no manifest
(`MissingFileError`), and an overwritten one has the old manifest beside new tensors, whose names or digest it
does not match (`TensorMismatchError`, `ChecksumError`). If it does match, tensors and checkpoint are the old
ones.

The digest seals the tensors, and `seal` every other field of the manifest: a damaged manifest does not load
either.
"""

import errno
import hashlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from tfmq.errors import LONGEST, cut, shown

from .atomic import encode_json, full_disk_named, read_json, read_tensors, write_json, write_tensors
from .digest import tensor_digest
from .errors import ChecksumError, ForeignFileError, OutputExistsError, TensorMismatchError, VersionError
from .raw import dtype_name

__all__ = [
    "FORMAT_VERSION",
    "MANIFEST_FILE",
    "TENSORS_FILE",
    "check_format",
    "check_text",
    "load_checkpoint",
    "prepare_output",
    "save_checkpoint",
    "seal",
    "verify",
    "verify_architecture",
]

# Newest version of the format of a quantized model.
FORMAT_VERSION = 3
# Version 1 is version 2 without dynamic input quantizers. Version 2 is version 3 without layers that have one
# of these, and with these sections.
OLDER = 2
NEWER = frozenset({"kind", "rescaled", "rotated", "ordered", "branch", "grid", "group"})
OLDER_SECTIONS = frozenset({"steps", "timestep", "layers", "products", "tables", "skipped"})
READABLE = (1, OLDER, FORMAT_VERSION)
MANIFEST_FILE = "tfmq.json"
TENSORS_FILE = "tfmq_model.safetensors"
_FORMAT = "tfmq"
# Number of names that a message lists. It counts the rest.
_LISTED = 8


def save_checkpoint(
    directory: str | Path, tensors: Mapping[str, Tensor], manifest: Mapping[str, Any]
) -> None:
    """Write `tensors`, any shapes, and then the sealed `manifest` into `directory`, creating it; other files
    there stay.

    Raises:
        ValueError, TypeError: a tensor or a manifest value cannot be written; nothing is written.
        OutputExistsError, PermissionError: see `prepare_output`.
        StorageFullError: the disk is full; the directory holds what it held, or does not load.
    """
    sealed = seal(tensors, manifest)
    encode_json(sealed)  # An unserialisable manifest must fail before it costs the old tensors.
    target = prepare_output(directory, overwrite=True)
    write_tensors(target / TENSORS_FILE, tensors)
    write_json(target / MANIFEST_FILE, sealed)


def load_checkpoint(directory: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors, on the CPU, and the sealed manifest of the checkpoint in `directory`, verified.

    Raises:
        MissingFileError, ForeignFileError, TruncatedFileError: one of the two files is absent or unreadable.
        VersionError, TensorMismatchError, ChecksumError: see `verify`.
    """
    source = Path(directory)
    manifest = read_json(source / MANIFEST_FILE)
    check_format(manifest, source=source / MANIFEST_FILE)
    tensors, _ = read_tensors(source / TENSORS_FILE)
    verify(tensors, manifest, source=source / MANIFEST_FILE)
    return tensors, manifest


def seal(tensors: Mapping[str, Tensor], manifest: Mapping[str, Any], *, table: bool = True) -> dict[str, Any]:
    """Return `manifest` with the fields `format`, `version`, `digest`, `tensors` (name to dtype and shape)
    and `seal` set for `tensors`.

    `table` false leaves `tensors` out, where another reader checks names and shapes; the digest covers them
    all the same. Those five belong to the format: values under these names are replaced, so that a loaded
    manifest can be sealed again. `seal` is the sha256 of all other fields as canonical JSON.

    Raises:
        ValueError: a tensor has no dense values (see `tensor_digest`).
    """
    fields = {
        **manifest,
        "format": _FORMAT,
        "version": _version(manifest),
        "digest": tensor_digest(tensors),
    }
    if table:
        fields["tensors"] = _table(tensors)
    return {**fields, "seal": _manifest_digest(fields)}


def _version(manifest: Mapping[str, Any]) -> int:
    """Return the lowest version that has all that `manifest` says, so that no reader refuses what it
    understands.
    """
    structure = manifest.get("structure", {})
    newer = structure.keys() - OLDER_SECTIONS or any(
        NEWER.intersection(group) for group in structure.get("layers", [])
    )
    return FORMAT_VERSION if newer else OLDER


def _manifest_digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(
        encode_json({key: value for key, value in manifest.items() if key != "seal"})
    ).hexdigest()


def verify(
    tensors: Mapping[str, Tensor], manifest: Mapping[str, Any], *, source: str | Path = "the manifest"
) -> None:
    """Check that `tensors`, loaded by whatever means, on any device, are those `manifest` was sealed for;
    `source` names the manifest in messages.

    Raises:
        ForeignFileError: `manifest` is not a sealed tfmq manifest.
        VersionError: its version is none of `READABLE`.
        TensorMismatchError: tensors are missing, unexpected, or of another dtype or shape.
        ChecksumError: values differ, or another field of the manifest changed since it was sealed.
        ValueError: a tensor has no dense values (see `tensor_digest`).
    """
    check_format(manifest, source=source)
    if "tensors" in manifest:
        _check_table(tensors, manifest["tensors"], source=source)
    digest = tensor_digest(tensors)
    if digest != manifest["digest"]:
        raise ChecksumError(
            f"{source} seals tensors of digest {cut(manifest['digest'], LONGEST)}, these "
            f"have {digest}; the data is damaged: copy or save it again"
        )
    if manifest.get("seal") != _manifest_digest(manifest):
        raise ChecksumError(f"{source} was changed since it was sealed; copy or save the checkpoint again")


def verify_architecture(
    configuration: Mapping[str, Any], manifest: Mapping[str, Any], *, source: str | Path
) -> None:
    """Check that a component's `configuration` still has what `manifest` seals of it as `architecture`;
    `source` names it in messages.

    What it has beyond that, as later libraries add it, is left alone. Manifests of earlier releases seal no
    architecture.

    Raises:
        ChecksumError: an entry is missing or has another value.
    """
    for name, value in manifest.get("architecture", {}).items():
        if name not in configuration or configuration[name] != value:
            found = shown(configuration[name]) if name in configuration else "missing"
            raise ChecksumError(
                f"{source} was changed since it was sealed: {cut(name, LONGEST)} is "
                f"{found}, was {shown(value)}; copy or save it again"
            )


def prepare_output(directory: str | Path, *, overwrite: bool) -> Path:
    """Create `directory`, with its parents, unless it exists; check that files can be created in it, and
    return it. Nothing in it is removed.

    Raises:
        OutputExistsError: it holds files and `overwrite` is false, or the path is no directory.
        PermissionError: it cannot be written to.
        StorageFullError: there is no space to create it.
        ValueError: the path is not UTF-8 text.
    """
    target = Path(directory)
    check_text(target)
    with full_disk_named(target):
        try:
            target.mkdir(parents=True, exist_ok=True)
            names = sorted(entry.name for entry in target.iterdir())
        except (FileExistsError, NotADirectoryError) as error:
            raise OutputExistsError(
                f"{target} is not a directory, or lies below a file; choose another output directory"
            ) from error
        if names and not overwrite:
            raise OutputExistsError(
                f"{target} already holds {_listing(names)}; choose another output directory, or delete them"
            )
        _check_writable(target)
    return target


def check_text(path: Path) -> None:
    """Refuse a path that reports, manifests and libraries could not name.

    Raises:
        ValueError: it is not UTF-8 text.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the path {os.fsencode(path)!r} is not UTF-8 text; choose another output directory"
        ) from error


def _check_writable(directory: Path) -> None:
    """Create and drop a file: permission bits say nothing to root, or on a read-only file system."""
    try:
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        advice = f"{error.strerror}; change its permissions or choose another output directory"
        raise PermissionError(error.errno, advice, str(directory)) from error


def check_format(manifest: Mapping[str, Any], *, source: str | Path) -> None:
    """Check what every manifest must have, whatever its version.

    Raises:
        ForeignFileError: it is no sealed tfmq manifest.
        VersionError: its version is none of `READABLE`.
    """
    if manifest.get("format") != _FORMAT:
        raise ForeignFileError(
            f"{source} has format {shown(manifest.get('format'))}, not {_FORMAT!r}; pass a tfmq checkpoint"
        )
    version = manifest.get("version")
    if type(version) is not int or version not in READABLE:
        known = f"{', '.join(map(str, READABLE[:-1]))} and {READABLE[-1]}"
        raise VersionError(
            f"{source} has version {shown(version)}, this tfmq reads {known}; "
            "install the tfmq that wrote it, or save it again"
        )
    for field, kind in (("digest", str), ("tensors", dict)):
        if field == "tensors" and field not in manifest:
            continue
        if not isinstance(manifest.get(field), kind):
            raise ForeignFileError(
                f"{source} has {field} {shown(manifest.get(field))}, not a "
                f"{kind.__name__}; save the checkpoint again"
            )


def _check_table(tensors: Mapping[str, Tensor], expected: Mapping[str, Any], *, source: str | Path) -> None:
    actual = _table(tensors)
    common = sorted(expected.keys() & actual.keys())
    defects = {
        "missing": sorted(expected.keys() - actual.keys()),
        "unexpected": sorted(actual.keys() - expected.keys()),
        "different": [
            f"{name} (listed as {shown(expected[name])}, is {actual[name]})"
            for name in common
            if expected[name] != actual[name]
        ],
    }
    found = "; ".join(f"{kind}: {_listing(names)}" for kind, names in defects.items() if names)
    if found:
        raise TensorMismatchError(
            f"{source} does not list these tensors: {found}; the files are of "
            "different checkpoints: copy or save both again"
        )


def _table(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    return {
        name: {"dtype": dtype_name(tensor.dtype), "shape": list(tensor.shape)}
        for name, tensor in tensors.items()
    }


def _listing(names: list[str]) -> str:
    """Join the first few names, none longer than a message may show, and count the rest."""
    rest = len(names) - _LISTED
    return ", ".join(cut(name, LONGEST) for name in names[:_LISTED]) + (
        f" and {rest} more" if rest > 0 else ""
    )
