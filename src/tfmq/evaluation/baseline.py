"""The sanity gate: full precision must reach its published figure before the quantized model is judged."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from tfmq.evaluation.distribution.extractor import STANDARD
from tfmq.evaluation.settings import Settings
from tfmq.recipes.published import Published

CAUSES = (
    "scaling (latents, or images mapped to [0, 1] twice)",
    "EMA (weights before or without averaging)",
    "sampler (scheduler, eta, timestep spacing, guidance)",
    "statistics (another set of real images, size, crop or number)",
)


class BaselineError(ValueError):
    """The full-precision model does not reach its published figure, so a comparison with it would mean
    nothing.
    """


def check_baseline(
    published: Sequence[Published], measured: Mapping[str, float], settings: Settings
) -> list[dict[str, Any]]:
    """Compare what full precision reaches with what was published for this protocol.

    Args:
        published: the figures of the recipe.
        measured: values of the full-precision model against real images, by metric.
        settings: figures for another number of images or steps, or another extractor, are not compared.

    Returns:
        For each figure its fields, what was measured, and why it was not compared where it was not.

    Raises:
        BaselineError: a figure is missed by more than its tolerance; names the likely causes.
    """
    records = []
    for figure in published:
        value, reason = measured.get(figure.metric), _incomparable(figure, settings)
        if value is None:
            reason = reason or "it was not measured against real images"
        elif not reason and abs(value - figure.value) > figure.tolerance:
            published_as = f"{figure.value:g} in {figure.source}"
            raise BaselineError(
                f"full precision has {figure.metric} {value:.4g}, published is "
                f"{published_as}, more than {figure.tolerance:g} apart: "
                "the protocol differs, so the quantized model is not "
                f"evaluated. Likely causes: {'; '.join(CAUSES)}"
            )
        records.append({**asdict(figure), "measured": value, "not_compared": reason})
    return records


def _incomparable(figure: Published, settings: Settings) -> str | None:
    """Return why a figure says nothing about an evaluation; None where it does."""
    if settings.extractor != STANDARD:
        return f"the extractor is {settings.extractor}"
    if figure.num_images != settings.num_images:
        return f"it is for {figure.num_images} images, not {settings.num_images}"
    return f"it is for {figure.steps} steps, not {settings.steps}" if figure.steps != settings.steps else None
