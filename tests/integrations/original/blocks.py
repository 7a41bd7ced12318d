"""GGUF files of small denoisers, quantized and read by the package `gguf`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import published
import pytest
import torch
from torch import Tensor

from tfmq.integrations.diffusers.original.file_parts import SingleFile
from tfmq.integrations.diffusers.original.integer import integer_denoiser
from tfmq.integrations.diffusers.original.single_file import denoiser_of
from tfmq.storage.atomic import write_tensors

gguf = pytest.importorskip("gguf")

PREFIX = "model.diffusion_model."
MAKERS: dict[str, Callable[[Path], Any]] = {
    "flux": published.flux,
    "sd3": published.sd3,
    "sdxl": published.sdxl,
    "sd1": published.stable_diffusion,
}
LINEAR = ("attn", "mlp", "ff.net", "linear1", "linear2", "adaLN", "proj_in")


def originals(folder: Path, maker: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the parts of a pipeline and the tensors of its denoiser, without prefix."""
    parts, tensors = MAKERS[maker](folder)
    prefix = "" if maker == "flux" else PREFIX
    return parts, {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def is_linear(name: str, tensor: Tensor) -> bool:
    inner = name.endswith(".weight") and tensor.ndim == 2 and tensor.shape[1] % 32 == 0
    return inner and any(part in name for part in LINEAR)


def write(path: Path, tensors: dict[str, Tensor], kind: str, *, architecture: str = "flux") -> None:
    """Write linear layers as blocks, and all else in float32, float16 and bfloat16 by turns."""
    types = gguf.GGMLQuantizationType
    writer = gguf.GGUFWriter(path, architecture)
    for place, (name, tensor) in enumerate(tensors.items()):
        chosen = kind if is_linear(name, tensor) else ("F32", "F16", "BF16")[place % 3]
        data = gguf.quants.quantize(tensor.float().numpy(), types[chosen])
        writer.add_tensor(name, data, raw_dtype=types[chosen])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def dequantized(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file as the package reads them."""
    return {
        tensor.name: torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy()).reshape(
            tuple(reversed(tensor.shape.tolist()))
        )
        for tensor in gguf.GGUFReader(path).tensors
    }


def kinds(path: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}


def architecture(path: Path) -> str:
    return bytes(gguf.GGUFReader(path).fields["general.architecture"].parts[-1]).decode()


def opened(path: Path) -> Any:
    file = SingleFile(path)
    return integer_denoiser(file.family, file.denoiser, file.layers, source=file.source)


def floating(path: Path, tensors: dict[str, Tensor]) -> Any:
    """Return the stock denoiser with the tensors of a file of floats."""
    write_tensors(path, tensors)
    file = SingleFile(path)
    return denoiser_of(file.family, file.denoiser)
