"""`tfmq inspect`."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tfmq.cli.options import Json, Model, Module, check_model, check_module
from tfmq.cli.outcome import emit, verb

if TYPE_CHECKING:
    from tfmq.evaluation.forecast import Forecast
    from tfmq.models.sampler import Sampler

Device = Annotated[
    bool,
    typer.Option("--device", help="Measure what integers bring on this machine at the model's own shapes."),
]
Thorough = Annotated[
    bool,
    typer.Option(
        "--thorough", help="With --device: time every layer shape and a quantized copy, whatever the size."
    ),
]
Batch = Annotated[
    int, typer.Option("--batch", min=1, metavar="N", help="Rows of the denoiser call that --device measures.")
]


def inspect(
    model: Model = None,
    module: Module = None,
    device: Device = False,
    thorough: Thorough = False,
    batch: Batch = 1,
    json: Json = False,
) -> None:
    """Show the temporal block, what each feature depends on, units, bits per layer and bytes of MODEL."""
    with verb():
        from tfmq.artifact import holds_quantized
        from tfmq.cli.models import open_model
        from tfmq.evaluation.inspection import inspect as look
        from tfmq.integrations.diffusers.quiet import quiet

        check_model(model, module)
        own = check_module(module)
        path = None if model is None or not holds_quantized(Path(model)) else Path(model)
        with quiet():
            sampler = open_model(model, module=own)
            inspection = look(
                sampler, directory=path, stock=None if own is None or path is None else own.sampler().denoiser
            )
            expected = _expected(sampler, batch=batch, thorough=thorough) if device else None
    if json:
        emit(asdict(inspection) | ({} if expected is None else {"forecast": asdict(expected)}))
    else:
        from tfmq.cli.inspection import show_forecast, show_inspection

        show_inspection(inspection)
        if expected is not None:
            show_forecast(expected)


def _expected(sampler: "Sampler", *, batch: int, thorough: bool) -> "Forecast":
    """Measure what integers bring, and say before how long that takes."""
    from tfmq.cli.progress import foretell, shown_progress
    from tfmq.evaluation.forecast import expected_seconds, forecast

    foretell(expected_seconds(sampler, batch=batch, thorough=thorough), "timing layers and steps")
    with shown_progress() as progress:
        return forecast(sampler, batch=batch, thorough=thorough, progress=progress)
