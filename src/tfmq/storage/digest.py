"""Fingerprints: of a set of tensors wherever they live, and of a file."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from .errors import MissingFileError
from .raw import dtype_name, raw_bytes

__all__ = ["file_digest", "tensor_digest"]


def tensor_digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256, as 64 hex digits, of names, dtypes, shapes and bit patterns; tensors of any shape.

    For each name in sorted order the hash takes one line of JSON `[name, dtype, shape]` and then the values, little-endian and row-major. Hence it
    does not depend on the order of the mapping, on device, strides or shared memory; it tells -0.0 from 0.0. At most one tensor is copied at a time.

    Raises:
        ValueError: a tensor has no dense values (see `raw_bytes`).
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(json.dumps([name, dtype_name(tensor.dtype), list(tensor.shape)]).encode() + b"\n")
        digest.update(raw_bytes(tensor))
    return digest.hexdigest()


def file_digest(path: str | Path) -> str:
    """Return the SHA-256, as 64 hex digits, of the bytes of the file at `path`.

    Raises:
        MissingFileError: there is no such file.
    """
    try:
        with open(path, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except FileNotFoundError as error:
        raise MissingFileError(f"{path} does not exist; check the path") from error
