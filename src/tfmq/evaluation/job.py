"""An evaluation as a job: everything its values depend on is recorded, an interrupted one goes on, and shards meet in one folder."""

from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from tfmq.evaluation.evaluate import Evaluation, Evaluator, check_request
from tfmq.evaluation.real import Real, open_real
from tfmq.evaluation.settings import Settings, Tools, prepare
from tfmq.evaluation.stages import Shard, Stages
from tfmq.evaluation.weights import Weights
from tfmq.models.sampler import Sampler
from tfmq.progress import Progress, silent
from tfmq.recipes.recipe import Published
from tfmq.storage.digest import tensor_digest
from tfmq.storage.journal import Journal
from tfmq.version import __version__

LIBRARIES = ("torchmetrics", "torch-fidelity", "diffusers")


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"tfmq": __version__, "torch": torch.__version__}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def _model(sampler: Sampler) -> dict[str, Any]:
    module = sampler.denoiser.module
    device = next((parameter.device.type for parameter in module.parameters()), "cpu")
    return {"weights": tensor_digest(module.state_dict()), "sampler": sampler.describe(), "device": device}


def _protocol(
    quantized: Sampler, reference: Sampler | None, real: Real | None, *, settings: Settings, tools: Tools, backend: str | None
) -> dict[str, Any]:
    """Return everything that the values depend on, as JSON keeps it."""
    return {
        "settings": {**asdict(settings), "metrics": list(settings.metrics)},
        "quantized": {**_model(quantized), "backend": backend},
        "reference": None if reference is None else _model(reference),
        "real": None if real is None else dict(real.described),
        "tools": tools.describe(),
        "versions": _versions(),
    }


def evaluate(
    quantized: Sampler,
    reference: Sampler | None = None,
    real: Path | None = None,
    *,
    settings: Settings,
    job: Path,
    weights: Weights | None = None,
    published: Sequence[Published] = (),
    shard: Shard | None = None,
    resume: bool = False,
    backend: str | None = None,
    progress: Progress = silent,
) -> tuple[Evaluation, dict[str, Any]] | None:
    """Evaluate a quantized model; return what was found and the protocol that it can be repeated by.

    Args:
        quantized: draws with the quantized model.
        reference: draws with the full-precision one; it is evaluated first.
        real: a folder of images, or an `.npz` file of images or statistics.
        settings: how many images, which metrics.
        job: folder that keeps every finished batch; whoever has used the values deletes it.
        weights: where downloaded weights lie; torch's cache by default.
        published: figures that full precision must reach against `real`.
        shard: the part of the batches that this process draws and leaves in `job`; a run without one, and with `resume`, gives the values.
        resume: go on with the work in `job`; otherwise it is started over.
        backend: what the quantized model computes with, for the record.
        progress: shows bars.

    Returns:
        None for a shard.

    Raises:
        ValueError: what is asked for cannot be computed from what is given.
        CheckpointError: weights or real images are missing or damaged, or `job` is of another evaluation.
        BaselineError: full precision misses a published figure.
        MissingExtraError: a library is not installed.
    """
    images = None if real is None else open_real(real)
    tools = prepare(settings, weights or Weights())
    check_request(quantized, reference, images, settings)
    protocol = _protocol(quantized, reference, images, settings=settings, tools=tools, backend=backend)
    going_on = resume or shard is not None
    if going_on:
        # Shards start at the same time: none may take the folder for another's remains.
        job.mkdir(parents=True, exist_ok=True)
    stages = Stages(Journal(job, protocol, resume=going_on), settings.batch_size, shard or Shard(), progress)
    found = Evaluator(quantized, reference, images, settings, tools, stages, published).run()
    # Not even the last shard gives values: two that end together would both be the last.
    return None if found is None or shard is not None else (found, protocol)
