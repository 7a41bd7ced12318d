"""`tfmq inspect`."""

from dataclasses import asdict
from pathlib import Path

from tfmq.cli.options import Json, Model
from tfmq.cli.outcome import emit, verb


def inspect(model: Model, json: Json = False) -> None:
    """Show the temporal block, what each feature depends on, units, bits per layer and bytes of MODEL."""
    with verb():
        from tfmq.artifact import is_quantized
        from tfmq.cli.models import open_model
        from tfmq.evaluation.inspection import inspect as look
        from tfmq.integrations.diffusers.quiet import quiet

        path = Path(model)
        with quiet():
            inspection = look(open_model(model), directory=path if is_quantized(path) else None)
    if json:
        emit(asdict(inspection))
    else:
        from tfmq.cli.tables import show_inspection

        show_inspection(inspection)
