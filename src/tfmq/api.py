"""Quantize from Python: any target, one recipe, a resumable job, a saved pipeline."""

import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tfmq.artifact import check_quantizable, is_quantized, load, mark, remark, save, stored_manifest
from tfmq.backends.backend import release
from tfmq.calibration.drift import LayerDrift, complaint
from tfmq.calibration.store import CalibrationStore
from tfmq.calibration.trajectory import CalibrationError
from tfmq.errors import require
from tfmq.models.sampler import Sampler
from tfmq.nn.structure import describe
from tfmq.nn.swap import STEPS
from tfmq.progress import Progress, silent
from tfmq.recipes import scheme
from tfmq.recipes.recipe import Recipe, call_options
from tfmq.recipes.yaml import to_dict
from tfmq.reconstruction.resources import UNLIMITED, Resources
from tfmq.stages import Helpers
from tfmq.storage.atomic import read_json
from tfmq.storage.checkpoint import prepare_output, seal
from tfmq.storage.digest import tensor_digest
from tfmq.storage.errors import JobMismatchError
from tfmq.storage.journal import Journal
from tfmq.temporal.block import TemporalBlock
from tfmq.temporal.rebake import rebake_tables, visited
from tfmq.version import __version__
from tfmq.workflow import Outcome, quantize_denoiser

DEFAULT = "default"
ASSETS = Path(__file__).parent / "assets"
REPORT_FILE = "tfmq_report.json"


@dataclass(frozen=True)
class Quantized:
    """A quantized model: what was passed in (quantized in place), its sealed manifest, and the report of the run."""

    model: Any
    manifest: Mapping[str, Any]
    report: Mapping[str, Any]


def open_sampler(target: Any, *, prompts: tuple[str, ...] = (), options: Mapping[str, Any] | None = None) -> Sampler:
    """Return the sampler of `target`: one itself, a pipeline, a pipeline directory, a hub id, or "default", the embedded model.

    `options` go to the pipeline's call; by default those that a quantized model was calibrated with. A quantized model that is loaded here
    computes in simulated arithmetic; `tfmq.execute` changes that once it is on its device.

    Raises:
        ValueError: nothing that can be sampled from.
    """
    if hasattr(target, "run") and hasattr(target, "denoiser"):
        if options:
            warnings.warn(f"{', '.join(options)} of the recipe have no effect: the sampler brings its own options", stacklevel=3)
        return target
    require("diffusers", extra="diffusers")
    from tfmq.integrations.diffusers.pipelines import DEFAULT_PROMPTS, PipelineSampler, accepted_options, open_pipeline

    if isinstance(target, str | Path):
        path = ASSETS / DEFAULT if str(target) == DEFAULT else Path(target)
        if options is None and is_quantized(path):
            options = calibrated_options(stored_manifest(path))
        target = load(path, backend="simulated") if is_quantized(path) else open_pipeline(path if path.exists() else target)
    if not hasattr(target, "components"):
        raise ValueError(f"{type(target).__name__} is no pipeline; put a sampler around a denoiser that stands alone, such as tfmq.LoopSampler")
    sampler = PipelineSampler(target, prompts=prompts or DEFAULT_PROMPTS, options=accepted_options(target, options or {}))
    if prompts and not sampler.takes_prompts:
        warnings.warn(f"prompts have no effect: {type(target).__name__} does not draw from text", stacklevel=2)
    return sampler


def calibrated_options(manifest: Mapping[str, Any]) -> dict[str, float]:
    """Return the arguments of the pipeline's call that a quantized model was calibrated with."""
    return call_options(manifest.get("provenance", {}).get("recipe", {}).get("calibration", {}))


def _inputs(outcome: Outcome) -> list[dict[str, Any]]:
    """Return what was measured of static and dynamic input grids, and which each layer kept."""
    return [{"name": name, **asdict(errors), "kept": errors.kept} for name, errors in outcome.inputs.items()]


def _manifest(module: nn.Module, recipe: Recipe, seed: int, outcome: Outcome) -> dict[str, Any]:
    provenance = {"recipe": to_dict(recipe), "seed": seed, "tfmq": __version__, "torch": torch.__version__}
    if outcome.inputs:
        provenance["inputs"] = _inputs(outcome)
    fields = {"quant_method": "tfmq", "structure": describe(module), "provenance": provenance}
    return seal(module.state_dict(), fields, table=False)


def _report(outcome: Outcome, recipe: Recipe, manifest: Mapping[str, Any], parameters: int, quantized_bytes: int) -> dict[str, Any]:
    disturbed = outcome.disturbance
    return {
        "scheme": recipe.name,
        "bytes": {"fp32": 4 * parameters, "quantized": quantized_bytes},
        "units": [{**asdict(unit), "seconds": round(unit.seconds, 3)} for unit in outcome.units],
        "temporal": {
            "max_relative_error": disturbed.max_relative_error,
            "mean_relative_error": disturbed.mean_relative_error,
            "mismatches": disturbed.mismatches,
        },
        "inputs": _inputs(outcome),
        "sha256": manifest["digest"],
    }


