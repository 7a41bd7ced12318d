"""Write a quantized denoiser for an engine outside torch, with a description of its inputs."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tfmq.errors import require
from tfmq.export.capture import Call, KeyedGraph, capture
from tfmq.export.fake_quantize import graph_kernels
from tfmq.kernels.halves import wanted
from tfmq.models.denoiser import Denoiser, Inputs, output_tensors
from tfmq.nn.swap import is_quantized, steps_of
from tfmq.version import __version__

DESCRIPTION = "tfmq_export.json"
FILES = (DESCRIPTION, "denoiser.*")
# The target that takes a whole pipeline, see `tfmq.export.genai`; those of `TARGETS` take a denoiser.
PIPELINE = "openvino-genai"
PIPELINE_FILES = (
    *("model_index.json", "scheduler", "unet", "transformer", "vae_decoder"),
    *("text_encoder*", "tokenizer*"),
)
Write = Callable[[KeyedGraph, Call, tuple[str, ...], Path], list[str]]


def _openvino(graph: KeyedGraph, call: Call, outputs: tuple[str, ...], directory: Path) -> list[str]:
    import openvino as ov

    from tfmq.export.openvino import convert

    model = convert(graph, call)
    for port, name in zip(model.outputs, outputs, strict=True):
        port.set_names({name})
    ov.save_model(model, directory / "denoiser.xml", compress_to_fp16=False)
    return ["denoiser.xml", "denoiser.bin"]


def _onnx(graph: KeyedGraph, call: Call, outputs: tuple[str, ...], directory: Path) -> list[str]:
    import onnx

    from tfmq.export.onnx import convert

    model = convert(capture(graph, call, dynamic=True), inputs=graph.signature.names, outputs=outputs)
    onnx.save_model(model, directory / "denoiser.onnx")
    return ["denoiser.onnx"]


# For each target, by name, the packages it needs and the function that writes it.
TARGETS: dict[str, tuple[tuple[str, ...], Write]] = {
    "openvino": (("openvino",), _openvino),
    "onnx": (("onnx", "onnxscript"), _onnx),
}


def targets() -> tuple[str, ...]:
    """Return every name that `tfmq export --to` takes."""
    return (*TARGETS, PIPELINE)


def owned_files(directory: Path, to: str) -> tuple[str, ...]:
    """Return name patterns of what an earlier export to `directory` may have written. Folders are called as
    those of any pipeline, so they count only where the description beside them says whose they are.
    """
    described = to == PIPELINE and (directory / DESCRIPTION).is_file()
    return (*FILES, *PIPELINE_FILES) if described else FILES


def export(
    denoiser: Denoiser, example: Inputs, directory: Path, *, to: str, halved: bool | None = None
) -> dict[str, Any]:
    """Write a quantized denoiser to an existing `directory`, for any batch, the temporal table inside and
    keyed by timestep.

    Args:
        denoiser: quantized by tfmq.
        example: one call's inputs; sizes other than the batch are fixed to theirs.
        directory: takes the model's files and `tfmq_export.json`.
        to: "openvino" or "onnx".
        halved: whether weights of eight bits are written in halves, for processors without VNNI (see
            `tfmq.kernels.halves`); None means as this machine needs it.

    Returns:
        What `tfmq_export.json` holds: files, inputs, outputs, calibrated timesteps.

    Raises:
        ValueError: no such target, or the model is not quantized.
        MissingExtraError: the target's library is not installed.
    """
    if to not in TARGETS:
        raise ValueError(f"cannot export to {to!r}; choose one of {', '.join(TARGETS)}")
    packages, write = TARGETS[to]
    for package in packages:
        require(package, extra=to)
    graph, call = keyed_call(denoiser, example)
    halved = wanted(halved)
    with torch.no_grad(), graph_kernels(denoiser.module, halved=halved):
        outputs = output_names(graph, call)
        files = write(graph, call, outputs, directory)
    written = description(denoiser.module, files=files, inputs=ports(call), outputs=outputs, halved=halved)
    (directory / DESCRIPTION).write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    return written


def keyed_call(denoiser: Denoiser, example: Inputs) -> tuple[KeyedGraph, Call]:
    """Return the graph of a quantized denoiser that is keyed by timestep, and the call that an example is.

    Raises:
        ValueError: the model is not quantized.
    """
    module: nn.Module = denoiser.module
    if not is_quantized(module):
        raise ValueError("the model is not quantized; pass what tfmq quantize wrote")
    call = Call.of(module, denoiser.arguments(example))
    return KeyedGraph(module, call.signature), call


def output_names(graph: KeyedGraph, call: Call) -> tuple[str, ...]:
    """Return what the outputs of a denoiser's graph are called. Inputs and outputs share one name space, and
    both are often called `sample`.
    """
    output = graph.output(torch.zeros(call.batch, dtype=torch.long), call.tensors)
    # Outputs of diffusers' models have names.
    names = (
        tuple(output.keys())
        if hasattr(output, "keys")
        else tuple(str(index) for index in range(len(output_tensors(output))))
    )
    return tuple(f"out_{name}" for name in names)


def ports(call: Call) -> list[dict[str, Any]]:
    """Return name, dtype and shape of each tensor of a call."""
    shapes = [
        ["batch", *shape] if batched else list(shape)
        for shape, batched in zip(call.signature.shapes, call.signature.batched, strict=True)
    ]
    dtypes = [str(dtype).removeprefix("torch.") for dtype in call.signature.dtypes]
    return [
        {"name": n, "dtype": d, "shape": s}
        for n, d, s in zip(call.signature.names, dtypes, shapes, strict=True)
    ]


def description(
    module: nn.Module,
    *,
    files: Sequence[str],
    inputs: Sequence[Mapping[str, Any]],
    outputs: Sequence[str],
    halved: bool,
) -> dict[str, Any]:
    """Return what `tfmq_export.json` holds of a denoiser: its files, inputs, outputs, the calibrated
    timesteps, and whether weights of eight bits are in halves.
    """
    return {
        "files": list(files),
        "inputs": list(inputs),
        "outputs": list(outputs),
        "timesteps": steps_of(module).timesteps.tolist(),
        "halved": halved,
        "tfmq": __version__,
    }
