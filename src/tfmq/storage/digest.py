"""Fingerprints of a set of tensors, wherever they live, and of a file."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from .errors import MissingFileError
from .raw import dtype_name, raw_bytes

__all__ = ["file_digest", "module_digest", "remember_digest", "tensor_digest"]

# Name of the attribute in which a module keeps the digest of its tensors and the stamp that they had then.
DIGEST = "tfmq_digest"


def tensor_digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256, as 64 hex digits, of names, dtypes, shapes and bit patterns; tensors of any shape.

    For each name in sorted order the hash takes one line of JSON `[name, dtype, shape]` and then the values,
    little-endian and row-major. Hence it does not depend on the order of the mapping, on device, strides or
    shared memory; it tells -0.0 from 0.0. At most one tensor is copied at a time.

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


def _stamp(state: Mapping[str, Tensor]) -> tuple[tuple[str, int, int], ...] | None:
    """Return what changes whenever a tensor of a state dict is written to, exchanged or cast; None where
    torch does not count writes.
    """
    if any(tensor.is_inference() or tensor.is_meta for tensor in state.values()):
        return None
    return tuple((name, tensor.data_ptr(), tensor._version) for name, tensor in state.items())


def remember_digest(module: nn.Module, digest: str, tensors: Mapping[str, Tensor]) -> None:
    """Note that `module` holds `tensors`, just loaded into it, whose digest is known: hashing gigabytes once
    is enough.

    Nothing is noted where loading changed them, as a cast to another dtype does.
    """
    state = module.state_dict()
    same = state.keys() == tensors.keys() and all(
        tensor.dtype == tensors[name].dtype for name, tensor in state.items()
    )
    setattr(module, DIGEST, (digest, _stamp(state)) if same else None)


def module_digest(module: nn.Module) -> str:
    """Return the `tensor_digest` of a module's state dict: the remembered one, unless a tensor changed since
    then.
    """
    state = module.state_dict()
    digest, stamp = getattr(module, DIGEST, None) or ("", None)
    return digest if stamp is not None and stamp == _stamp(state) else tensor_digest(state)