def _timeless(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return a report without times, so that equal jobs write equal bytes."""
    units = [{key: value for key, value in unit.items() if key != "seconds"} for unit in report["units"]]
    return {**report, "units": units}


def _read_report(destination: Path) -> dict[str, Any]:
    """Return the report of a job that was finished before; its units take no time now."""
    report = read_json(destination / REPORT_FILE)
    units = [{**unit, "seconds": 0.0} for unit in report["units"]]
    return {key: value for key, value in report.items() if key != "fingerprint"} | {"units": units}


def state_bytes(module: nn.Module) -> int:
    """Return the bytes of a module's state dict."""
    return sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values())


def _fingerprint(sampler: Sampler, recipe: Recipe, seed: int, resources: Resources) -> dict[str, Any]:
    """Return everything that the result depends on; with a budget of time it also depends on the shares that the journal keeps."""
    module = sampler.denoiser.module
    device = next((parameter.device.type for parameter in module.parameters()), "cpu")
    versions = {"tfmq": __version__, "torch": torch.__version__}
    model = {"model": tensor_digest(module.state_dict()), "sampler": sampler.describe(), "device": device}
    budget = {} if resources.time_budget is None else {"time_budget": resources.time_budget}
    return {"recipe": to_dict(recipe), "seed": seed, **budget, **model, **versions}


def _finished(destination: Path, fingerprint: Mapping[str, Any], *, resume: bool) -> bool:
    """Whether the job is done already; refuse a directory that holds anything else."""
    report = destination / REPORT_FILE
    if not resume or not report.exists():
        prepare_output(destination, overwrite=False)
        return False
    before = read_json(report)["fingerprint"]
    if before != fingerprint:
        changed = ", ".join(key for key in sorted(before.keys() | fingerprint.keys()) if before.get(key) != fingerprint.get(key))
        raise JobMismatchError(f"{destination} holds a finished model with another {changed}; choose another output directory")
    return True


def _check_weights(module: nn.Module) -> None:
    """Raise `CalibrationError` where a weight is NaN or infinite."""
    for name, tensor in module.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise CalibrationError(f"{name} holds NaN or infinite values: the full-precision model is damaged; download or save it again")


def job_of(destination: Path) -> Path:
    """Return where the job lives until `destination` is complete."""
    return destination.with_name(destination.name + ".job")


def store_of(job: Path) -> CalibrationStore:
    """Return the calibration store of a job."""
    return CalibrationStore(job / "calibration")


