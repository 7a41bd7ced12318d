"""Evaluate a quantized model: full precision first, then the quantized one, then both pair by pair from the
same noise.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tfmq.evaluation.adherence.judge import ADHERENCE
from tfmq.evaluation.adherence.shares import encoded, share
from tfmq.evaluation.baseline import check_baseline
from tfmq.evaluation.deviation import deviation, follow, latent_error
from tfmq.evaluation.distribution.extractor import labelled
from tfmq.evaluation.distribution.features import Moments
from tfmq.evaluation.distribution.metrics import SET_METRICS
from tfmq.evaluation.real import Real, RealImages, RealStatistics
from tfmq.evaluation.result import FULL, PAIRS, QUANTIZED, REAL, Evaluation, Row, summary
from tfmq.evaluation.sampling import Images, as_colour, draw_batch
from tfmq.evaluation.settings import CLIP_METRIC, TRAJECTORY, Settings, Tools
from tfmq.evaluation.stages import Stages, StoredResults
from tfmq.evaluation.text import asked_of, prompts_of
from tfmq.models.sampler import Sampler
from tfmq.nn.swap import is_quantized
from tfmq.recipes.published import Published

# Number of pairs whose pixels are kept for people to look at.
KEPT = 64


def check_request(
    quantized: Sampler, reference: Sampler | None, real: Real | None, settings: Settings
) -> None:
    """Refuse what cannot work before anything is drawn.

    Raises:
        ValueError: there is nothing to compare with, the models do not belong together, or clip is asked of a
            model without text.
    """
    comparing = [name for name in settings.of_sets if SET_METRICS[name].compares]
    if comparing and reference is None and real is None:
        raise ValueError(
            f"{comparing[0]} compares with other images: pass --reference MODEL, --real IMAGES, or both"
        )
    if isinstance(real, RealStatistics):
        _check_statistics(comparing, real)
    if settings.draws_pairs and reference is None:
        names = ", ".join(name for name in settings.metrics if name in (*settings.of_pairs, TRAJECTORY))
        raise ValueError(
            f"{names} compare with full precision: pass --reference MODEL, or leave them out of --metrics"
        )
    if reference is not None:
        _check_reference(quantized, reference)
    if CLIP_METRIC in settings.metrics:
        prompts_of(quantized, range(1))
    if ADHERENCE in settings.metrics:
        asked_of(quantized, range(1))


def _check_reference(quantized: Sampler, reference: Sampler) -> None:
    """Refuse a reference that is quantized, or of another shape."""
    if is_quantized(reference.denoiser.module):
        raise ValueError("the reference is quantized itself; pass the full-precision model")
    shapes = [tuple(sampler.example().sample.shape[1:]) for sampler in (reference, quantized)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"the reference denoises samples of shape {shapes[0]}, the "
            f"quantized model {shapes[1]}; pass its own original"
        )


def _check_statistics(metrics: Sequence[str], real: RealStatistics) -> None:
    """Refuse metrics that the statistics of real images do not serve."""
    for name in metrics:
        metric = SET_METRICS[name]
        if not metric.of_moments or metric.kind not in real.moments.of:
            raise ValueError(
                f"{name} needs real images; the statistics in {real.described['source']} "
                "hold mean and covariance of some features only"
            )


@dataclass(frozen=True)
class _Sets:
    """What was found of the images as sets; incomplete where other shards have work left."""

    rows: tuple[Row, ...]
    baseline: tuple[Mapping[str, Any], ...]
    complete: bool


@dataclass(frozen=True)
class Evaluator:
    """The models, what they are compared with, and how.

    Args:
        quantized: the model to judge.
        reference: the full-precision model, evaluated first.
        real: real images or their statistics.
        settings: how many images, which metrics.
        tools: what the metrics need.
        stages: do the work and keep it.
        published: figures that full precision must reach.
    """

    quantized: Sampler
    reference: Sampler | None
    real: Real | None
    settings: Settings
    tools: Tools
    stages: Stages
    published: Sequence[Published] = ()

    def run(self) -> Evaluation | None:
        """Evaluate; None where other shards have work left.

        Raises:
            BaselineError: full precision misses a published figure; the quantized model was not drawn from.
            ValueError: the real images are of another size than the drawn ones, or too few for a metric.
            SamplingError: a model draws no images.
        """
        sets = self._sets() if self.settings.draws_sets else _Sets((), (), True)
        paired = None
        if self.reference is not None and self.settings.draws_pairs:
            stored = self._stage(PAIRS, min(self.settings.num_pairs, self.settings.num_images))
            if not stored.complete:
                return None
            paired = summary(stored, self.settings)
        return Evaluation(sets.rows, paired, sets.baseline) if sets.complete else None

    def batch(self, stage: str, indices: range) -> None:
        """Leave the results of a stage for the images `indices` in the journal."""
        self.stages.batch(stage, indices, self._computations()[stage])

    def _computations(self) -> dict[str, Callable[[range], dict[str, Tensor]]]:
        """Return what computes a batch of each stage."""
        found: dict[str, Callable[[range], dict[str, Tensor]]] = {
            QUANTIZED: partial(self._features, self.quantized)
        }
        if self.reference is not None:
            found |= {
                FULL: partial(self._features, self.reference),
                PAIRS: partial(self._pairs, self.reference),
            }
        if isinstance(self.real, RealImages):
            real = self.real
            found[REAL] = lambda indices: self._described(real.read(indices))
        return found

    def _stage(self, name: str, count: int) -> StoredResults:
        """Do what is left of a stage."""
        return self.stages.run(name, count, self._computations()[name])

    def _sets(self) -> _Sets:
        """Evaluate both models' images as sets, full precision first."""
        real = self._real()
        full = None if self.reference is None else self._stage(FULL, self.settings.num_images)
        rows: list[Row] = []
        baseline: list[dict[str, Any]] = []
        ready = all(stored.complete for stored in (real, full) if isinstance(stored, StoredResults))
        if full is not None and ready:
            rows += self._scores(FULL, full, {REAL: real})
            baseline = check_baseline(self.published, {row.metric: row.value for row in rows}, self.settings)
        low = self._stage(QUANTIZED, self.settings.num_images)
        complete = ready and low.complete
        if complete:
            rows += self._scores(QUANTIZED, low, {REAL: real, FULL: full})
        return _Sets(tuple(rows), tuple(baseline), complete)

    def _real(self) -> StoredResults | Moments | None:
        """Return the features of the real images; None where there are none or nothing compares."""
        real, extractor = self.real, self.tools.extractor
        if extractor is None or real is None:
            return None
        if isinstance(real, RealStatistics):
            return real.moments
        return self._stage(REAL, real.count)

    def _described(self, images: Images) -> dict[str, Tensor]:
        """Return what is kept of images: the features that metrics need."""
        assert self.tools.extractor is not None
        features = self.tools.extractor(as_colour(images))
        return {
            kind: features[kind].float().cpu().contiguous()
            for kind in {SET_METRICS[name].kind for name in self.settings.of_sets}
        }

    def _features(self, sampler: Sampler, indices: range) -> dict[str, Tensor]:
        """Draw images of a model and return what metrics need of them."""
        images = draw_batch(sampler, indices, steps=self.settings.steps, seed=self.settings.seed)
        found = {}
        if self.tools.extractor is not None:
            _check_size(images, self.real)
            found = self._described(images)
        if self.tools.clip is not None:
            found["clip"] = torch.tensor(
                [self.tools.clip(as_colour(images), prompts_of(sampler, indices)), len(indices)],
                dtype=torch.float64,
            )
        if self.tools.judge is not None:
            pixels = torch.from_numpy(as_colour(images)).permute(0, 3, 1, 2).float() / 255
            verdicts = encoded(self.tools.judge(pixels, asked_of(sampler, indices)))
            found |= {f"{ADHERENCE}.{name}": values for name, values in verdicts.items()}
        return found

    def _scores(
        self, model: str, images: StoredResults, others: Mapping[str, StoredResults | Moments | None]
    ) -> list[Row]:
        """Return the values of one model's images."""
        rows = []
        given = {name: other for name, other in others.items() if other is not None}
        for name in self.settings.of_sets:
            metric = SET_METRICS[name]
            for against in given if metric.compares else (None,):
                scores = metric(images, given[against] if against else None, seed=self.settings.seed)
                rows += [
                    Row(labelled(key, self.settings.extractor), model, against, score.value, score.deviation)
                    for key, score in scores.items()
                ]
        if self.tools.clip is not None:
            means, counts = torch.stack([part["clip"] for part in images.parts()]).unbind(dim=1)
            rows.append(Row(CLIP_METRIC, model, None, float((means * counts).sum() / counts.sum()), None))
        return [*rows, *self._adherence(model, images)]

    def _adherence(self, model: str, images: StoredResults) -> list[Row]:
        """Return the share of one model's images that hold each attribute that was asked for."""
        rows = []
        for name in () if self.tools.judge is None else self.tools.judge.attributes:
            found = share(images.joined(f"{ADHERENCE}.{name}"))
            if found is not None:
                low, high = found.interval
                rows.append(Row(f"{ADHERENCE}.{name}", model, None, found.value, (high - low) / 2))
        return rows

    def _pairs(self, reference: Sampler, indices: range) -> dict[str, Tensor]:
        """Draw pairs from the same noise and return their metrics, the deviation of their states, and the
        first pixels.
        """
        full, low = (
            follow(sampler, indices, steps=self.settings.steps, seed=self.settings.seed)
            for sampler in (reference, self.quantized)
        )
        images = as_colour(full.images), as_colour(low.images)
        values = {name: torch.from_numpy(metric(*images)) for name, metric in self.tools.pairs.items()}
        kept = max(0, min(len(indices), KEPT - indices.start))
        pixels = {
            f"{name} images": torch.from_numpy(array[:kept])
            for name, array in zip((FULL, QUANTIZED), images, strict=True)
        }
        latent = latent_error(full, low)
        decoded = {} if latent is None else {"latent": latent}
        return {**values, **pixels, **decoded, "deviation": deviation(full, low), "timesteps": full.timesteps}


def _check_size(images: Images, real: Real | None) -> None:
    """Refuse to compare drawn images with real ones of another size."""
    if isinstance(real, RealImages) and images.shape[1:3] != tuple(real.size):
        (height, width), (other_height, other_width) = images.shape[1:3], real.size
        raise ValueError(
            f"the real images have {other_width} x {other_height} pixels, the drawn "
            f"ones {width} x {height}; crop and resize the real ones as "
            "the model's data were: how that is done changes every metric"
        )
