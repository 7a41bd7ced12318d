"""`tfmq analyze`."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from tfmq.cli.devices import check_devices
from tfmq.cli.options import (
    Backend,
    Directory,
    EngineDevice,
    Json,
    Module,
    Prompts,
    Reference,
    Seed,
    Steps,
    WeightForm,
    beside,
    check_execution,
    check_module,
    check_reference,
    read_prompts,
)
from tfmq.cli.outcome import emit, verb
from tfmq.errors import require

SUFFIX = ".analysis"


def analyze(
    directory: Directory,
    reference: Reference = None,
    num_images: Annotated[
        int | None,
        typer.Option(
            "--num-images",
            min=1,
            help="Images whose trajectories are followed. Default: 1, with --thorough 4.",
        ),
    ] = None,
    thorough: Annotated[
        bool, typer.Option("--thorough", help="Look at every unit, and at more calls and images.")
    ] = False,
    module: Module = None,
    steps: Steps = None,
    seed: Seed = 0,
    output_dir: Annotated[
        Path | None,
        typer.Option("--output-dir", metavar="OUT", help="Where the files go. Default: DIR.analysis."),
    ] = None,
    device: EngineDevice = None,
    prompts: Prompts = None,
    backend: Backend = "auto",
    weights: WeightForm = "unpacked",
    parquet: Annotated[
        bool, typer.Option("--parquet", help="Write the values as analysis.parquet too, one a row.")
    ] = False,
    json: Json = False,
) -> None:
    """Show where a quantized model loses: temporal features by timestep, ranges, the trajectory, sensitivity
    of units, errors of layers.
    """
    target = output_dir or beside(directory, SUFFIX)
    with verb():
        from tfmq.backends.execution import computed_alone
        from tfmq.cli.models import default_steps, execute_model, open_model, provenance, quantized_directory
        from tfmq.cli.progress import foretell, shown_progress
        from tfmq.evaluation.analysis.analyze import QUICK, THOROUGH, expected_seconds
        from tfmq.evaluation.analysis.analyze import analyze as run
        from tfmq.integrations.diffusers.quiet import quiet
        from tfmq.report.analysis import ANALYSIS_FILES, PARQUET_FILE, analysis_values, write_analysis
        from tfmq.report.directory import completed_directory
        from tfmq.report.parquet import write_parquet
        from tfmq.storage.digest import module_digest

        if parquet:
            # Ask for it now, not after minutes of work.
            require("pyarrow", extra="parquet")
        device, engine = check_devices(device, backend)
        check_reference(reference, module)
        own = check_module(module)
        execution = check_execution(backend, weights, engine)
        source = quantized_directory(directory)
        with (
            quiet(),
            completed_directory(target, owned=ANALYSIS_FILES) as folder,
            shown_progress() as progress,
        ):
            quantized = open_model(str(source), module=own, prompts=read_prompts(prompts), device=device)
            full = open_model(reference, module=own, prompts=read_prompts(prompts), device=device)
            described = provenance(quantized, directory)
            extent = THOROUGH if thorough else QUICK
            extent = replace(extent, num_images=num_images or extent.num_images)
            # Choose the backend after everything that may be refused: choosing may take a measurement.
            name = execute_model(quantized, backend, execution, rows=extent.num_images, judged=True)
            schedule: dict[str, Any] = {"steps": steps or default_steps(described)}
            foretell(expected_seconds(full, quantized, extent=extent, **schedule), "the analysis")
            found = run(full, quantized, extent=extent, seed=seed, **schedule, progress=progress)
            settings = {
                "num_images": extent.num_images,
                **schedule,
                "seed": seed,
                "thorough": thorough,
                "calls": extent.calls,
            }
            settings |= {"parts": len(found.sensitivity.parts), "of_parts": found.of_parts}
            weights_digest = module_digest(quantized.denoiser.module)
            settings |= {
                "backend": name,
                "layers_backend": computed_alone(quantized.denoiser.module, str(name)),
            }
            values = analysis_values(found, {**settings, "weights": weights_digest})
            write_analysis(folder, found, values, title=described.scheme or "quantized")
            if parquet:
                write_parquet(folder / PARQUET_FILE, values)
        result = {"output_dir": str(target), **values}
    if json:
        emit(result)
    else:
        from tfmq.cli.tables import show_analysis

        show_analysis(values, target)
