"""`tfmq analyze`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from tfmq.cli.options import Backend, Device, Json, Prompts, Seed, Steps, Weights, beside, check_device, check_execution, read_prompts
from tfmq.cli.outcome import emit, verb
from tfmq.errors import require

SUFFIX = ".analysis"


def analyze(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="What tfmq quantize wrote.")],
    reference: Annotated[str, typer.Option("--reference", metavar="MODEL", help="The model that it was made from.")],
    num_images: Annotated[int, typer.Option("--num-images", min=1, help="Images whose trajectories are followed.")] = 4,
    steps: Steps = None,
    seed: Seed = 0,
    output_dir: Annotated[Path | None, typer.Option("--output-dir", metavar="OUT", help="Where the files go. Default: DIR.analysis.")] = None,
    device: Device = None,
    prompts: Prompts = None,
    backend: Backend = "auto",
    weights: Weights = "unpacked",
    parquet: Annotated[bool, typer.Option("--parquet", help="Write the values as analysis.parquet too, one a row.")] = False,
    json: Json = False,
) -> None:
    """Show where a quantized model loses: temporal features by timestep, ranges, the trajectory, sensitivity of units, errors of layers."""
    target = output_dir or beside(directory, SUFFIX)
    with verb():
        from tfmq.cli.models import default_steps, execute_model, open_model, provenance, quantized_directory
        from tfmq.cli.progress import shown_progress
        from tfmq.evaluation.analysis.analyze import analyze as run
        from tfmq.integrations.diffusers.quiet import quiet
        from tfmq.report.analysis import ANALYSIS_FILES, PARQUET_FILE, analysis_values, write_analysis
        from tfmq.report.directory import completed_directory
        from tfmq.report.parquet import write_parquet
        from tfmq.storage.digest import module_digest

        if parquet:
            # Said now, and not after minutes of work.
            require("pyarrow", extra="parquet")
        check_device(device)
        execution = check_execution(backend, weights)
        source = quantized_directory(directory)
        with quiet(), completed_directory(target, owned=ANALYSIS_FILES) as folder, shown_progress() as progress:
            quantized = open_model(str(source), prompts=read_prompts(prompts), device=device)
            name = execute_model(quantized, backend, execution)
            full = open_model(reference, prompts=read_prompts(prompts), device=device)
            settings: dict[str, Any] = {"num_images": num_images, "steps": steps or default_steps(quantized), "seed": seed}
            found = run(full, quantized, **settings, progress=progress)
            weights_digest = module_digest(quantized.denoiser.module)
            values = analysis_values(found, {**settings, "backend": name, "weights": weights_digest})
            title = provenance(quantized).scheme or "quantized"
            write_analysis(folder, found, values, title=title)
            if parquet:
                write_parquet(folder / PARQUET_FILE, values)
        result = {"output_dir": str(target), **values}
    if json:
        emit(result)
    else:
        from tfmq.cli.tables import show_analysis

        show_analysis(values, target)
