"""`tfmq inspect`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from tfmq.cli.options import Json, Model
from tfmq.cli.outcome import emit, verb

Device = Annotated[bool, typer.Option("--device", help="Measure what integers bring on this machine at the model's own shapes.")]
Batch = Annotated[int, typer.Option("--batch", min=1, metavar="N", help="Rows of the denoiser call that --device measures.")]


def inspect(model: Model, device: Device = False, batch: Batch = 1, json: Json = False) -> None:
    """Show the temporal block, what each feature depends on, units, bits per layer and bytes of MODEL."""
    with verb():
        from tfmq.artifact import is_quantized
        from tfmq.cli.models import open_model
        from tfmq.cli.progress import shown_progress
        from tfmq.evaluation.forecast import forecast
        from tfmq.evaluation.inspection import inspect as look
        from tfmq.integrations.diffusers.quiet import quiet

        path = Path(model)
        with quiet():
            sampler = open_model(model)
            inspection = look(sampler, directory=path if is_quantized(path) else None)
            expected = None
            if device:
                with shown_progress() as progress:
                    expected = forecast(sampler, batch=batch, progress=progress)
    if json:
        emit(asdict(inspection) | ({} if expected is None else {"forecast": asdict(expected)}))
    else:
        from tfmq.cli.tables import show_forecast, show_inspection

        show_inspection(inspection)
        if expected is not None:
            show_forecast(expected)
