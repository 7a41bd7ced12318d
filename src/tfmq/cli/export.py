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


COMFY = "comfy"


def _comfy(sampler: "Sampler", folder: Path) -> dict[str, Any]:
    from tfmq.integrations.diffusers.original.comfy_out import export_comfy

    return export_comfy(sampler.denoiser.module, folder)


def _lines(result: dict[str, Any]) -> list[str]:
    """Return what was written, and all that was not."""
    files = f"{', '.join(result['files'])} in {result['output_dir']}"
    if result["to"] == COMFY:
        written = f"{files}: {result['int8']} matrices of int8, the rest in {result['dtype']}"
        return [written, *(f"left out: {line}" for line in result["left_out"])]
    shapes = "; ".join(f"{port['name']} {port['dtype']} {port['shape']}" for port in result["inputs"])
    return [f"{files}; inputs: {shapes}"]


def export(
    directory: Directory,
    output_dir: OutputDir,
    to: Annotated[str, typer.Option("--to", metavar="TARGET", help="openvino, onnx or comfy.")],
    module: Module = None,
    json: Json = False,
) -> None:
    """Write the denoiser of DIR as a model of another engine, which runs without tfmq, the temporal table
    inside; or with --to comfy as the int8 file that ComfyUI and others open, which lists what it leaves out.
    """
    with verb():
        from tfmq.cli.models import open_model, quantized_directory
        from tfmq.cli.progress import foretell
        from tfmq.export.directory import FILES, TARGETS
        from tfmq.export.directory import export as write
        from tfmq.integrations.diffusers.quiet import quiet
        from tfmq.nn.plan import packed_layers
        from tfmq.report.directory import completed_directory

        if to not in (*TARGETS, COMFY):
            raise typer.BadParameter(
                f"{to!r} is no target; choose one of {', '.join((*TARGETS, COMFY))}", param_hint="--to"
            )
        own = check_module(module)
        source = quantized_directory(directory)
        with quiet(), completed_directory(output_dir, owned=FILES) as folder:
            sampler = open_model(str(source), module=own)
            result: dict[str, Any] = {"output_dir": str(output_dir), "to": to}
            if to == COMFY:
                result |= _comfy(sampler, folder)
            else:
                foretell(SECONDS_A_LAYER * len(packed_layers(sampler.denoiser.module)), "the conversion")
                result |= write(sampler.denoiser, sampler.example(), folder, to=to)
    if json:
        emit(result)
    else:
        print("\n".join(_lines(result)))
