"""What `tfmq evaluate` makes of its arguments."""

from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from tfmq.evaluation.stages import Shard
    from tfmq.models.sampler import Sampler

# Numbers of images and of pairs, unless others are asked for.
QUICK, THOROUGH = (64, 16), (1000, 64)


def amounts(num_images: int | None, num_pairs: int | None, *, thorough: bool) -> tuple[int, int]:
    """Return how many images to draw and how many pairs to compare: as asked, else by `--thorough`."""
    images, pairs = THOROUGH if thorough else QUICK
    return num_images or images, num_pairs or pairs


def judge_of(directory: Path, reference: str | None) -> str | None:
    """Return the judge that the quantized model brings, or its reference."""
    from tfmq.evaluation.adherence.judge import brought_judge
    from tfmq.targets import named_directory

    folders = [directory, *([] if reference is None else [named_directory(reference) or Path(reference)])]
    return next((name for name in map(brought_judge, folders) if name), None)


def shard_of(text: str | None) -> "Shard | None":
    """Return the shard that `--shard` names; None without it.

    Raises:
        typer.BadParameter: it names none.
    """
    from tfmq.evaluation.stages import Shard

    if text is None:
        return None
    index, _, count = text.partition("/")
    try:
        return Shard(int(index), int(count))
    except ValueError as error:
        raise typer.BadParameter(
            f"{text!r} is no shard; give I/N with 0 <= I < N, such as 0/4", param_hint="--shard"
        ) from error


def metrics_of(metrics: str, extractor: str) -> tuple[str, ...]:
    """Return the metrics that `--metrics` names.

    Raises:
        typer.BadParameter: there is no such metric or extractor.
    """
    from tfmq.evaluation.distribution.extractors import EXTRACTORS
    from tfmq.evaluation.settings import metric_names

    known = metric_names()
    names = (
        known
        if metrics == "all"
        else tuple(dict.fromkeys(name.strip() for name in metrics.split(",") if name.strip()))
    )
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise typer.BadParameter(
            f"there is no metric {', '.join(unknown)}; give all, or some of {', '.join(known)}",
            param_hint="--metrics",
        )
    if extractor not in EXTRACTORS:
        raise typer.BadParameter(
            f"there is no extractor {extractor!r}; give one of {', '.join(EXTRACTORS)}",
            param_hint="--extractor",
        )
    return names


def metrics_for(sampler: "Sampler", names: tuple[str, ...], *, judge: str | None) -> tuple[str, ...]:
    """Return the metrics that a model can have: clip needs prompts, adherence a judge."""
    from tfmq.evaluation.adherence.judge import ADHERENCE
    from tfmq.evaluation.settings import CLIP_METRIC
    from tfmq.evaluation.text import draws_from_text

    possible = {CLIP_METRIC: draws_from_text(sampler), ADHERENCE: judge is not None}
    return tuple(name for name in names if possible.get(name, True))
