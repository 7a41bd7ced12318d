"""Files that are either the old version or the new one, never something between; JSON and tensors read and
written that way.
"""

import errno
import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import isfinite
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from tfmq.errors import LONGEST, cut

from .container import check_container, encode_header, file_order
from .errors import ForeignFileError, MissingFileError, StorageFullError, TruncatedFileError
from .flush import flush
from .raw import raw_bytes

__all__ = [
    "atomic_write",
    "encode_json",
    "full_disk_named",
    "read_json",
    "read_tensors",
    "remove_orphans",
    "write_json",
    "write_tensors",
]

# Limits of a JSON file, bytes and levels: far more than any of ours has, and so little that its values fit
# into memory whatever they are.
JSON_BYTES = 16 * 2**20
JSON_DEPTH = 64
TEMPORARY = re.compile(r"\..+\.[0-9a-f]{12}\.tmp")


@contextmanager
def atomic_write(path: str | Path, *, needed_bytes: int | None = None) -> Iterator[Path]:
    """Yield an empty temporary file beside `path`; once the block ends, sync it and put it in place of
    `path`; if the block fails, remove it.

    `needed_bytes`, where known, only makes the message about a full disk exact.

    Raises:
        MissingFileError: the directory of `path` does not exist.
        StorageFullError: the disk or the quota is full, in the block or here; `path` is as it was.
        OSError: any other failure of the file system.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(6)}.tmp")
    with full_disk_named(target, needed_bytes=needed_bytes):
        try:
            _create(temporary)
            yield temporary
            _sync(temporary)
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)  # It is gone already where it was put in place.
        _sync_directory(target.parent)


@contextmanager
def full_disk_named(path: Path, *, needed_bytes: int | None = None) -> Iterator[None]:
    """Turn "no space left" and "quota exceeded" within the block into `StorageFullError`, naming `path`; let
    any other exception pass.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = error.errno if isinstance(error, OSError) else _system_error(error)
        if number not in (errno.ENOSPC, errno.EDQUOT):
            raise
        needed = "more bytes than are left" if needed_bytes is None else f"{needed_bytes} bytes"
        raise StorageFullError(
            f"{path} needs {needed} ({os.strerror(number)}); free space, "
            "raise the quota, or choose another disk"
        ) from error


def _system_error(error: SafetensorError) -> int | None:
    """Return the number of the system's error that the safetensors library, which has one exception for
    everything, put into words.
    """
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None


