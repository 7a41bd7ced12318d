"""Whole evaluations of tiny models: the order, the values, resuming, shards."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tfmq.evaluation.adherence.judge import JUDGES
from tfmq.evaluation.baseline import BaselineError
from tfmq.evaluation.distribution.frechet import frechet_distance
from tfmq.evaluation.distribution.pixels import PooledPixels
from tfmq.evaluation.job import Request, evaluate
from tfmq.evaluation.paired import psnr
from tfmq.evaluation.result import FULL, QUANTIZED, REAL, Evaluation
from tfmq.evaluation.sampling import draw
from tfmq.evaluation.settings import Settings
from tfmq.evaluation.stages import Shard
from tfmq.evaluation.weights import WeightFolder
from tfmq.models.sampler import LoopSampler
from tfmq.recipes import Published
from tfmq.storage.errors import JobMismatchError

pytest.importorskip("torchmetrics")
SETTINGS = Settings(
    num_images=7,
    steps=4,
    seed=3,
    batch_size=3,
    num_pairs=5,
    metrics=("fid", "psnr", "trajectory"),
    extractor="pooled-pixels",
)


@pytest.fixture(scope="module")
def models(request: pytest.FixtureRequest) -> tuple[LoopSampler, LoopSampler]:
    """Return the sampler of a tiny model, and one of its quantized twin, for all tests here."""
    import tfmq

    sampler = request.getfixturevalue("sampler")
    recipe = tfmq.scheme("rtn_w4a8")
    reference, quantized = sampler("plain_rgb"), sampler("plain_rgb")
    tfmq.quantize(
        quantized,
        replace(
            recipe, calibration=replace(recipe.calibration, samples=2, steps=4, interval=2, batch_size=2)
        ),
    )
    return reference, quantized


@pytest.fixture
def real(tmp_path: Path) -> Path:
    path = tmp_path / "real.npz"
    np.savez(path, images=np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8))
    return path


@pytest.fixture
def run(models: tuple[LoopSampler, LoopSampler], tmp_path: Path) -> Callable[..., Any]:
    """Return a function that evaluates the models and returns what was found."""

    def call(
        *, settings: Settings = SETTINGS, reference: bool = True, job: str = "job", **options: Any
    ) -> Evaluation | None:
        full, low = models
        given = {name: options.pop(name) for name in ("real", "published") if name in options}
        found = evaluate(
            low,
            full if reference else None,
            Request(settings=settings, job=tmp_path / job, **given),
            **options,
        )
        return None if found is None else found[0]

    return call


def values(found: Evaluation) -> str:
    assert found.paired is not None
    return json.dumps(
        [
            [asdict(row) for row in found.rows],
            [asdict(s) for s in found.paired.metrics.values()],
            asdict(found.paired.trajectory),
        ]
    )  # type: ignore[arg-type]


def test_every_comparison_once_full_precision_first(
    run: Callable[..., Any], models: tuple[LoopSampler, LoopSampler], real: Path
) -> None:
    found = run(real=real)
    assert [(row.metric, row.model, row.against) for row in found.rows] == [
        ("fd[pooled-pixels]", FULL, REAL),
        ("fd[pooled-pixels]", QUANTIZED, REAL),
        ("fd[pooled-pixels]", QUANTIZED, FULL),
    ]
    full, low = (draw(model, 7, steps=4, seed=3, batch_size=3) for model in models)

    class Flat:
        def __init__(self, images: Any) -> None:
            self.values = PooledPixels()(images)["pool"]

        def __len__(self) -> int:
            return len(self.values)

        def chunks(self, kind: str) -> Any:
            return iter([self.values])

    with np.load(real) as stored:
        others = stored["images"]
    expected = [
        frechet_distance(Flat(a), Flat(b), "pool") for a, b in ((full, others), (low, others), (low, full))
    ]
    assert [row.value for row in found.rows] == pytest.approx(expected, rel=1e-6)
    assert (
        found.paired.count == 5
        and np.array_equal(found.paired.reference, full[:5])
        and np.array_equal(found.paired.quantized, low[:5])
    )
    assert found.paired.metrics["psnr"].mean == pytest.approx(psnr(full[:5], low[:5]).mean())
    assert (
        found.paired.trajectory.mean[0] == 0 < found.paired.trajectory.mean[-1]
        and found.paired.trajectory.latent_mean is None
    )


def test_without_a_reference_only_real_images_compare(run: Callable[..., Any], real: Path) -> None:
    found = run(settings=replace(SETTINGS, metrics=("fid",)), reference=False, real=real)
    assert [(row.model, row.against) for row in found.rows] == [(QUANTIZED, REAL)] and found.paired is None


def test_a_model_is_drawn_from_in_batches(
    run: Callable[..., Any], models: tuple[LoopSampler, LoopSampler], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No list of images: batch after batch, and what is kept of one is on disk before the next."""
    seen: list[range] = []
    for model in models:
        inner = model.run

        def noted(indices: range, *, steps: int, seed: int, inner: Callable[..., Tensor] = inner) -> Tensor:
            seen.append(indices)
            return inner(indices, steps=steps, seed=seed)

        monkeypatch.setattr(model, "run", noted)
    run(settings=replace(SETTINGS, metrics=("fid",)))
    assert seen == [range(0, 3), range(3, 6), range(6, 7)] * 2


