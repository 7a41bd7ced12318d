"""`tfmq import`."""

from pathlib import Path
from typing import Annotated

import typer

from tfmq.cli.options import Json, OutputDir
from tfmq.cli.outcome import emit, verb


def import_checkpoint(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            metavar="CHECKPOINT", help=".ckpt, .pth or .safetensors of DDIM, latent diffusion or SD v1."
        ),
    ],
    config: Annotated[
        Path, typer.Option("--config", metavar="FILE.yaml", help="The configuration that came with it.")
    ],
    output_dir: OutputDir,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            "--tokenizer",
            metavar="DIR",
            help="Directory or hub id of the tokenizer of a text-to-image model.",
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Turn an original CHECKPOINT into a diffusers pipeline directory, the EMA weights where the originals
    sample with them.
    """
    with verb():
        from tfmq.integrations.diffusers.original.convert import CLIP
        from tfmq.integrations.diffusers.original.convert import import_checkpoint as convert
        from tfmq.integrations.diffusers.quiet import quiet
        from tfmq.report.directory import completed_directory

        with quiet(), completed_directory(output_dir, owned=()) as folder:
            pipeline = convert(checkpoint, config, tokenizer=tokenizer or CLIP)
            pipeline.save_pretrained(str(folder))
        parts = {name: type(part).__name__ for name, part in pipeline.components.items() if part is not None}
        result = {"output_dir": str(output_dir), "pipeline": type(pipeline).__name__, "components": parts}
    if json:
        emit(result)
    else:
        print(
            f"{result['pipeline']} in {output_dir}: "
            f"{', '.join(f'{name} {kind}' for name, kind in parts.items())}"
        )
