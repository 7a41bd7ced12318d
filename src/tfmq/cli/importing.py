"""`tfmq import`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from tfmq.cli.options import Json, OutputDir
from tfmq.cli.outcome import emit, verb


def import_checkpoint(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            metavar="CHECKPOINT",
            help="A model in one .safetensors or .gguf file (SD 1.x, 2.x, SDXL, SD3, FLUX.1); with --config "
            "a .ckpt, .pth or .safetensors of DDIM, latent diffusion or SD v1.",
        ),
    ],
    output_dir: OutputDir,
    config: Annotated[
        Path | None,
        typer.Option("--config", metavar="FILE.yaml", help="The configuration that came with an original."),
    ] = None,
    base: Annotated[
        Path | None,
        typer.Option(
            "--base",
            metavar="DIR",
            help="A pipeline of the same family, for what a single file does not hold.",
        ),
    ] = None,
    prediction: Annotated[
        str | None,
        typer.Option(
            "--prediction",
            metavar="KIND",
            help="epsilon or v_prediction, where a single file does not show it.",
        ),
    ] = None,
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
    """Turn a CHECKPOINT into a diffusers pipeline directory: one file as it is, an original with its
    configuration and the EMA weights where it samples with them.
    """
    if config is not None and (base, prediction) != (None, None):
        raise typer.BadParameter("--base and --prediction are for files without --config")
    if prediction not in (None, "epsilon", "v_prediction"):
        raise typer.BadParameter("choose epsilon or v_prediction", param_hint="--prediction")
    with verb():
        from tfmq.integrations.diffusers.quiet import quiet
        from tfmq.report.directory import completed_directory

        with quiet(), completed_directory(output_dir, owned=()) as folder:
            # Importing them is what transformers has something to say on.
            from tfmq.artifact import save
            from tfmq.integrations.diffusers.architecture import manifest_of
            from tfmq.integrations.diffusers.original.convert import CLIP
            from tfmq.integrations.diffusers.original.convert import import_checkpoint as convert
            from tfmq.integrations.diffusers.original.single_file import open_single_file

            pipeline = (
                open_single_file(checkpoint, base=base, tokenizer=tokenizer, prediction=prediction)  # type: ignore[arg-type]
                if config is None
                else convert(checkpoint, config, tokenizer=tokenizer or CLIP)
            )
            quantized = {
                name: part for name, part in pipeline.components.items() if manifest_of(part) is not None
            }
            if quantized:
                save(pipeline, folder, manifest={}, extra={})
            else:
                pipeline.save_pretrained(str(folder))
        parts = {name: type(part).__name__ for name, part in pipeline.components.items() if part is not None}
        result = {"output_dir": str(output_dir), "pipeline": type(pipeline).__name__, "components": parts}
        result["quantized"] = list(quantized)
    if json:
        emit(result)
    else:
        print(_line(result))


def _line(result: dict[str, Any]) -> str:
    """Return what was written, in a line."""
    parts = ", ".join(f"{name} {kind}" for name, kind in result["components"].items())
    quantized = "".join(f"; {name} is quantized" for name in result["quantized"])
    return f"{result['pipeline']} in {result['output_dir']}: {parts}{quantized}"
