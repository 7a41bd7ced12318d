"""`tfmq sample`."""

from typing import Any

from tfmq.cli.options import (
    Backend,
    BatchSize,
    Device,
    Json,
    Model,
    NumImages,
    OutputDir,
    Prompts,
    Seed,
    Steps,
    Weights,
    check_device,
    check_execution,
    read_prompts,
)
from tfmq.cli.outcome import emit, verb


def sample(
    model: Model,
    output_dir: OutputDir,
    num_images: NumImages = 16,
    steps: Steps = None,
    seed: Seed = 0,
    batch_size: BatchSize = 16,
    device: Device = None,
    prompts: Prompts = None,
    backend: Backend = "auto",
    weights: Weights = "unpacked",
    json: Json = False,
) -> None:
    """Draw images from MODEL, full-precision or quantized: PNG files, a grid, and samples.npz."""
    with verb():
        from tfmq.cli.models import default_steps, execute_model, open_model
        from tfmq.cli.progress import shown_progress
        from tfmq.evaluation.sampling import draw
        from tfmq.integrations.diffusers.quiet import quiet
        from tfmq.report.directory import completed_directory
        from tfmq.report.pictures import SAMPLE_FILES, write_samples

        check_device(device)
        options = check_execution(backend, weights)
        with quiet(), completed_directory(output_dir, owned=SAMPLE_FILES) as directory:
            sampler = open_model(model, prompts=read_prompts(prompts), device=device)
            name = execute_model(sampler, backend, options)
            steps = steps or default_steps(sampler)
            with shown_progress() as progress:
                images = draw(sampler, num_images, steps=steps, seed=seed, batch_size=batch_size, progress=progress)
            write_samples(directory, images)
        shape = list(images.shape)
        result: dict[str, Any] = {"output_dir": str(output_dir), "num_images": num_images, "steps": steps, "seed": seed, "shape": shape}
        result |= {"backend": name}
    if json:
        emit(result)
    else:
        print(f"{num_images} images of {shape[2]} x {shape[1]} pixels, {steps} steps, in {output_dir} (all of them in grid.png)")
