"""Quantize from Python: any target, one recipe, a resumable job, a saved pipeline."""

import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tfmq.artifact import (
    REPORT_FILE,
    load,
    mark,
    save,
    stored_architecture,
    stored_manifest,
    stored_state,
)
from tfmq.calibration.store import CalibrationStore
from tfmq.components import Components, Networks
from tfmq.jobs.job import Foretold, Helpers, Job
from tfmq.jobs.report import denoiser_report, measured_inputs, network_report
from tfmq.jobs.workflow import Outcome, quantize_denoiser, quantize_networks
from tfmq.nn.size import state_bytes
from tfmq.nn.structure import describe
from tfmq.progress import Progress, silent
from tfmq.recipes import scheme
from tfmq.recipes.recipe import Recipe
from tfmq.recipes.yaml import to_dict
from tfmq.reconstruction.resources import UNLIMITED, Resources
from tfmq.storage.atomic import read_json
from tfmq.storage.checkpoint import prepare_output, seal
from tfmq.storage.errors import JobMismatchError
from tfmq.storage.fields import Fields
from tfmq.storage.journal import Journal
from tfmq.storage.listing import FILES
from tfmq.storage.prompts import PROMPTS_FILE, prompts_content
from tfmq.targets import fingerprint_of, open_target, owner_of
from tfmq.version import __version__


@dataclass(frozen=True)
class Quantized:
    """A quantized model: what was passed in (quantized in place), its sealed manifest, and the report of the
    run.
    """

    model: Any
    manifest: Mapping[str, Any]
    report: Mapping[str, Any]


def _provenance(outcome: Outcome) -> dict[str, Any]:
    """Return what decided on a quantized network, and what was measured of its inputs."""
    inputs = {"inputs": measured_inputs(outcome)} if outcome.inputs else {}
    return {"recipe": to_dict(outcome.recipe), **inputs}


def _manifest(module: nn.Module, seed: int, origin: Mapping[str, Any]) -> dict[str, Any]:
    provenance = {"seed": seed, "tfmq": __version__, "torch": torch.__version__, **origin}
    fields = {"quant_method": "tfmq", "structure": describe(module), "provenance": provenance}
    if architecture := stored_architecture(module):
        fields["architecture"] = architecture
    return seal(stored_state(module), fields, table=False)


def _finish_components(
    owner: Any, networks: Networks, done: Mapping[str, Outcome | str], seed: int, sizes: Mapping[str, int]
) -> dict[str, Any]:
    """Mark the components of a pipeline of which networks have been quantized; return a report of each, or
    why it is left.
    """
    reports: dict[str, Any] = {name: {"left": reason} for name, reason in networks.left.items()}
    for name, part in networks.components.items():
        found = {network: done[network] for network in part}
        quantized = {key: value for key, value in found.items() if isinstance(value, Outcome)}
        reports[name] = {
            "networks": {
                network: network_report(value) if isinstance(value, Outcome) else {"left": value}
                for network, value in found.items()
            }
        }
        if quantized:
            origin = {network: _provenance(outcome) for network, outcome in quantized.items()}
            component: nn.Module = owner.components[name]
            manifest = _manifest(component, seed, {"networks": origin})
            mark(component, manifest)
            size = {"fp32": sizes[name], "quantized": state_bytes(component)}
            reports[name] |= {"bytes": size, "sha256": manifest["digest"]}
    return {"components": reports} if reports else {}


def _prompts(sampler: Any) -> dict[str, Any]:
    """Return the file of prompts to save for a sampler that draws from text: it goes on with them."""
    takes = getattr(sampler, "takes_prompts", False)
    return {PROMPTS_FILE: prompts_content(sampler.prompts, sampler.options)} if takes else {}


