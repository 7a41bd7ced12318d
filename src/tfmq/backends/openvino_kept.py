"""Compiled models of OpenVINO's CPU plug-in, each in a file of its own.

OpenVINO's own cache reads all weights of a model to find what was compiled of it. These files are found by
what the model was made from, so that a later start reads the compiled form alone.
"""

from collections.abc import Mapping
from contextlib import suppress
from hashlib import sha256
from mmap import ACCESS_COPY, mmap
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tfmq.allocator import paging_out
from tfmq.storage.atomic import atomic_write
from tfmq.storage.errors import CheckpointError

# Behind the compiled model stands its size, so that a file that was cut off is not handed to the plug-in.
SIZE = np.dtype("<u8")


def compiled_file(directory: Path, core: Any, device: str, key: str, settings: Mapping[str, Any]) -> Path:
    """Return the file of what is compiled of the model `key` with these settings by this processor."""
    machine = [core.get_property(device, name) for name in ("FULL_DEVICE_NAME", "OPTIMIZATION_CAPABILITIES")]
    machine.append(torch.backends.cpu.get_cpu_capability())
    text = "\n".join(map(repr, (key, sorted(settings.items()), machine)))
    return directory / f"{sha256(text.encode()).hexdigest()[:32]}.compiled"


def read_compiled(core: Any, path: Path, device: str, settings: Mapping[str, Any]) -> tuple[Any, Any] | None:
    """Return the compiled model in a file, and what has to live as long as it does; None if there is none, or
    none that this OpenVINO reads.
    """
    import openvino as ov

    with suppress(OSError, ValueError, RuntimeError):
        with path.open("rb") as file:
            mapped = mmap(file.fileno(), 0, access=ACCESS_COPY)
        content = np.frombuffer(mapped, dtype=np.uint8)
        size = int(content[-SIZE.itemsize :].view(SIZE)[0])
        if size == len(content) - SIZE.itemsize:
            tensor = ov.Tensor(content[:size], shared_memory=True)
            # The plug-in gives weights a layout of its own. What it reads again later comes from the file.
            with paging_out(torch.from_numpy(content)):
                model = core.import_model(tensor, device, dict(settings))
            return model, (mapped, tensor)
    return None


def write_compiled(model: Any, path: Path) -> None:
    """Keep a compiled model in a file; without a word there is none where the disk is full."""
    with suppress(CheckpointError, OSError, RuntimeError):
        data = model.export_model()
        content = data if isinstance(data, bytes) else data.getvalue()
        with atomic_write(path) as partial, partial.open("wb") as file:
            file.write(content)
            file.write(np.array([len(content)], dtype=SIZE).tobytes())
