"""`tfmq evaluate`."""

from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tfmq.cli.devices import check_devices
from tfmq.cli.evaluating import amounts, judge_of, metrics_for, metrics_of, shard_of
from tfmq.cli.options import (
    Backend,
    BatchSize,
    Cluster,
    Directory,
    EngineDevice,
    Json,
    Module,
    Prompts,
    Seed,
    Steps,
    Threads,
    WeightForm,
    Workers,
    beside,
    check_cluster,
    check_execution,
    check_module,
    check_reference,
    read_prompts,
)
from tfmq.cli.outcome import emit, job_hint, verb

if TYPE_CHECKING:
    from tfmq.cluster.crew import Cluster as Place
    from tfmq.cluster.evaluation import OpenModels
    from tfmq.evaluation.job import Request
    from tfmq.evaluation.stages import Shard
    from tfmq.models.sampler import Sampler

METRICS = "fid,kid,psnr,ssim,trajectory"
SUFFIX = ".evaluation"


def evaluate(
    directory: Directory,
    reference: Annotated[
        str | None,
        typer.Option(
            "--reference", metavar="MODEL", help="The model that it was made from; evaluated first."
        ),
    ] = None,
    module: Module = None,
    real: Annotated[
        Path | None,
        typer.Option(
            "--real", metavar="IMAGES", help="Folder of images, or .npz of images or of statistics."
        ),
    ] = None,
    num_images: Annotated[
        int | None,
        typer.Option(
            "--num-images", min=1, help="How many images to draw. Default: 64, with --thorough 1000."
        ),
    ] = None,
    thorough: Annotated[
        bool, typer.Option("--thorough", help="Draw as many images as make metrics of sets worth reading.")
    ] = False,
    steps: Steps = None,
    seed: Seed = 0,
    metrics: Annotated[
        str,
        typer.Option(
            "--metrics",
            metavar="A,B",
            help=(
                "Some of fid, sfid, kid, is, precision-recall, clip, "
                "adherence, psnr, ssim, lpips, trajectory."
            ),
        ),
    ] = METRICS,
    num_pairs: Annotated[
        int | None,
        typer.Option(
            "--num-pairs",
            min=1,
            help="Images of these that are compared pair by pair. Default: 16, with --thorough 64.",
        ),
    ] = None,
    extractor: Annotated[
        str,
        typer.Option(
            "--extractor",
            metavar="NAME",
            help="inception; efficientnet-lite0 or pooled-pixels: local, and part of the metric's name.",
        ),
    ] = "inception",
    weights_dir: Annotated[
        Path | None,
        typer.Option(
            "--weights-dir",
            metavar="DIR",
            help="Folder with checkpoints/ that has downloaded weights. Default: torch's cache.",
        ),
    ] = None,
    clip: Annotated[
        str, typer.Option("--clip", metavar="MODEL", help="Folder or hub id of the CLIP model.")
    ] = "openai/clip-vit-base-patch16",
    judge: Annotated[
        str | None,
        typer.Option(
            "--judge",
            metavar="NAME",
            help="What reads the images for adherence. Default: the one that the model brings.",
        ),
    ] = None,
    output_dir: Annotated[
        Path | None,
        typer.Option("--output-dir", metavar="OUT", help="Where the files go. Default: DIR.evaluation."),
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option(
            "--shard",
            metavar="I/N",
            help="Draw every N-th batch only; a run with --resume puts the shards together.",
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue an interrupted evaluation, or the work of shards.")
    ] = False,
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
    """Judge a quantized model: FID and its kin against real images and full precision, and pairs from the
    same noise.
    """
    target = output_dir or beside(directory, SUFFIX)
    with verb(interrupted=job_hint(beside(str(target), ".job"))):
        from tfmq.cli.models import (
            default_steps,
            execute_model,
            located,
            open_model,
            provenance,
            published_figures,
            quantized_directory,
            ready_models,
        )
        from tfmq.evaluation.job import Request
        from tfmq.evaluation.settings import Settings
        from tfmq.evaluation.weights import WeightFolder
        from tfmq.integrations.diffusers.quiet import quiet

        device, engine = check_devices(device, backend)
        execution, part, names = (
            check_execution(backend, weights, engine),
            shard_of(shard),
            metrics_of(metrics, extractor),
        )
        place = check_cluster(cluster, workers, threads, device=device)
        _check_sharing(place, part)
        check_reference(reference, module, needed=False)
        source, own = quantized_directory(directory), check_module(module)
        opening: dict[str, Any] = {"module": own, "prompts": read_prompts(prompts), "device": device}
        with quiet():
            quantized = open_model(str(source), **opening)
            described = provenance(quantized, directory)
            reader = judge or judge_of(source, reference)
            images, pairs = amounts(num_images, num_pairs, thorough=thorough)
            settings = Settings(
                num_images=images,
                steps=steps or default_steps(described),
                seed=seed,
                batch_size=batch_size,
                num_pairs=pairs,
                metrics=metrics_for(quantized, names, judge=reader) if metrics == "all" else names,
                extractor=extractor,
                clip=clip,
                judge=reader,
            )
            name = execute_model(
                quantized, backend, execution, rows=min(batch_size, settings.num_images), judged=True
            )
            full = None if reference is None and own is None else open_model(reference, **opening)
            request = Request(
                settings=settings,
                job=target.absolute().with_name(target.name + ".job"),
                real=_absolute(real),
                weights=WeightFolder(_absolute(weights_dir)),
                published=published_figures(described),
                backend=name,
            )
            # Every worker uses the backend that was chosen here.
            again = partial(
                ready_models,
                located(str(source)),
                reference and located(reference),
                backend=name or "auto",
                options=execution,
                **opening,
            )
            values = _evaluated(
                quantized, full, request, target=target, again=again, place=place, shard=part, resume=resume
            )
    _tell(values, target, shard=shard, json=json)


def _absolute(path: Path | None) -> Path | None:
    return None if path is None else path.absolute()


def _check_sharing(place: "Place | None", shard: "Shard | None") -> None:
    """Refuse a shard of a cluster's work."""
    if place is not None and shard is not None:
        raise typer.BadParameter(
            "a cluster shares the work out itself; leave one of them out", param_hint="--shard"
        )


def _tell(values: dict[str, Any] | None, target: Path, *, shard: str | None, json: bool) -> None:
    """Print what was found, or that a shard is drawn."""
    if json:
        emit({"output_dir": str(target), **({"shard": shard} if values is None else values)})
    elif values is None:
        print(
            f"shard {shard} is drawn; once all are, the same command with "
            "--resume instead of --shard gives the values"
        )
    else:
        from tfmq.cli.tables import show_evaluation

        show_evaluation(values, target)


def _evaluated(
    quantized: "Sampler",
    reference: "Sampler | None",
    request: "Request",
    *,
    target: Path,
    again: "OpenModels",
    place: "Place | None",
    shard: "Shard | None",
    resume: bool,
) -> dict[str, Any] | None:
    """Evaluate, with help where there is a `place` whose workers open the models `again`, and write the
    files; None for a shard.
    """
    import shutil

    from tfmq.cli.progress import foretell, shown_progress
    from tfmq.cluster.crew import connected
    from tfmq.cluster.evaluation import helpers
    from tfmq.evaluation.job import evaluate as run
    from tfmq.evaluation.stages import nobody
    from tfmq.report.directory import completed_directory, refuse_foreign
    from tfmq.report.evaluation import EVALUATION_FILES, evaluation_values, write_evaluation

    refuse_foreign(target, owned=EVALUATION_FILES)
    with shown_progress() as progress, ExitStack() as stack:
        helping = nobody if place is None else helpers(stack.enter_context(connected(place)), again, request)
        done = run(
            quantized,
            reference,
            request,
            shard=shard,
            resume=resume,
            progress=progress,
            helpers=helping,
            foretold=partial(foretell, what="drawing; metrics come on top"),
        )
    if done is None:
        return None
    values = evaluation_values(*done)
    with completed_directory(target, owned=EVALUATION_FILES) as folder:
        write_evaluation(folder, done[0], values)
    shutil.rmtree(request.job, ignore_errors=True)
    return values
