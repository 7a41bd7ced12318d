"""Open what a verb is given."""

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tfmq.backends.backend import Options
    from tfmq.models.module_file import ModuleFile
    from tfmq.models.sampler import Sampler
    from tfmq.recipes.published import Published
    from tfmq.storage.manifest import Provenance

# Denoising steps that a model is sampled with where neither the user nor its manifest says how many.
STEPS = 50


def open_model(
    model: str | None,
    *,
    module: "ModuleFile | None" = None,
    prompts: tuple[str, ...] = (),
    device: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> "Sampler":
    """Return the sampler of MODEL on `device`; `options` as in `tfmq.targets.open_sampler`.

    With `module` MODEL is what was quantized of that, and without a MODEL it is meant itself.

    Raises:
        ValueError: there is no such model, or it cannot be sampled from.
        CheckpointError: it is damaged.
    """
    from tfmq.targets import open_quantized, open_sampler, owner_of

    if module is not None and model is not None:
        sampler = open_quantized(quantized_directory(model), module)
    else:
        sampler = open_sampler(module or model, prompts=prompts, options=None if module else options)
    if device is not None:
        owner_of(sampler).to(device)
    return sampler


def execute_model(
    sampler: "Sampler", backend: str, options: "Options", *, rows: int = 1, judged: bool = False
) -> str | None:
    """Make a quantized denoiser compute by `backend`, on the device it is on; return the backend's name, None
    for a full-precision model.

    "auto" is measured with `rows` images at once. With `judged` it is one of the backends that compute the
    quantized model: `float` does not.

    Raises:
        ValueError: a backend for a full-precision model, or the machine lacks what it needs.
        MissingExtraError: its library is not installed.
    """
    from tfmq.backends.auto import decide
    from tfmq.backends.backend import Options
    from tfmq.backends.execution import AUTO, execute
    from tfmq.nn.swap import is_quantized

    module = sampler.denoiser.module
    if not is_quantized(module):
        if backend != AUTO:
            raise ValueError(
                f"the model is not quantized, so the backend {backend} cannot "
                "run it; quantize it first, or leave out --backend"
            )
        if options != Options():
            warnings.warn("--weights has no effect: the model is not quantized", stacklevel=2)
        return None
    # Choose one backend for the whole run, whatever the size of its last batch.
    name = (
        backend
        if backend != AUTO
        else decide(sampler.denoiser, sampler.example().resized(rows), options, judged=judged)
    )
    # Where a pipeline calls two quantized denoisers in turn, both get it.
    execute(getattr(sampler, "pipeline", module), name, options=options)
    return name


def ready_model(
    model: str | None,
    *,
    module: "ModuleFile | None" = None,
    prompts: tuple[str, ...] = (),
    device: str | None = None,
    backend: str = "auto",
    options: "Options | None" = None,
) -> "Sampler":
    """Return the sampler of MODEL, on its device and with its backend; a worker process can call it too."""
    from tfmq.backends.backend import Options
    from tfmq.integrations.diffusers.quiet import quiet

    with quiet():
        sampler = open_model(model, module=module, prompts=prompts, device=device)
        execute_model(sampler, backend, options or Options())
    return sampler


def ready_models(
    quantized: str,
    reference: str | None,
    *,
    module: "ModuleFile | None" = None,
    prompts: tuple[str, ...],
    device: str | None,
    backend: str,
    options: "Options",
) -> "tuple[Sampler, Sampler | None]":
    """Return the samplers of a quantized model and of its original, which with `module` is that."""
    low = ready_model(
        quantized, module=module, prompts=prompts, device=device, backend=backend, options=options
    )
    if reference is None and module is None:
        return low, None
    return low, ready_model(reference, module=module, prompts=prompts, device=device)


def located(model: str) -> str:
    """Return MODEL such that a process with another working directory finds it."""
    return os.path.abspath(model) if os.path.exists(model) else model


def provenance(sampler: "Sampler", model: str | None) -> "Provenance":
    """Return where a quantized model comes from, by the manifest in the directory MODEL where its module has
    none itself; nothing of any other.
    """
    from tfmq.artifact import holds_quantized, stored_manifest
    from tfmq.integrations.diffusers.architecture import manifest_of
    from tfmq.nn.swap import is_quantized
    from tfmq.storage.manifest import Manifest, Provenance

    own = manifest_of(sampler.denoiser.module)
    if own is not None:
        return Manifest.from_json(own, source="the manifest of the model").provenance
    if model is not None and is_quantized(sampler.denoiser.module) and holds_quantized(Path(model)):
        return stored_manifest(Path(model)).provenance
    return Provenance()


def default_steps(found: "Provenance") -> int:
    """Return the number of steps that a quantized model was moved to or calibrated on, else 50."""
    return found.steps or STEPS


def published_figures(found: "Provenance") -> "tuple[Published, ...]":
    """Return the published full-precision figures that a model's recipe has."""
    from tfmq.recipes.published import Published

    return tuple(Published(**figure) for figure in found.published)


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