def test_an_interrupted_evaluation_goes_on_to_the_same_values(
    run: Callable[..., Any], models: tuple[LoopSampler, LoopSampler], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = values(run(job="whole"))
    inner, calls = models[1].run, 0

    def stops(indices: range, *, steps: int, seed: int) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return inner(indices, steps=steps, seed=seed)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(models[1], "run", stops)
        run()
    drawn: list[range] = []
    first = models[0].run
    with monkeypatch.context() as patch:
        patch.setattr(
            models[0], "run", lambda indices, **options: drawn.append(indices) or first(indices, **options)
        )  # type: ignore[func-returns-value]
        assert values(run(resume=True)) == expected
    # Full precision was drawn already; only the pairs are drawn from both.
    assert drawn == [range(0, 3), range(3, 5)]


def test_shards_meet_in_the_same_values(run: Callable[..., Any], real: Path) -> None:
    expected = values(run(job="whole", real=real))
    assert run(real=real, shard=Shard(1, 2)) is None
    assert run(real=real, shard=Shard(0, 2)) is None
    assert values(run(real=real, resume=True)) == expected


def test_another_evaluation_does_not_go_on_with_this_work(run: Callable[..., Any]) -> None:
    run()
    with pytest.raises(JobMismatchError, match=r"settings\.seed was 3 and is 4"):
        run(settings=replace(SETTINGS, seed=4), resume=True)


def test_a_missed_baseline_stops_before_the_quantized_model(
    run: Callable[..., Any],
    models: tuple[LoopSampler, LoopSampler],
    real: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    figure = Published(metric="fid", value=1e6, tolerance=1.0, num_images=7, steps=4, source="nowhere")
    monkeypatch.setattr("tfmq.evaluation.baseline.STANDARD", "pooled-pixels")
    monkeypatch.setattr("tfmq.evaluation.distribution.extractor.STANDARD", "pooled-pixels")
    monkeypatch.setattr(models[1], "run", lambda *_, **__: pytest.fail("the quantized model was drawn from"))
    with pytest.raises(BaselineError, match="EMA"):
        run(settings=replace(SETTINGS, metrics=("fid",)), real=real, published=(figure,))


@pytest.mark.parametrize(
    ("metrics", "options", "cause"),
    [
        (("fid",), {"reference": False}, "pass --reference MODEL, --real IMAGES"),
        (("psnr", "trajectory"), {"reference": False}, "psnr, trajectory compare with full precision"),
    ],
)
def test_what_cannot_work_is_refused_first(
    run: Callable[..., Any], tmp_path: Path, metrics: Any, options: Any, cause: str
) -> None:
    with pytest.raises(ValueError, match=cause):
        run(settings=replace(SETTINGS, metrics=metrics), **options)
    assert not (tmp_path / "job").exists()


def test_a_metric_that_the_model_does_not_have_asks_for_no_weights(
    models: tuple[LoopSampler, LoopSampler], tmp_path: Path
) -> None:
    """Without text there is no clip score, whatever is downloaded."""
    settings = replace(
        SETTINGS, metrics=("lpips", "clip"), extractor="inception", clip=str(tmp_path / "no folder")
    )
    with pytest.raises(ValueError, match="does not draw from text; leave clip out"):
        evaluate(
            models[1],
            models[0],
            Request(settings=settings, job=tmp_path / "job", weights=WeightFolder(tmp_path)),
        )


def test_models_that_do_not_belong_together(
    models: tuple[LoopSampler, LoopSampler], sampler: Callable[..., LoopSampler], tmp_path: Path
) -> None:
    for reference, cause in ((models[1], "quantized itself"), (sampler("plain"), "shape")):
        with pytest.raises(ValueError, match=cause):
            evaluate(models[1], reference, Request(settings=SETTINGS, job=tmp_path / "job"))


def test_real_images_of_another_size_are_refused(run: Callable[..., Any], tmp_path: Path) -> None:
    np.savez(tmp_path / "large.npz", images=np.zeros((4, 16, 12, 3), dtype=np.uint8))
    with pytest.raises(ValueError, match="12 x 16 pixels, the drawn ones 8 x 8"):
        run(real=tmp_path / "large.npz")


def test_grey_images_have_features_too(
    tmp_path: Path, models: tuple[LoopSampler, LoopSampler], monkeypatch: pytest.MonkeyPatch
) -> None:
    for model in models:
        inner = model.run
        monkeypatch.setattr(model, "run", lambda *a, inner=inner, **k: inner(*a, **k)[:, :1])
    found = evaluate(models[1], models[0], Request(settings=SETTINGS, job=tmp_path / "job"))
    assert (
        found is not None and found[0].paired is not None and found[0].paired.reference.shape == (5, 8, 8, 3)
    )


def test_the_protocol_tells_all(models: tuple[LoopSampler, LoopSampler], tmp_path: Path, real: Path) -> None:
    found = evaluate(models[1], models[0], Request(settings=SETTINGS, job=tmp_path / "job", real=real))
    assert found is not None
    protocol = json.loads(json.dumps(found[1]))
    assert (
        protocol["settings"]["seed"] == 3
        and protocol["real"]["images"] == 6
        and protocol["tools"]["extractor"]["name"] == "pooled-pixels"
    )
    assert (
        protocol["reference"]["weights"] != protocol["quantized"]["weights"]
        and protocol["versions"]["torch"] == torch.__version__
    )


class Brightness:
    """Says of each image whether its prompt's number is below its mean."""

    attributes = ("bright", "never asked")

    def __call__(self, images: Tensor, prompts: list[str]) -> dict[str, list[bool | None]]:
        means = images.mean((1, 2, 3)).tolist()
        return {
            "bright": [mean > float(prompt) for mean, prompt in zip(means, prompts, strict=True)],
            "never asked": [None] * len(prompts),
        }


class Prompted(LoopSampler):
    def asked(self, indices: range) -> list[str]:
        return ["0.5" if index % 2 else "-1" for index in indices]


def test_adherence_is_the_share_of_images_that_hold(
    models: tuple[LoopSampler, LoopSampler], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(JUDGES, "brightness", Brightness)
    settings = replace(SETTINGS, metrics=("adherence",), judge="brightness")
    full, low = (
        Prompted(model.denoiser, model.scheduler, shape=model.shape, conditions=model.conditions)
        for model in models
    )
    found = evaluate(low, full, Request(settings=settings, job=tmp_path / "job"))
    assert found is not None
    rows = found[0].rows
    assert [(row.metric, row.model, row.against) for row in rows] == [
        ("adherence.bright", FULL, None),
        ("adherence.bright", QUANTIZED, None),
    ]
    for model, row in zip((full, low), rows, strict=True):
        means = draw(model, 7, steps=4, seed=3, batch_size=3).reshape(7, -1).mean(1) / 255
        assert row.value == pytest.approx((4 + (means[1::2] > 0.5).sum()) / 7)
        assert row.deviation is not None and row.deviation > 0.1


def test_adherence_without_words_or_judge_is_refused(
    models: tuple[LoopSampler, LoopSampler], run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="needs a judge"):
        replace(SETTINGS, metrics=("adherence",))
    monkeypatch.setitem(JUDGES, "brightness", Brightness)
    with pytest.raises(ValueError, match="from prompts or from named classes"):
        run(settings=replace(SETTINGS, metrics=("adherence",), judge="brightness"))
