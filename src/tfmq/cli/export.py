"""`tfmq export`."""

from typing import Annotated

import typer

from tfmq.cli.options import Directory, Json, Module, OutputDir, check_module
from tfmq.cli.outcome import emit, verb

# Seconds that converting one quantized layer to OpenVINO takes on one core of a server: the 79 of the
# embedded model took 5.3.
SECONDS_A_LAYER = 0.07


def export(
    directory: Directory,
    output_dir: OutputDir,
    to: Annotated[str, typer.Option("--to", metavar="TARGET", help="openvino or onnx.")],
    module: Module = None,
    json: Json = False,
) -> None:
    """Write the denoiser of DIR as a model of another engine, which runs without tfmq; the temporal table is
    inside.
    """
    with verb():
        from tfmq.cli.models import open_model, quantized_directory
        from tfmq.cli.progress import foretell
        from tfmq.export.directory import FILES, TARGETS
        from tfmq.export.directory import export as write
        from tfmq.integrations.diffusers.quiet import quiet
        from tfmq.nn.plan import packed_layers
        from tfmq.report.directory import completed_directory

        if to not in TARGETS:
            raise typer.BadParameter(
                f"{to!r} is no target; choose one of {', '.join(TARGETS)}", param_hint="--to"
            )
        own = check_module(module)
        source = quantized_directory(directory)
        with quiet(), completed_directory(output_dir, owned=FILES) as folder:
            sampler = open_model(str(source), module=own)
            foretell(SECONDS_A_LAYER * len(packed_layers(sampler.denoiser.module)), "the conversion")
            result = {"output_dir": str(output_dir), "to": to} | write(
                sampler.denoiser, sampler.example(), folder, to=to
            )
    if json:
        emit(result)
    else:
        shapes = "; ".join(f"{port['name']} {port['dtype']} {port['shape']}" for port in result["inputs"])
        print(f"{', '.join(result['files'])} in {output_dir}; inputs: {shapes}")
