"""An evaluation as a job: everything its values depend on is recorded, an interrupted one goes on, and shards
meet in one folder.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tfmq.evaluation.distribution.metrics import SET_METRICS
from tfmq.evaluation.evaluate import Evaluator, check_request
from tfmq.evaluation.outlay import drawing, existing
from tfmq.evaluation.real import Real, open_real
from tfmq.evaluation.result import Evaluation
from tfmq.evaluation.settings import Settings, Tools, prepare
from tfmq.evaluation.stages import BatchHelpers, Shard, Stages, nobody
from tfmq.evaluation.weights import WeightFolder
from tfmq.models.sampler import Sampler
from tfmq.progress import Progress, silent
from tfmq.recipes.published import Published
from tfmq.storage.digest import module_digest
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
    return {"weights": module_digest(module), "sampler": sampler.describe(), "device": device}


def _protocol(
    quantized: Sampler,
    reference: Sampler | None,
    real: Real | None,
    *,
    settings: Settings,
    tools: Tools,
    backend: str | None,
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


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked of an evaluation.

    Args:
        settings: how many images, which metrics.
        job: folder that keeps every finished batch; whoever has used the values deletes it.
        real: a folder of images, or an `.npz` file of images or statistics.
        weights: where downloaded weights lie; torch's cache by default.
        published: figures that full precision must reach against `real`.
        backend: what the quantized model computes with, for the record.
    """

    settings: Settings
    job: Path
    real: Path | None = None
    weights: WeightFolder = field(default_factory=WeightFolder)
    published: Sequence[Published] = ()
    backend: str | None = None


def _image_bytes(settings: Settings, tools: Tools) -> int:
    """Return the least bytes that a job keeps of an image: its features, by those of a blank one, or a number
    for each call of a pair.
    """
    if tools.extractor is None or not settings.of_sets:
        return 4 * settings.steps
    found = tools.extractor(np.zeros((1, 32, 32, 3), dtype=np.uint8))
    return sum(4 * found[kind].numel() for kind in {SET_METRICS[name].kind for name in settings.of_sets})


def check_room(settings: Settings, tools: Tools, folder: Path, *, models: int) -> None:
    """Refuse an evaluation whose features the disk of `folder` cannot hold.

    Raises:
        ValueError: says what they take.
    """
    count = settings.num_images if settings.draws_sets else min(settings.num_images, settings.num_pairs)
    needed, free = count * models * _image_bytes(settings, tools), shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(
            f"what is kept of {count} images of {models} models takes at least "
            f"{needed / 1e9:.3g} GB of disk, where {free / 1e9:.3g} GB are free; "
            "draw fewer (--num-images)"
        )


def expected_seconds(quantized: Sampler, reference: Sampler | None, settings: Settings) -> float:
    """Return about what drawing takes, of both models as sets and in pairs; metrics come on top."""
    pairs = (
        min(settings.num_pairs, settings.num_images) if settings.draws_pairs and reference is not None else 0
    )
    count = pairs + (settings.num_images if settings.draws_sets else 0)
    samplers = [quantized] if reference is None else [quantized, reference]
    return sum(
        drawing(sampler, count, steps=settings.steps, batch_size=settings.batch_size).seconds
        for sampler in samplers
    )


def open_job(
    quantized: Sampler,
    reference: Sampler | None,
    request: Request,
    *,
    shard: Shard | None = None,
    resume: bool = True,
    progress: Progress = silent,
    helpers: BatchHelpers = nobody,
) -> tuple[Evaluator, dict[str, Any]]:
    """Return what does the job, and the protocol; see `evaluate`."""
    images = None if request.real is None else open_real(request.real)
    # Check first what no weight file would mend, so that nobody fetches one in vain.
    check_request(quantized, reference, images, request.settings)
    tools = prepare(request.settings, request.weights)
    check_room(request.settings, tools, existing(request.job), models=1 if reference is None else 2)
    protocol = _protocol(
        quantized, reference, images, settings=request.settings, tools=tools, backend=request.backend
    )
    going_on = resume or shard is not None
    if going_on:
        # Shards start at the same time, so none may take the folder for remains of another job.
        request.job.mkdir(parents=True, exist_ok=True)
    stages = Stages(
        Journal(request.job, protocol, resume=going_on),
        request.settings.batch_size,
        shard or Shard(),
        progress,
        helpers,
    )
    return Evaluator(
        quantized, reference, images, request.settings, tools, stages, request.published
    ), protocol


def evaluate(
    quantized: Sampler,
    reference: Sampler | None,
    request: Request,
    *,
    shard: Shard | None = None,
    resume: bool = False,
    progress: Progress = silent,
    helpers: BatchHelpers = nobody,
    foretold: Callable[[float], None] | None = None,
) -> tuple[Evaluation, dict[str, Any]] | None:
    """Evaluate a quantized model; return what was found and the protocol that it can be repeated by.

    Args:
        quantized: draws with the quantized model.
        reference: draws with the full-precision one; it is evaluated first.
        request: how many images, which metrics, and where the work is kept.
        shard: the part of the batches that this process draws and leaves in the job's folder; a run without
            one, and with `resume`, gives the values.
        resume: go on with the work in the job's folder; otherwise it is started over.
        progress: shows bars.
        helpers: compute batches elsewhere; see `tfmq.cluster`.
        foretold: is told about how many seconds the drawing takes, before it begins.

    Returns:
        None for a shard.

    Raises:
        ValueError: what is asked for cannot be computed from what is given.
        CheckpointError: weights or real images are missing or damaged, or the folder is of another
            evaluation.
        BaselineError: full precision misses a published figure.
        MissingExtraError: a library is not installed.
    """
    evaluator, protocol = open_job(
        quantized, reference, request, shard=shard, resume=resume, progress=progress, helpers=helpers
    )
    if foretold is not None:
        foretold(expected_seconds(quantized, reference, request.settings) / (shard or Shard()).count)
    found = evaluator.run()
    # A shard never returns values, not even the last one: two that end together would both be the last.
    return None if found is None or shard is not None else (found, protocol)
