"""Open what a caller names: a sampler of any target, and of one that is to be quantized all that its result
depends on.
"""

import warnings
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tfmq.artifact import check_quantizable, holds_quantized, load, stored_manifest
from tfmq.calibration.trajectory import CalibrationError
from tfmq.components import Components, Networks, chosen_networks
from tfmq.errors import require
from tfmq.models.module_file import ModuleFile
from tfmq.models.sampler import Sampler
from tfmq.nn.swap import is_quantized
from tfmq.recipes.recipe import Recipe, call_options
from tfmq.recipes.yaml import to_dict
from tfmq.reconstruction.resources import Resources
from tfmq.storage.digest import tensor_digest
from tfmq.storage.manifest import Provenance
from tfmq.storage.prompts import Brought, brought
from tfmq.version import __version__

# Folders with models that have names: the package's own, and those of a checkout.
SHELVES = (Path(__file__).parent / "assets", Path(__file__).parents[2] / "models")


def named_directory(name: str) -> Path | None:
    """Return the directory of the model that tfmq knows by `name`; None where it knows none, or a wheel came
    without it.

    >>> named_directory("default").name
    'default'
    """
    found = (
        shelf / name for shelf in SHELVES if name.isidentifier() or name.replace("-", "_").isidentifier()
    )
    return next((path for path in found if (path / "model_index.json").is_file()), None)


def known_names() -> tuple[str, ...]:
    """Return the names of the models that are here, those of the package first.

    >>> "default" in known_names()
    True
    """
    return tuple(sorted(path.parent.name for shelf in SHELVES for path in shelf.glob("*/model_index.json")))


def open_sampler(
    target: Any,
    *,
    prompts: tuple[str, ...] = (),
    options: Mapping[str, Any] | None = None,
    component: str | None = None,
) -> Sampler:
    """Return the sampler of `target`: one itself, a module's file, a pipeline, its directory or single file,
    a hub id, or the name of a model of the project.

    A directory may bring prompts and guidance of its own, see `PROMPTS_FILE`. `options` go to the pipeline's
    call; by default those that a quantized model was calibrated with. A quantized model that is loaded here
    computes in simulated arithmetic; `tfmq.execute` changes that once it is on its device. `component` names
    the denoiser of a pipeline that calls two in turn.

    Raises:
        ValueError: nothing that can be sampled from, or no such component.
    """
    if isinstance(target, ModuleFile):
        target = target.sampler()
        if prompts:
            warnings.warn("prompts have no effect: the sampler brings its own conditions", stacklevel=2)
    if _is_sampler(target):
        _check_unasked(options, component)
        return target
    require("diffusers", extra="diffusers")
    from tfmq.integrations.diffusers.pipelines import (
        DEFAULT_PROMPTS,
        PipelineSampler,
        accepted_options,
    )

    own = Brought()
    if isinstance(target, str | Path):
        own = brought(_directory(target))
        target, options = _read_pipeline(target, options)
    if not hasattr(target, "components"):
        raise ValueError(
            f"{type(target).__name__} is no pipeline; put a sampler around a "
            "denoiser that stands alone, such as tfmq.LoopSampler"
        )
    sampler = PipelineSampler(
        target,
        prompts=prompts or own.prompts or DEFAULT_PROMPTS,
        options=accepted_options(target, {**own.options, **(options or {})}),
        component=component,
    )
    if prompts and not sampler.takes_prompts:
        warnings.warn(
            f"prompts have no effect: {type(target).__name__} does not draw from text", stacklevel=2
        )
    return sampler


def _is_sampler(target: Any) -> bool:
    """Whether something has what a sampler needs here, whatever its class."""
    return all(hasattr(target, name) for name in ("run", "denoiser"))


def _check_unasked(options: Mapping[str, Any] | None, component: str | None) -> None:
    """Refuse a component of a sampler, which is for pipelines, and warn of options that it does not take."""
    if component is not None:
        raise ValueError(f"component={component!r} is for pipelines; a sampler brings its own denoiser")
    if options:
        warnings.warn(
            f"{', '.join(options)} of the recipe have no effect: the sampler brings its own options",
            stacklevel=4,
        )


def _directory(target: str | Path) -> Path:
    """Return the path of a directory, or the directory of a name; a hub id's is none that exists."""
    return named_directory(str(target)) or Path(target)