@contextmanager
def _job_directory(destination: Path | None) -> Iterator[Path]:
    """Give the job a directory beside its destination, which outlives an interruption; a temporary one where nothing is saved."""
    if destination is not None:
        yield job_of(destination)
        return
    path = Path(tempfile.mkdtemp(prefix="tfmq-"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def open_target(
    target: Any,
    recipe: Recipe,
    *,
    seed: int,
    device: str | torch.device | None = None,
    prompts: tuple[str, ...] = (),
    resources: Resources = UNLIMITED,
) -> tuple[Sampler, dict[str, Any]]:
    """Return the sampler of a model that is to be quantized, on its device, and everything that the result depends on.

    Raises:
        ValueError: it is quantized already, or cannot be.
        CalibrationError: NaN or infinite weights.
    """
    sampler = open_sampler(target, prompts=prompts, options=call_options(asdict(recipe.calibration)))
    module = sampler.denoiser.module
    if hasattr(module, STEPS):
        raise ValueError("the model is quantized already; quantize the full-precision one")
    check_quantizable(module)
    _check_weights(module)
    if device is not None:
        _owner(sampler).to(device)
    return sampler, _fingerprint(sampler, recipe, seed, resources)


def _owner(sampler: Sampler) -> Any:
    """Return what is moved and saved: the pipeline, where there is one."""
    return getattr(sampler, "pipeline", sampler.denoiser.module)


def quantize(
    target: Any,
    recipe: Recipe | str = "w4a8",
    *,
    output_dir: str | Path | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    resume: bool = False,
    prompts: tuple[str, ...] = (),
    resources: Resources = UNLIMITED,
    helpers: Helpers | None = None,
    progress: Progress = silent,
) -> Quantized:
    """Quantize a diffusion model in place and, with `output_dir`, save it.

    The model in memory computes in simulated arithmetic, the one that it was calibrated in; `tfmq.execute` makes it compute in integers.

    Args:
        target: a diffusers pipeline, a pipeline directory, a hub id, "default", or any `Sampler` (a denoiser with a loop around it).
        recipe: a `Recipe`, or the name of a scheme such as "w4a8".
        output_dir: where the quantized pipeline goes. It appears when it is complete; until then the job lives in `output_dir` + ".job".
        seed: of calibration noise and of every learning stage.
        device: moves the model there first.
        resume: continue the job of an interrupted run; the result is the same to the byte.
        prompts: for text-to-image pipelines, instead of the built-in ones.
        resources: limits of memory and of time.
        helpers: do parts of the job elsewhere; see `tfmq.cluster`. They keep no budget of time.
        progress: shows bars; see `tfmq.progress`.

    Raises:
        ValueError: an unknown scheme, a model that cannot be quantized, or one that cannot within `resources`.
        CheckpointError: `output_dir` is taken or full, or the job in it is another one.
        CalibrationError: NaN or infinite values in calibration.
    """
    began = time.perf_counter()
    recipe = scheme(recipe) if isinstance(recipe, str) else recipe
    if helpers is not None and resources.time_budget is not None:
        raise ValueError("a budget of time is kept by one process alone: leave out the cluster (--cluster) or the budget (--time-budget)")
    sampler, fingerprint = open_target(target, recipe, seed=seed, device=device, prompts=prompts, resources=resources)
    module, owner = sampler.denoiser.module, _owner(sampler)
    destination = Path(os.path.abspath(output_dir)) if output_dir is not None else None
    if destination is not None and _finished(destination, fingerprint, resume=resume):
        shutil.rmtree(job_of(destination), ignore_errors=True)
        loaded = load(destination, module=None if hasattr(sampler, "pipeline") else module, backend="simulated")
        return Quantized(loaded, stored_manifest(destination), _read_report(destination))
    parameters = sum(parameter.numel() for parameter in module.parameters())
    with _job_directory(destination) as job:
        journal = Journal(job, fingerprint, resume=resume)
        limits = {"helpers": helpers, "resources": resources, "began": began}
        outcome = quantize_denoiser(sampler, recipe, seed=seed, store=store_of(job), journal=journal, progress=progress, **limits)  # type: ignore[arg-type]
        manifest = _manifest(module, recipe, seed, outcome)
        report = _report(outcome, recipe, manifest, parameters, state_bytes(module))
        mark(module, manifest)
        if destination is not None:
            save(owner, destination, manifest=manifest, extra={REPORT_FILE: {**_timeless(report), "fingerprint": fingerprint}})
            journal.remove()
    return Quantized(owner, manifest, report)


def _pair(target: Any, reference: Any, *, verb: str) -> tuple[Sampler, Sampler]:
    """Return samplers of a quantized model, which computes in simulated arithmetic from now on, and of its full-precision reference."""
    sampler, full = open_sampler(target), open_sampler(reference)
    if not hasattr(sampler.denoiser.module, STEPS) or hasattr(full.denoiser.module, STEPS):
        raise ValueError(f"{verb} takes a quantized model and the full-precision model that it was made from")
    release(sampler.denoiser.module)
    return sampler, full


def rebake(target: Any, reference: Any, *, steps: int) -> None:
    """Move a quantized model, in place, to the schedule that its sampler now steps through: another scheduler, another number of steps.

    One image is drawn to see the timesteps. Temporal features are tabulated anew from the full-precision reference; the grids of all other
    activations follow the nearest calibrated timestep, so a schedule far from the calibrated one is better quantized again. Save the pipeline
    afterwards as any other. Call `tfmq.execute` again where a backend was chosen.

    Args:
        target: a quantized pipeline with the scheduler to move to, or a `Sampler` of a quantized model.
        reference: the full-precision model that it was made from, as `quantize` takes it.
        steps: denoising steps to sample with from now on.

    Raises:
        ValueError: the target is not quantized, or the reference is another model.
    """
    sampler, full = _pair(target, reference, verb="rebake")
    module = sampler.denoiser.module
    rebake_tables(module, TemporalBlock(full.denoiser, full.example()), visited(sampler, steps))
    remark(module, rebaked={"steps": steps})


def fuse_lora(target: Any, reference: Any, *, scale: float = 1.0, steps: int | None = None) -> tuple[LayerDrift, ...]:
    """Fuse the LoRA that a full-precision model carries into the quantized model that was made from it, without calibrating again.

    The layers that it changes are rounded to nearest; activation ranges stay, so this measures how far the LoRA leaves them and warns where it
    does. Both models are changed in place, and the full-precision one ends with the LoRA fused. Call `tfmq.execute` again afterwards.

    Args:
        target: a quantized pipeline, or a `Sampler` of a quantized model.
        reference: the full-precision model that it was made from, with the LoRA loaded (`pipeline.load_lora_weights`) and not fused.
        scale: of the LoRA.
        steps: of the two images that ranges are measured on; by default one for each calibrated timestep.

    Returns:
        The layers whose inputs leave their range, the furthest first.

    Raises:
        ValueError: the target is not quantized, or the reference carries no LoRA or is another model.
    """
    from tfmq.integrations.diffusers.adapters import fuse_adapters

    sampler, full = _pair(target, reference, verb="fuse_lora")
    module = sampler.denoiser.module
    found = fuse_adapters(module, full, steps=steps or len(getattr(module, STEPS).timesteps), scale=scale)
    remark(module, lora={"scale": scale, "drift": [asdict(entry) for entry in found]})
    if text := complaint(found):
        warnings.warn(f"the LoRA {text}; for full quality quantize the fused pipeline again", stacklevel=2)
    return found
