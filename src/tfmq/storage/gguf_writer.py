"""Files of GGUF, written by the package `gguf`."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tfmq.errors import require

from .atomic import atomic_write

__all__ = ["GgufTensor", "write_gguf"]


@dataclass(frozen=True)
class GgufTensor:
    """A tensor as GGUF has it: the name of its type, and float32 or float16 of its shape, or the bytes of the
    blocks of its rows, uint8 `[R, n]`.
    """

    kind: str
    data: Tensor


def write_gguf(path: Path, tensors: Mapping[str, GgufTensor], *, architecture: str) -> None:
    """Write tensors to `path` atomically, in the order of their names.

    Args:
        path: where the file goes.
        tensors: the tensors by their names.
        architecture: what loaders call the model.

    Raises:
        MissingExtraError: the package is not installed.
        MissingFileError, StorageFullError: see `tfmq.storage.atomic.atomic_write`.
    """
    gguf = require("gguf", extra="gguf")
    needed = sum(stored.data.numel() * stored.data.element_size() for stored in tensors.values())
    with atomic_write(path, needed_bytes=needed) as temporary:
        writer = gguf.GGUFWriter(temporary, architecture)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for name, stored in sorted(tensors.items()):
            raw = {} if stored.data.dtype != torch.uint8 else {"raw_dtype": _type(gguf, stored.kind)}
            writer.add_tensor(name, stored.data.detach().cpu().contiguous().numpy(), **raw)
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()


def _type(gguf: object, kind: str) -> object:
    return gguf.GGMLQuantizationType[kind]  # type: ignore[attr-defined]
