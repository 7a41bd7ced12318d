"""`tfmq quantize`."""

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tfmq.cli.options import Device, Json, Model, OutputDir, Prompts, Seed, check_device, read_prompts
from tfmq.cli.outcome import emit, verb

if TYPE_CHECKING:
    from tfmq.recipes.recipe import Recipe

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


def _adjusted(recipe: "Recipe", *, steps: int | None, calib_size: int | None, iterations: int | None) -> "Recipe":
    """Return the recipe with the numbers that the command line gives."""
    calibration = replace(recipe.calibration, steps=steps or recipe.calibration.steps, samples=calib_size or recipe.calibration.samples)
    if iterations is not None:
        rounding, learning = replace(recipe.rounding, solver="adaround"), replace(recipe.learning, iterations=iterations)
        recipe = replace(recipe, rounding=rounding, learning=learning)
    return replace(recipe, calibration=calibration)


def quantize(
    model: Model,
    output_dir: OutputDir,
    scheme: Annotated[str | None, typer.Option("--scheme", help=f"w4a8, w8a8, w4a32, rtn_w4a8, brecq_w8a8, ... [default: {DEFAULT_SCHEME}]")] = None,
    recipe: Annotated[Path | None, typer.Option("--recipe", metavar="FILE.yaml", help="A recipe file instead of a scheme.")] = None,
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="Denoising steps of the calibration and of the finite set.")] = None,
    calib_size: Annotated[int | None, typer.Option("--calib-size", min=1, help="Images drawn for the calibration.")] = None,
    iterations: Annotated[int | None, typer.Option("--iterations", min=0, help="AdaRound with so many steps a unit; 0 rounds to nearest.")] = None,
    seed: Seed = 0,
    device: Device = None,
    prompts: Prompts = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted job; the result is the same to the byte.")] = False,
    json: Json = False,
) -> None:
    """Quantize MODEL and save it as a packed diffusers pipeline."""
    began = time.perf_counter()
    hint = f"the same command with --resume continues from {output_dir}.job"
    with verb(interrupted=hint):
        chosen = _adjusted(_named(scheme, recipe), steps=steps, calib_size=calib_size, iterations=iterations)
        check_device(device)
        report = _quantized(model, chosen, output_dir, seed=seed, device=device, prompts=read_prompts(prompts), resume=resume)
        name = chosen.name if recipe else scheme or DEFAULT_SCHEME
        result = {"output_dir": str(output_dir), "scheme": name, "seconds": round(time.perf_counter() - began, 3), **report}
    if json:
        emit(result)
    else:
        from tfmq.cli.tables import show_quantized

        show_quantized(result)


def _quantized(model: str, recipe: "Recipe", output_dir: Path, **options: Any) -> dict[str, Any]:
    """Run the job; return its report, with the bytes that are on disk."""
    import tfmq
    from tfmq.artifact import stored_bytes
    from tfmq.cli.progress import shown_progress
    from tfmq.integrations.diffusers.quiet import quiet

    with quiet(), shown_progress() as progress:
        report = tfmq.quantize(model, recipe, output_dir=output_dir, progress=progress, **options).report
    keys = ("units", "temporal", "sha256")
    return {"bytes": {**report["bytes"], "quantized": stored_bytes(output_dir)}, **{key: report[key] for key in keys}}
