"""`tfmq quantize`."""

import time
import warnings
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tfmq.cli.devices import check_device
from tfmq.cli.options import (
    Cluster,
    Device,
    Json,
    Model,
    Module,
    OutputDir,
    Prompts,
    Seed,
    Threads,
    Workers,
    beside,
    check_cluster,
    check_model,
    check_module,
    parse_bytes,
    parse_seconds,
    read_prompts,
)
from tfmq.cli.outcome import emit, job_hint, verb

if TYPE_CHECKING:
    from tfmq.cluster.crew import Cluster as Place
    from tfmq.models.module_file import ModuleFile
    from tfmq.recipes.recipe import Recipe
    from tfmq.reconstruction.resources import Resources

DEFAULT_SCHEME = "w4a8"


def _named(scheme: str | None, path: Path | None) -> "Recipe":
    """Return the recipe of a scheme or of a file.

    Raises:
        typer.BadParameter: both are given, or the scheme is unknown.
        ValueError: the file is no recipe.
    """
    from tfmq.recipes import scheme as recipe_of
    from tfmq.recipes.yaml import load

    if path is not None:
        if scheme is not None:
            raise typer.BadParameter("give a scheme or a recipe file, not both", param_hint="--recipe")
        return load(path)
    try:
        return recipe_of(scheme or DEFAULT_SCHEME)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--scheme") from error


def _adjusted(
    recipe: "Recipe",
    *,
    steps: int | None,
    calib_size: int | None,
    iterations: int | None,
    unit_inputs: str | None,
) -> "Recipe":
    """Return the recipe with what the command line gives.

    Raises:
        typer.BadParameter: there are no such inputs.
    """
    if unit_inputs is not None:
        try:
            recipe = replace(recipe, rounding=replace(recipe.rounding, inputs=unit_inputs))  # type: ignore[arg-type]
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--unit-inputs") from error
    calibration = replace(
        recipe.calibration,
        steps=steps or recipe.calibration.steps,
        samples=calib_size or recipe.calibration.samples,
    )
    if iterations is not None:
        rounding, learning = (
            replace(recipe.rounding, solver="adaround"),
            replace(recipe.learning, iterations=iterations),
        )
        recipe = replace(recipe, rounding=rounding, learning=learning)
    return replace(recipe, calibration=calibration)


def quantize(
    output_dir: OutputDir,
    model: Model = None,
    module: Module = None,
    scheme: Annotated[
        str | None,
        typer.Option(
            "--scheme", help=f"w4a8, w8a8, w4a32, rtn_w4a8, brecq_w8a8, ... [default: {DEFAULT_SCHEME}]"
        ),
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option("--recipe", metavar="FILE.yaml", help="A recipe file instead of a scheme.")
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option("--steps", min=1, help="Denoising steps of the calibration and of the finite set."),
    ] = None,
    calib_size: Annotated[
        int | None, typer.Option("--calib-size", min=1, help="Images drawn for the calibration.")
    ] = None,
    iterations: Annotated[
        int | None,
        typer.Option("--iterations", min=0, help="AdaRound with so many steps a unit; 0 rounds to nearest."),
    ] = None,
    seed: Seed = 0,
    device: Device = None,
    prompts: Prompts = None,
    component: Annotated[
        str | None,
        typer.Option(
            "--component",
            metavar="NAME",
            help="Which denoiser of a pipeline that calls two in turn: transformer_2.",
        ),
    ] = None,
    components: Annotated[
        str | None,
        typer.Option(
            "--components",
            metavar="NAMES",
            help="all, denoiser, or denoiser,vae,... [default: all of what draws from text]",
        ),
    ] = None,
    unit_inputs: Annotated[
        str | None,
        typer.Option(
            "--unit-inputs",
            metavar="KIND",
            help="quantized: units one after the other; full: side by side, on full-precision inputs.",
        ),
    ] = None,
    cluster: Cluster = None,
    workers: Workers = None,
    threads: Threads = 1,
    max_memory: Annotated[
        str | None,
        typer.Option(
            "--max-memory", metavar="SIZE", help="What calibration may hold beside the model: 4GiB."
        ),
    ] = None,
    time_budget: Annotated[
        str | None,
        typer.Option("--time-budget", metavar="TIME", help="What all of it may take: 10m. Units share it."),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Continue an interrupted job; the result is the same to the byte."),
    ] = False,
    json: Json = False,
) -> None:
    """Quantize MODEL and save it: a pipeline as a pipeline that diffusers opens, a module of your own as a
    checkpoint.
    """
    began = time.perf_counter()
    with verb(interrupted=job_hint(beside(str(output_dir), ".job"))):
        chosen = _adjusted(
            _named(scheme, recipe),
            steps=steps,
            calib_size=calib_size,
            iterations=iterations,
            unit_inputs=unit_inputs,
        )
        check_device(device)
        check_model(model, module)
        if model is not None and module is not None:
            raise typer.BadParameter("give MODEL or --module, not both", param_hint="--module")
        place = check_cluster(cluster, workers, threads, device=device)
        if place is not None and chosen.rounding.inputs != "full":
            warnings.warn(
                (
                    "units wait for each other, so the cluster shares the trajectory "
                    "alone; --unit-inputs full shares them too"
                ),
                stacklevel=2,
            )
        limits, read = _limits(max_memory, time_budget), read_prompts(prompts)
        options: dict[str, Any] = {
            "seed": seed,
            "device": device,
            "prompts": read,
            "component": component,
            "components": components,
        }
        report = _quantized(
            check_module(module) or str(model), chosen, output_dir, place, limits, resume=resume, **options
        )
        name = chosen.name if recipe else scheme or DEFAULT_SCHEME
        taken = {
            "seconds": round(time.perf_counter() - began, 3),
            "time_budget": limits.time_budget,
            "memory": _memory(limits),
        }
        result = {"output_dir": str(output_dir), "scheme": name, **taken, **report}
    if json:
        emit(result)
    else:
        from tfmq.cli.tables import show_quantized

        show_quantized(result)


