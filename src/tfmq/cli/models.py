"""Open what a verb is given."""

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tfmq.backends.backend import Options
    from tfmq.models.sampler import Sampler
    from tfmq.recipes.recipe import Published
    from tfmq.storage.manifest import Provenance

STEPS = 50


def open_model(model: str, *, prompts: tuple[str, ...] = (), device: str | None = None, options: Mapping[str, Any] | None = None) -> "Sampler":
    """Return the sampler of MODEL on `device`; `options` as in `tfmq.targets.open_sampler`.

    Raises:
        ValueError: there is no such model, or it cannot be sampled from.
        CheckpointError: it is damaged.
    """
    from tfmq.targets import open_sampler

    sampler = open_sampler(model, prompts=prompts, options=options)
    if device is not None:
        sampler.pipeline.to(device)  # type: ignore[attr-defined]
    return sampler


def execute_model(sampler: "Sampler", backend: str, options: "Options") -> str | None:
    """Make a quantized denoiser compute by `backend`, on the device it is on; return the backend's name, None for a full-precision model.

    Raises:
        ValueError: a backend for a full-precision model, or the machine lacks what it needs.
        MissingExtraError: its library is not installed.
    """
    from tfmq.backends.backend import Options
    from tfmq.backends.execution import AUTO, choose, execute
    from tfmq.nn.swap import STEPS

    module = sampler.denoiser.module
    if not hasattr(module, STEPS):
        if backend != AUTO:
            raise ValueError(f"the model is not quantized, so the backend {backend} cannot run it; quantize it first, or leave out --backend")
        if options != Options():
            warnings.warn("--weights has no effect: the model is not quantized", stacklevel=2)
        return None
    name = choose(backend, module)
    # All of a pipeline that calls two quantized denoisers in turn.
    execute(getattr(sampler, "pipeline", module), name, options=options)
    return name


def ready_model(
    model: str,
    *,
    prompts: tuple[str, ...] = (),
    device: str | None = None,
    backend: str = "auto",
    options: "Options | None" = None,
) -> "Sampler":
    """Return the sampler of MODEL, on its device and with its backend; a worker process can call it too."""
    from tfmq.backends.backend import Options
    from tfmq.integrations.diffusers.quiet import quiet

    with quiet():
        sampler = open_model(model, prompts=prompts, device=device)
        execute_model(sampler, backend, options or Options())
    return sampler


def ready_models(
    quantized: str, reference: str | None, *, prompts: tuple[str, ...], device: str | None, backend: str, options: "Options"
) -> "tuple[Sampler, Sampler | None]":
    """Return the samplers of a quantized model and of its original."""
    low = ready_model(quantized, prompts=prompts, device=device, backend=backend, options=options)
    return low, None if reference is None else ready_model(reference, prompts=prompts, device=device)


def located(model: str) -> str:
    """Return MODEL such that a process with another working directory finds it."""
    return os.path.abspath(model) if os.path.exists(model) else model


def provenance(sampler: "Sampler") -> "Provenance":
    """Return where a quantized model comes from; nothing is known of any other."""
    from tfmq.integrations.diffusers.architecture import manifest_of
    from tfmq.storage.manifest import Manifest, Provenance

    values = manifest_of(sampler.denoiser.module)
    return Provenance() if values is None else Manifest.from_json(values, source="the manifest of the model").provenance


def default_steps(sampler: "Sampler") -> int:
    """Return the number of steps that a quantized model was moved to or calibrated on, else 50."""
    return provenance(sampler).steps or STEPS


def published_figures(sampler: "Sampler") -> "tuple[Published, ...]":
    """Return the published full-precision figures that a quantized model's recipe has."""
    from tfmq.recipes.recipe import Published

    return tuple(Published(**figure) for figure in provenance(sampler).published)


def quantized_directory(path: str) -> Path:
    """Return `path` where it is a directory with a quantized pipeline.

    Raises:
        MissingFileError, ForeignFileError: it is not.
    """
    from tfmq.artifact import stored_manifest
    from tfmq.storage.errors import MissingFileError

    directory = Path(path)
    if not directory.is_dir():
        raise MissingFileError(f"{directory} is not a directory; pass what tfmq quantize wrote")
    stored_manifest(directory)
    return directory
