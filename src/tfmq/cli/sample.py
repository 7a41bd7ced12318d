"""`tfmq sample`."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from tfmq.cli.devices import check_devices
from tfmq.cli.options import (
    Backend,
    BatchSize,
    Cluster,
    EngineDevice,
    Json,
    Model,
    Module,
    NumImages,
    OutputDir,
    Prompts,
    Seed,
    Steps,
    Threads,
    WeightForm,
    Workers,
    check_cluster,
    check_execution,
    check_model,
    check_module,
    read_prompts,
)
from tfmq.cli.outcome import emit, verb

if TYPE_CHECKING:
    from tfmq.cluster.crew import Cluster as Place
    from tfmq.evaluation.sampling import Images
    from tfmq.models.sampler import Sampler


def sample(
    output_dir: OutputDir,
    model: Model = None,
    module: Module = None,
    num_images: NumImages = 16,
    steps: Steps = None,
    seed: Seed = 0,
    batch_size: BatchSize = 16,
    device: EngineDevice = None,
    prompts: Prompts = None,
    backend: Backend = "auto",
    weights: WeightForm = "unpacked",
    cluster: Cluster = None,
    workers: Workers = None,
    threads: Threads = 1,
    json: Json = False,
) -> None:
    """Draw images from MODEL, full-precision or quantized: PNG files, a grid, and samples.npz."""
    with verb():
        from tfmq.cli.models import default_steps, execute_model, located, open_model, provenance, ready_model
        from tfmq.cli.progress import foretell
        from tfmq.evaluation.outlay import check_memory, drawing
        from tfmq.integrations.diffusers.quiet import quiet
        from tfmq.report.directory import completed_directory
        from tfmq.report.pictures import SAMPLE_FILES, write_samples

        device, engine = check_devices(device, backend)
        check_model(model, module)
        options, place = (
            check_execution(backend, weights, engine),
            check_cluster(cluster, workers, threads, device=device),
        )
        with quiet(), completed_directory(output_dir, owned=SAMPLE_FILES) as directory:
            opening: dict[str, Any] = {
                "module": check_module(module),
                "prompts": read_prompts(prompts),
                "device": device,
            }
            sampler = open_model(model, **opening)
            name = execute_model(sampler, backend, options, rows=min(batch_size, num_images))
            steps = steps or default_steps(provenance(sampler, model))
            # Every worker uses the backend that was chosen here.
            again = partial(
                ready_model, model and located(model), backend=name or "auto", options=options, **opening
            )
            seconds = check_memory(
                [drawing(sampler, num_images, steps=steps, batch_size=batch_size)], num_images
            )
            shared = "" if place is None else " in one process, which the workers share"
            foretell(seconds, f"{num_images} images in {steps} steps{shared}")
            images = _drawn(sampler, again, place, num_images, steps=steps, seed=seed, batch_size=batch_size)
            write_samples(directory, images)
        shape = list(images.shape)
        result: dict[str, Any] = {
            "output_dir": str(output_dir),
            "num_images": num_images,
            "steps": steps,
            "seed": seed,
            "shape": shape,
        }
        result |= {"backend": name}
    if json:
        emit(result)
    else:
        print(
            f"{num_images} images of {shape[2]} x {shape[1]} pixels, {steps} "
            f"steps, in {output_dir} (all of them in grid.png)"
        )


def _drawn(
    sampler: "Sampler", again: "Callable[[], Sampler]", place: "Place | None", num_images: int, **options: Any
) -> "Images":
    """Draw images, in this process or on a cluster whose workers open the model `again`."""
    from tfmq.cli.progress import shown_progress
    from tfmq.cluster.crew import connected
    from tfmq.cluster.sampling import draw as draw_together
    from tfmq.evaluation.sampling import draw

    with shown_progress() as progress:
        if place is None:
            return draw(sampler, num_images, progress=progress, **options)
        with connected(place) as crew:
            return draw_together(crew, again, num_images, progress=progress, **options)
