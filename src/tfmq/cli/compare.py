"""`tfmq compare`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tfmq.cli.devices import check_devices
from tfmq.cli.options import (
    Backend,
    BatchSize,
    Directory,
    EngineDevice,
    Json,
    Module,
    NumImages,
    OutputDir,
    Prompts,
    Reference,
    Seed,
    Steps,
    WeightForm,
    check_execution,
    check_module,
    check_reference,
    read_prompts,
)
from tfmq.cli.outcome import emit, verb

if TYPE_CHECKING:
    from tfmq.models.sampler import Sampler
    from tfmq.storage.manifest import Provenance


def compare(
    directory: Directory,
    output_dir: OutputDir,
    reference: Reference = None,
    module: Module = None,
    num_images: NumImages = 16,
    steps: Steps = None,
    seed: Seed = 0,
    batch_size: BatchSize = 16,
    device: EngineDevice = None,
    prompts: Prompts = None,
    backend: Backend = "auto",
    weights: WeightForm = "unpacked",
    json: Json = False,
) -> None:
    """Send the same noise through a quantized model and its reference: pictures, paired metrics, temporal
    disturbance.
    """
    with verb():
        from tfmq.artifact import stored_bytes
        from tfmq.cli.models import execute_model, open_model, provenance, quantized_directory
        from tfmq.integrations.diffusers.quiet import quiet
        from tfmq.report.directory import completed_directory
        from tfmq.report.summary import COMPARISON_FILES
        from tfmq.targets import calibrated_options

        device, engine = check_devices(device, backend)
        check_reference(reference, module)
        own = check_module(module)
        execution = check_execution(backend, weights, engine)
        source = quantized_directory(directory)
        with quiet(), completed_directory(output_dir, owned=COMPARISON_FILES) as folder:
            options = {"num_images": num_images, "steps": steps, "seed": seed, "batch_size": batch_size}
            quantized = open_model(str(source), module=own, prompts=read_prompts(prompts), device=device)
            described = provenance(quantized, directory)
            full = open_model(
                reference,
                module=own,
                prompts=read_prompts(prompts),
                device=device,
                options=calibrated_options(described),
            )
            # Choose the backend after everything that may be refused: choosing may take a measurement.
            name = execute_model(quantized, backend, execution, rows=min(batch_size, num_images), judged=True)
            result = _compared(
                full, quantized, folder, described, stored_bytes(source), backend=name, **options
            )
    if json:
        emit(result)
    else:
        from tfmq.cli.tables import show_comparison

        show_comparison(result, output_dir)


def _compared(
    full: "Sampler",
    quantized: "Sampler",
    folder: Path,
    described: "Provenance",
    quantized_bytes: int,
    *,
    steps: int | None,
    backend: str | None,
    **options: Any,
) -> dict[str, Any]:
    """Compare, write the files, and return the metrics."""
    from tfmq.cli.models import default_steps
    from tfmq.cli.progress import foretell, shown_progress
    from tfmq.evaluation.comparison import compare as run
    from tfmq.evaluation.outlay import check_memory, drawing
    from tfmq.report.summary import summarize, write_comparison_files

    steps = steps or default_steps(described)
    count, batch_size = options["num_images"], options["batch_size"]
    outlays = [drawing(each, count, steps=steps, batch_size=batch_size) for each in (full, quantized)]
    foretell(check_memory(outlays, count), f"{count} images of each model in {steps} steps")
    with shown_progress() as progress:
        comparison = run(full, quantized, steps=steps, progress=progress, **options)
    metrics = summarize(
        comparison,
        scheme=described.scheme or "quantized",
        reference_bytes=4 * sum(parameter.numel() for parameter in full.denoiser.module.parameters()),
        quantized_bytes=quantized_bytes,
    )
    metrics |= {"steps": steps, "seed": options["seed"], "backend": backend}
    write_comparison_files(folder, comparison, metrics)
    return metrics