def _limits(max_memory: str | None, time_budget: str | None) -> "Resources":
    from tfmq.reconstruction.resources import Resources

    return Resources(
        max_memory=None if max_memory is None else parse_bytes(max_memory, "--max-memory"),
        time_budget=None if time_budget is None else parse_seconds(time_budget, "--time-budget"),
    )


def _memory(limits: "Resources") -> dict[str, int | None]:
    """Return the most that this process has held, on the GPU too where one was used, and the limit that was
    set.
    """
    import torch

    from tfmq.evaluation.cost.system import peak_bytes

    used = torch.cuda.is_available() and torch.cuda.is_initialized()
    return {
        "peak_bytes": peak_bytes(),
        "peak_gpu_bytes": torch.cuda.max_memory_allocated() if used else None,
        "limit_bytes": limits.max_memory,
    }


def _quantized(
    model: "str | ModuleFile",
    recipe: "Recipe",
    output_dir: Path,
    place: "Place | None",
    resources: "Resources",
    *,
    resume: bool,
    **options: Any,
) -> dict[str, Any]:
    """Run the job, with help where there is a `place`; return its report, with the bytes that are on disk."""
    import tfmq
    from tfmq.artifact import stored_bytes
    from tfmq.cli.models import located
    from tfmq.cli.progress import foretell, shown_progress
    from tfmq.cluster.crew import connected
    from tfmq.cluster.quantization import Order, WorkerHelpers
    from tfmq.integrations.diffusers.quiet import quiet

    with quiet(), shown_progress() as progress, ExitStack() as stack:
        crew = None if place is None else stack.enter_context(connected(place))
        # A worker opens what it is given by itself.
        target = located(model) if isinstance(model, str) else model
        order = Order(target=target, recipe=recipe, output_dir=output_dir, resources=resources, **options)
        helpers = None if crew is None else WorkerHelpers(crew, order)
        given: dict[str, Any] = {
            "helpers": helpers,
            "resources": resources,
            "foretold": foretell,
            "progress": progress,
        }
        found = tfmq.quantize(model, recipe, output_dir=output_dir, resume=resume, **given, **options)
    report, keys = found.report, ("units", "temporal", "sha256")
    size = {**report["bytes"], "quantized": stored_bytes(output_dir / (options["component"] or ""))}
    # A job that an earlier release finished does not say what stays in floating point.
    return {
        "bytes": size,
        "floating": report.get("floating"),
        "pooled": report.get("pooled"),
        "judged": report.get("judged"),
        "tuning": report.get("tuning"),
        "correction": report.get("correction"),
        "components": report.get("components", {}),
        **{key: report[key] for key in keys},
    }
