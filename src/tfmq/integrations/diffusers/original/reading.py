"""Which single files are opened, by the end of their names."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from tfmq.integrations.diffusers.original.integer import IntegerLayer
from tfmq.storage.atomic import read_tensors
from tfmq.storage.comfy import split_layers
from tfmq.storage.gguf import read_gguf


@dataclass(frozen=True)
class Reader:
    """How a kind of file is read.

    Attributes:
        format: what provenance calls quantized layers of it.
        read: returns the tensors of a file, and those of its layers that are quantized, by name; raises
            `CheckpointError`.
    """

    format: str
    read: Callable[[Path], tuple[dict[str, Tensor], Mapping[str, IntegerLayer]]]


READERS = {
    ".safetensors": Reader("comfy", lambda path: split_layers(*read_tensors(path), source=path)),
    ".gguf": Reader("gguf", read_gguf),
}


def reader_of(path: Path) -> Reader:
    """Return how a file is read.

    Raises:
        ValueError: it is of another kind.
    """
    if path.suffix not in READERS:
        known = " or ".join(READERS)
        raise ValueError(f"{path} is no {known} file; other files may run code when they are read")
    return READERS[path.suffix]