def _timeless(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return a report without times, so that equal jobs write equal bytes."""
    units = [{key: value for key, value in unit.items() if key != "seconds"} for unit in report["units"]]
    return {**report, "units": units}


def _read_report(destination: Path) -> dict[str, Any]:
    """Return the report of a job that was finished before; its units take no time now."""
    report = read_json(destination / REPORT_FILE)
    units = [{**unit, "seconds": 0.0} for unit in report["units"]]
    return {key: value for key, value in report.items() if key not in ("fingerprint", FILES)} | {
        "units": units
    }


def _finished(destination: Path, fingerprint: Mapping[str, Any], *, resume: bool) -> bool:
    """Whether the job is done already; refuse a directory that holds anything else."""
    report = destination / REPORT_FILE
    if not resume or not report.exists():
        prepare_output(destination, overwrite=False)
        return False
    before = Fields.of(read_json(report), str(report)).part("fingerprint").values
    if before != fingerprint:
        changed = ", ".join(
            key
            for key in sorted(before.keys() | fingerprint.keys())
            if before.get(key) != fingerprint.get(key)
        )
        raise JobMismatchError(
            f"{destination} holds a finished model with another {changed}; choose another output directory"
        )
    return True


def job_of(destination: Path) -> Path:
    """Return where the job lives until `destination` is complete."""
    return destination.with_name(destination.name + ".job")


def store_of(job: Path) -> CalibrationStore:
    """Return the calibration store of a job."""
    return CalibrationStore(job / "calibration")


@contextmanager
def _job_directory(destination: Path | None) -> Iterator[Path]:
    """Give the job a directory beside its destination, which outlives an interruption; a temporary one where
    nothing is saved.
    """
    if destination is not None:
        yield job_of(destination)
        return
    path = Path(tempfile.mkdtemp(prefix="tfmq-"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def quantize(
    target: Any,
    recipe: Recipe | str = "w4a8",
    *,
    output_dir: str | Path | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    resume: bool = False,
    prompts: tuple[str, ...] = (),
    component: str | None = None,
    components: Components | None = None,
    resources: Resources = UNLIMITED,
    helpers: Helpers | None = None,
    foretold: Foretold | None = None,
    progress: Progress = silent,
) -> Quantized:
    """Quantize a diffusion model in place and, with `output_dir`, save it.

    The model in memory computes in simulated arithmetic, the one that it was calibrated in; `tfmq.execute`
    makes it compute in integers.

    Args:
        target: a diffusers pipeline, a pipeline directory, a hub id, "default", a `Sampler` (a denoiser with
            a loop around it), or a `ModuleFile` that gives one.
        recipe: a `Recipe`, or the name of a scheme such as "w4a8".
        output_dir: where the quantized pipeline goes. It appears when it is complete; until then the job
            lives in `output_dir` + ".job".
        seed: seed of the calibration noise and of every learning stage.
        device: moves the model there first.
        resume: continue the job of an interrupted run; the result is the same to the byte.
        prompts: prompts of the calibration for text-to-image pipelines, in the place of the built-in ones.
        component: which denoiser of a pipeline that calls two in turn, such as "transformer_2"; without it
            `unet`, `transformer` or what else there is, with a warning that names the others. They are
            quantized one after the other.
        components: "all", "denoiser", or names of what is quantized, such as ("denoiser", "vae"): halves of
            autoencoders, and encoders of text. By default all of a pipeline that draws from text, of
            others the denoiser. What cannot be quantized stays in floating point, and the report says why.
        resources: limits of memory and of time.
        helpers: do parts of the job elsewhere; see `tfmq.cluster`. They keep no budget of time.
        foretold: is told about how many seconds calibration takes, and later the units, before they begin.
        progress: shows bars; see `tfmq.progress`.

    Raises:
        ValueError: an unknown scheme, a model that cannot be quantized, or one that cannot within `resources`
            or on this disk.
        CheckpointError: `output_dir` is taken or full, or the job in it is another one.
        CalibrationError: NaN or infinite values in calibration.
    """
    began = time.perf_counter()
    recipe = scheme(recipe) if isinstance(recipe, str) else recipe
    if helpers is not None and resources.time_budget is not None:
        raise ValueError(
            "a budget of time is kept by one process alone: leave out the "
            "cluster (--cluster) or the budget (--time-budget)"
        )
    sampler, networks = open_target(
        target, recipe, device=device, prompts=prompts, component=component, components=components
    )
    fingerprint = fingerprint_of(sampler, recipe, seed, resources, networks)
    module, owner = sampler.denoiser.module, owner_of(sampler)
    destination = Path(os.path.abspath(output_dir)) if output_dir is not None else None
    if destination is not None and _finished(destination, fingerprint, resume=resume):
        shutil.rmtree(job_of(destination), ignore_errors=True)
        loaded = load(
            destination, module=None if hasattr(sampler, "pipeline") else module, backend="simulated"
        )
        return Quantized(loaded, stored_manifest(destination).values, _read_report(destination))
    parameters = sum(parameter.numel() for parameter in module.parameters())
    sizes = {name: state_bytes(owner.components[name]) for name in networks.components}
    with _job_directory(destination) as job:
        journal = Journal(job, fingerprint, resume=resume)
        journal.sweep()
        work = Job(
            sampler=sampler,
            recipe=recipe,
            store=store_of(job),
            journal=journal,
            seed=seed,
            resources=resources,
            helpers=helpers,
            foretold=foretold,
            progress=progress,
            networks=networks.all,
            began=began,
        )
        outcome = quantize_denoiser(work)
        manifest = _manifest(module, seed, _provenance(outcome))
        report = denoiser_report(outcome, manifest, parameters, state_bytes(module))
        mark(module, manifest)
        report |= _finish_components(owner, networks, quantize_networks(work), seed, sizes)
        if destination is not None:
            save(
                owner,
                destination,
                manifest=manifest,
                extra={REPORT_FILE: {**_timeless(report), "fingerprint": fingerprint}, **_prompts(sampler)},
            )
            journal.remove()
    return Quantized(owner, manifest, report)