def _read_pipeline(
    target: str | Path, options: Mapping[str, Any] | None
) -> tuple[Any, Mapping[str, Any] | None]:
    """Return the pipeline of a directory, a single file, a name or a hub id, and the options of its call:
    those that a quantized one was calibrated with, unless others are given.
    """
    from tfmq.integrations.diffusers.opening import open_file, open_pipeline

    path = _directory(target)
    if path.is_file():
        return open_file(path), options
    if not holds_quantized(path):
        return open_pipeline(path if path.exists() else target), options
    if options is None:
        options = calibrated_options(stored_manifest(path).provenance)
    return load(path, backend="simulated"), options


def open_quantized(directory: Path, module: ModuleFile) -> Sampler:
    """Return a sampler of what was quantized of a module of one's own, in simulated arithmetic.

    Raises:
        ModuleFileError: the module's file gives no sampler.
        CheckpointError: the directory holds no quantized model, or a damaged one.
        ValueError: it is of another architecture.
    """
    sampler = module.sampler()
    load(directory, module=sampler.denoiser.module, backend="simulated")
    return sampler


def calibrated_options(provenance: Provenance) -> dict[str, Any]:
    """Return the arguments of the pipeline's call that a quantized model was calibrated with."""
    return call_options(
        {"eta": provenance.eta, "guidance_scale": provenance.guidance_scale, "spacing": provenance.spacing}
    )


def _digests(networks: Networks) -> dict[str, Any]:
    """Return the digests of networks, which what becomes of them depends on; nothing where there are none."""
    digests = {name: tensor_digest(network.module.state_dict()) for name, network in networks.all.items()}
    return {"networks": digests} if digests else {}


def fingerprint_of(
    sampler: Sampler, recipe: Recipe, seed: int, resources: Resources, networks: Networks
) -> dict[str, Any]:
    """Return everything that the result depends on; with a budget of time it also depends on the shares that
    the journal keeps.
    """
    module = sampler.denoiser.module
    device = next((parameter.device.type for parameter in module.parameters()), "cpu")
    versions = {"tfmq": __version__, "torch": torch.__version__}
    model = {"model": tensor_digest(module.state_dict()), "sampler": sampler.describe(), "device": device}
    budget = {} if resources.time_budget is None else {"time_budget": resources.time_budget}
    return {"recipe": to_dict(recipe), "seed": seed, **budget, **model, **_digests(networks), **versions}


def _check_weights(module: nn.Module) -> None:
    """Raise `CalibrationError` where a weight is NaN or infinite."""
    for name, tensor in module.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise CalibrationError(
                f"{name} holds NaN or infinite values: the full-precision "
                "model is damaged; download or save it again"
            )


def open_target(
    target: Any,
    recipe: Recipe,
    *,
    device: str | torch.device | None = None,
    prompts: tuple[str, ...] = (),
    component: str | None = None,
    components: Components | None = None,
) -> tuple[Sampler, Networks]:
    """Return the sampler of a model that is to be quantized, on its device, and what else of its pipeline is,
    see `chosen_networks`.

    Raises:
        ValueError: it is quantized already, or cannot be.
        CalibrationError: NaN or infinite weights.
    """
    sampler = open_sampler(
        target, prompts=prompts, options=call_options(asdict(recipe.calibration)), component=component
    )
    module, others = sampler.denoiser.module, getattr(sampler, "others", ())
    if is_quantized(module):
        rest = f", or its {others[0]} (--component {others[0]})" if others else ""
        raise ValueError(f"the model is quantized already; quantize the full-precision one{rest}")
    if others:
        text = f"the pipeline also calls {', '.join(others)}, which stays in full precision"
        warnings.warn(
            f"{text}; quantize the result again with --component {others[0]} (component={others[0]!r})",
            stacklevel=3,
        )
    check_quantizable(module)
    _check_weights(module)
    networks = chosen_networks(sampler, components)
    for network in networks.all.values():
        _check_weights(network.module)
    if device is not None:
        owner_of(sampler).to(device)
    return sampler, networks


def owner_of(sampler: Sampler) -> Any:
    """Return what is moved and saved: the pipeline, where there is one."""
    return getattr(sampler, "pipeline", sampler.denoiser.module)
