"""Write a quantized denoiser for an engine outside torch, with a description of its inputs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tfmq.errors import require
from tfmq.export.capture import Call, KeyedGraph, capture
from tfmq.export.fake_quantize import graph_kernels
from tfmq.models.denoiser import Denoiser, Inputs, output_tensors
from tfmq.nn.swap import is_quantized, steps_of
from tfmq.version import __version__

DESCRIPTION = "tfmq_export.json"
FILES = (DESCRIPTION, "denoiser.*")
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


def export(denoiser: Denoiser, example: Inputs, directory: Path, *, to: str) -> dict[str, Any]:
    """Write a quantized denoiser to an existing `directory`, for any batch, the temporal table inside and
    keyed by timestep.

    Args:
        denoiser: quantized by tfmq.
        example: one call's inputs; sizes other than the batch are fixed to theirs.
        directory: takes the model's files and `tfmq_export.json`.
        to: "openvino" or "onnx".

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
    module: nn.Module = denoiser.module
    if not is_quantized(module):
        raise ValueError("the model is not quantized; pass what tfmq quantize wrote")
    call = Call.of(module, denoiser.arguments(example))
    graph = KeyedGraph(module, call.signature)
    with torch.no_grad(), graph_kernels(module):
        output = graph.output(torch.zeros(call.batch, dtype=torch.long), call.tensors)
        # Outputs of diffusers' models have names.
        names = (
            tuple(output.keys())
            if hasattr(output, "keys")
            else tuple(str(index) for index in range(len(output_tensors(output))))
        )
        # Inputs and outputs share one name space, and both are often called `sample`.
        outputs = tuple(f"out_{name}" for name in names)
        files = write(graph, call, outputs, directory)
    shapes = [
        ["batch", *shape] if batched else list(shape)
        for shape, batched in zip(call.signature.shapes, call.signature.batched, strict=True)
    ]
    dtypes = [str(dtype).removeprefix("torch.") for dtype in call.signature.dtypes]
    description = {
        "files": files,
        "inputs": [
            {"name": n, "dtype": d, "shape": s}
            for n, d, s in zip(call.signature.names, dtypes, shapes, strict=True)
        ],
        "outputs": list(outputs),
        "timesteps": steps_of(module).timesteps.tolist(),
        "tfmq": __version__,
    }
    (directory / DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n")
    return description
