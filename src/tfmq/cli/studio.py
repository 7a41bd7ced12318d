"""`tfmq studio`."""

from pathlib import Path
from typing import Annotated

import typer

from tfmq.cli.devices import check_devices
from tfmq.cli.options import Backend, EngineDevice, check_execution
from tfmq.cli.outcome import verb


def studio(
    models: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[DIR]...", help="Quantized models, or folders of them. Default: those in this folder."
        ),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            "--reference",
            metavar="MODEL",
            help="The original to begin with. Default: that of the first quantized model.",
        ),
    ] = None,
    port: Annotated[
        int | None,
        typer.Option("--port", min=1, max=65535, help="Of the page. Default: the first free one from 7860."),
    ] = None,
    device: EngineDevice = None,
    backend: Backend = "auto",
) -> None:
    """Open a page on this machine that draws the same image with a quantized model and its original, with
    time and memory.
    """
    with verb(interrupted="the page is closed"):
        from tfmq.studio.page import Studio, find_models

        device, engine = check_devices(device, backend)
        options = check_execution(backend, "unpacked", engine)
        found = [model for folder in models or [Path()] for model in find_models(folder)]
        made = Studio(found, reference, backend=backend, device=device, options=options)

        def opened(address: str) -> None:
            typer.echo(
                f"{address} (Ctrl-C closes it); quantized models to choose from: {len(found)}", err=True
            )

        made.serve(port=port, opened=opened)