def encode_json(value: Mapping[str, Any]) -> bytes:
    """Return `value` as JSON, UTF-8: sorted keys, indent 1, final newline; hence equal bytes for equal
    values.

    Raises:
        ValueError: a number is not finite.
        TypeError: a value is of a type JSON lacks.
    """
    return (json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def write_json(path: str | Path, value: Mapping[str, Any]) -> None:
    """Write `value` to `path` atomically as `encode_json` spells it.

    Raises:
        ValueError, TypeError: see `encode_json`; nothing is written.
        MissingFileError, StorageFullError: see `atomic_write`.
    """
    text = encode_json(value)
    with atomic_write(path, needed_bytes=len(text)) as temporary:
        temporary.write_bytes(text)


def remove_orphans(directory: Path) -> None:
    """Delete what `atomic_write` left anywhere below `directory` when its process was killed; nobody may be
    writing there.
    """
    for path in list(directory.rglob("*.tmp")):
        if TEMPORARY.fullmatch(path.name) and not path.is_dir():
            path.unlink(missing_ok=True)


def read_json(path: str | Path) -> dict[str, Any]:
    """Return the JSON object in the file at `path`; every number in it is finite and every text can be
    written again.

    Raises:
        MissingFileError: there is no such file.
        TruncatedFileError: it is empty.
        ForeignFileError: it is no regular file, larger than `JSON_BYTES`, not UTF-8 JSON, nested deeper than
            `JSON_DEPTH`, or not an object.
    """
    source = Path(path)
    text = _read_text(source)
    try:
        value = json.loads(text.decode(), parse_float=_finite, parse_constant=_finite)
        _check_values(value)
    except (ValueError, RecursionError) as error:
        raise ForeignFileError(f"{source} is not JSON ({error}); copy or save it again") from error
    if not isinstance(value, dict):
        raise ForeignFileError(
            f"{source} holds a JSON {type(value).__name__}, not an object; pass a tfmq manifest"
        )
    return value


def _read_text(source: Path) -> bytes:
    """Return the bytes of a JSON file; nothing but a regular file is opened, since a device or a pipe may
    never end.
    """
    try:
        if source.is_dir():
            raise ForeignFileError(f"{source} is a directory; pass the JSON file itself")
        if not source.is_file() and source.exists():
            raise ForeignFileError(f"{source} is not a regular file; pass the JSON file itself")
        with source.open("rb") as stream:
            text = stream.read(JSON_BYTES + 1)
    except FileNotFoundError as error:
        raise MissingFileError(
            f"{source} does not exist; check the path, or save the checkpoint again"
        ) from error
    if not text:
        raise TruncatedFileError(f"{source} has 0 bytes; copy or save it again")
    if len(text) > JSON_BYTES:
        raise ForeignFileError(
            f"{source} is larger than {JSON_BYTES} bytes, the most that a "
            "JSON file of tfmq may have; pass a tfmq manifest"
        )
    return text


def _finite(text: str) -> float:
    """Return the number that a JSON text spells: NaN and infinities are no JSON, though Python reads them."""
    value = float(text)
    if not isfinite(value):
        raise ValueError(f"a number is {text[:40]}")
    return value


def _check_values(value: Any) -> None:
    """Raise `ValueError` for values nested too deep, and for text with half of a surrogate pair, which has no
    UTF-8.
    """
    level = [value]
    for _ in range(JSON_DEPTH):
        texts: list[str] = []
        inner: list[Any] = []
        for item in level:
            match item:
                case str():
                    texts.append(item)
                case dict():
                    texts += item
                    inner += item.values()
                case list():
                    inner += item
        if any("\ud800" <= letter <= "\udfff" for text in texts if not text.isascii() for letter in text):
            raise ValueError("a text holds half of a surrogate pair")
        if not inner:
            return
        level = inner
    raise ValueError(f"nested deeper than {JSON_DEPTH} levels")


def write_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str] | None = None
) -> None:
    """Write `tensors`, any shapes and devices, to `path` atomically as safetensors: equal bytes for equal
    input, whatever the order of the mappings.

    Tensors need not be contiguous, and tensors that share memory are written once each; one at a time is
    copied at most.

    Raises:
        ValueError, TypeError: see `encode_header` and `raw_bytes`; nothing is written.
        MissingFileError, StorageFullError: see `atomic_write`.
    """
    header = encode_header(tensors, metadata=metadata)
    needed = len(header) + sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    with atomic_write(path, needed_bytes=needed) as temporary, temporary.open("wb") as stream:
        stream.write(header)
        for name in file_order(tensors):
            stream.write(raw_bytes(tensors[name]))


def tensor_names(path: str | Path) -> list[str]:
    """Return the names of the tensors in a safetensors file, sorted, without reading them.

    Raises:
        MissingFileError, ForeignFileError, TruncatedFileError: see `read_tensors`.
    """
    source = Path(path)
    check_container(source)
    with _valid(source), safe_open(source, framework="pt") as file:
        return sorted(file.keys())


@contextmanager
def _valid(source: Path) -> Iterator[None]:
    """Turn what the safetensors library finds wrong with a file into `ForeignFileError`."""
    try:
        yield
    except SafetensorError as error:
        raise ForeignFileError(
            f"{source} is not a valid safetensors file ({cut(str(error), LONGEST)}); copy or save it again"
        ) from error


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors, on the CPU and sorted by name, and the metadata of the safetensors file at `path`.

    Raises:
        MissingFileError: there is no such file.
        TruncatedFileError: it ends before its declared length.
        ForeignFileError: it is not safetensors, or carries bytes its header does not declare.
    """
    source = Path(path)
    check_container(source)
    with _valid(source), safe_open(str(source), framework="pt", device="cpu") as stream:
        tensors = {name: stream.get_tensor(name) for name in sorted(stream.keys())}
        return tensors, dict(stream.metadata() or {})


def _create(path: Path) -> None:
    """Create an empty file that obeys the umask; `tempfile` would make it unreadable to the group."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    except FileNotFoundError as error:
        raise MissingFileError(f"{path.parent} does not exist; create the directory first") from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR)
    try:
        flush(descriptor)
    finally:
        os.close(descriptor)


def _sync_directory(directory: Path) -> None:
    """Make a rename durable."""
    if os.name == "nt":  # Directories cannot be opened on this system.
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        flush(descriptor)
    except OSError as error:
        # Some network file systems cannot sync a directory; the rename itself has succeeded.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
