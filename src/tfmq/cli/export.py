"""`tfmq export`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tfmq.cli.options import Directory, Json, Module, OutputDir, check_module
from tfmq.cli.outcome import emit, verb

if TYPE_CHECKING:
    from tfmq.models.sampler import Sampler

# Seconds that converting one quantized layer to OpenVINO takes on one core of a server: the 79 of the
# embedded model took 5.3.
SECONDS_A_LAYER = 0.07
COMFY, GGUF = "comfy", "gguf"


def export(
    directory: Directory,
    output_dir: OutputDir,
    to: Annotated[
        str, typer.Option("--to", metavar="TARGET", help="openvino, onnx, openvino-genai, comfy or gguf.")
    ],
    halved: Annotated[
        bool | None,
        typer.Option(
            "--halved/--whole",
            help="Write weights of eight bits in halves, which processors without VNNI need, or whole; as "
            "this machine needs them.",
            show_default=False,
        ),
    ] = None,
    module: Module = None,
    json: Json = False,
) -> None:
    """Write the denoiser of DIR as a model of another engine, which runs without tfmq, the temporal table
    inside. `openvino-genai` takes the whole pipeline; `comfy` is the int8 file that ComfyUI opens, `gguf` one
    of blocks of 8 or 4 bits; both list what that has no place for.
    """
    with verb():
        from tfmq.cli.models import open_model, quantized_directory
        from tfmq.cli.progress import foretell
        from tfmq.export.directory import owned_files, targets
        from tfmq.integrations.diffusers.quiet import quiet
        from tfmq.report.directory import completed_directory

        known = (*targets(), COMFY, GGUF)
        if to not in known:
            raise typer.BadParameter(
                f"{to!r} is no target; choose one of {', '.join(known)}", param_hint="--to"
            )
        if halved is not None and to in (COMFY, GGUF):
            raise typer.BadParameter(
                f"a file for {to} holds codes as they are", param_hint="--halved/--whole"
            )
        own = check_module(module)
        source = quantized_directory(directory)
        with quiet(), completed_directory(output_dir, owned=owned_files(output_dir, to)) as folder:
            sampler = open_model(str(source), module=own)
            if to not in (COMFY, GGUF):
                foretell(SECONDS_A_LAYER * _layers(sampler, to), "the conversion")
            result = {"output_dir": str(output_dir), "to": to} | _write(sampler, folder, to, halved)
    if json:
        emit(result)
    else:
        print("\n".join(_lines(result)))


def _layers(sampler: "Sampler", to: str) -> int:
    """Return how many quantized layers are converted."""
    from tfmq.backends.execution import quantized_modules
    from tfmq.export.directory import PIPELINE
    from tfmq.nn.plan import packed_layers
    from tfmq.targets import owner_of

    parts = quantized_modules(owner_of(sampler)) if to == PIPELINE else (sampler.denoiser.module,)
    return sum(len(packed_layers(part)) for part in parts)


def _write(sampler: "Sampler", folder: Path, to: str, halved: bool | None) -> dict[str, Any]:
    """Write a model, or its pipeline where that is the target, and return its description."""
    from tfmq.export.directory import PIPELINE, export

    if to == PIPELINE:
        return _pipeline(sampler, folder, halved)
    if to == COMFY:
        from tfmq.integrations.diffusers.original.comfy_out import export_comfy

        return export_comfy(sampler.denoiser.module, folder)
    if to == GGUF:
        from tfmq.integrations.diffusers.original.gguf_out import export_gguf

        return export_gguf(sampler.denoiser.module, folder)
    return export(sampler.denoiser, sampler.example(), folder, to=to, halved=halved)


def _pipeline(sampler: "Sampler", folder: Path, halved: bool | None) -> dict[str, Any]:
    from tfmq.errors import require
    from tfmq.export.directory import PIPELINE
    from tfmq.integrations.diffusers.pipelines import PipelineSampler

    if not hasattr(sampler, "pipeline"):
        raise ValueError(f"{PIPELINE} takes a pipeline; a module of your own goes to openvino or onnx")
    assert isinstance(sampler, PipelineSampler)
    for package in ("openvino", "openvino_tokenizers"):
        require(package, extra="genai")
    from tfmq.export.genai.directory import export_pipeline

    return export_pipeline(sampler, folder, halved=halved)


def _lines(result: dict[str, Any]) -> list[str]:
    """Return what was written, and all that was not."""
    files = f"{', '.join(result['files'])} in {result['output_dir']}"
    if result["to"] == COMFY:
        written = f"{files}: {result['int8']} matrices of int8, the rest in {result['dtype']}"
        return [written, *(f"left out: {line}" for line in result["left_out"])]
    if result["to"] == GGUF:
        types = ", ".join(f"{count} of {kind}" for kind, count in result["types"].items())
        rounding = f"scales are rounded by {result['rounding']:.2%} at most"
        return [f"{files}: {types}; {rounding}", *(f"left out: {line}" for line in result["left_out"])]
    shapes = "; ".join(f"{port['name']} {port['dtype']} {port['shape']}" for port in result["inputs"])
    kept = (
        "in halves: right on any processor, slower than whole on one with VNNI"
        if result["halved"]
        else "whole: wrong on x86 processors without VNNI (--halved)"
    )
    return [f"{files}; inputs: {shapes}", f"weights of eight bits are {kept}"]
