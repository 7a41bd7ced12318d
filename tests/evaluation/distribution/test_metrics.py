"""Every registered metric of distributions, and what is particular to some."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from tfmq.evaluation.distribution.features import Moments
from tfmq.evaluation.distribution.frechet import Fid
from tfmq.evaluation.distribution.inception_score import InceptionScore
from tfmq.evaluation.distribution.kernel import Kid
from tfmq.evaluation.distribution.manifold import PrecisionRecall
from tfmq.evaluation.distribution.metric import register_metric
from tfmq.evaluation.distribution.metrics import SET_METRICS
from tfmq.storage.errors import ForeignFileError

pytest.importorskip("torchmetrics")
Make = Callable[..., Any]
NEEDS = {"precision-recall": "torch_fidelity"}


def metric_of(name: str) -> Any:
    if name in NEEDS:
        pytest.importorskip(NEEDS[name], reason=f"{NEEDS[name]} is not installed (pip install 'tfmq[eval]')")
    return SET_METRICS[name]


@pytest.mark.parametrize("name", SET_METRICS)
def test_values_do_not_depend_on_chunks_and_follow_from_the_seed(held: Make, name: str) -> None:
    metric = metric_of(name)
    before = torch.random.get_rng_state()
    values = [
        metric(
            held(0, count=60, size=size), held(1, count=50, size=size) if metric.compares else None, seed=seed
        )
        for size, seed in ((60, 3), (9, 3), (60, 3))
    ]
    assert torch.equal(torch.random.get_rng_state(), before)
    for other in values[1:]:
        assert {key: score.value for key, score in other.items()} == pytest.approx(
            {key: score.value for key, score in values[0].items()}, rel=1e-5
        )


@pytest.mark.parametrize("name", [name for name, metric in SET_METRICS.items() if metric.compares])
def test_farther_sets_are_worse(held: Make, name: str) -> None:
    metric = metric_of(name)
    near, far = (metric(held(0, count=50), held(1, count=50, shift=shift), seed=0) for shift in (0.1, 3.0))
    for key in near:
        better = (
            near[key].value > far[key].value
            if key in ("precision", "recall")
            else near[key].value < far[key].value
        )
        assert better, (key, near, far)


@pytest.mark.parametrize("name", [name for name, metric in SET_METRICS.items() if metric.compares])
def test_too_few_images_are_named(held: Make, name: str) -> None:
    with pytest.raises(ValueError, match=r"more|at least"):
        metric_of(name)(held(0, count=1), held(1, count=1), seed=0)


def test_statistics_are_taken_where_a_metric_says_so(held: Make) -> None:
    for name, metric in SET_METRICS.items():
        assert not metric.of_moments or metric.compares, name
        if metric.of_moments:
            values = metric(held(0), Moments({metric.kind: (torch.zeros(6), torch.eye(6))}), seed=0)
            assert values[name].value > 0


@pytest.mark.parametrize(
    "name", [name for name, metric in SET_METRICS.items() if metric.compares and not metric.of_moments]
)
def test_statistics_are_not_enough(held: Make, name: str) -> None:
    with pytest.raises(ForeignFileError, match=f"{name} needs images"):
        SET_METRICS[name](held(0), Moments({"pool": (torch.zeros(6), torch.eye(6))}), seed=0)


def test_kid_is_the_librarys_value_on_the_same_arrays(held: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchmetrics.image.kid import poly_mmd

    images, others = held(0, count=30), held(1, count=30, shift=0.5)
    score = Kid()(images, others, seed=0)["kid"]
    assert (
        score.value == pytest.approx(float(poly_mmd(others.values, images.values)), rel=1e-4)
        and score.deviation is None
    )
    monkeypatch.setattr("tfmq.evaluation.distribution.kernel.SUBSET", 10)
    subsets = Kid()(images, others, seed=0)["kid"]
    assert subsets.deviation is not None and subsets.deviation > 0
    assert abs(subsets.value - score.value) < 3 * subsets.deviation


def test_the_inception_score_is_its_formula_on_the_same_arrays(held: Make) -> None:
    scores = held(0, count=40)
    probabilities = scores.values.double()[permuted(40)].softmax(dim=1).numpy()
    parts = [
        np.exp((part * (np.log(part) - np.log(part.mean(axis=0)))).sum(axis=1).mean())
        for part in np.split(probabilities, 10)
    ]
    found = InceptionScore()(scores, None, seed=0)["is"]
    assert found.value == pytest.approx(np.mean(parts)) and found.deviation == pytest.approx(
        np.std(parts, ddof=1)
    )


def test_torch_fidelity_finds_the_same_inception_score_on_the_same_arrays(held: Make) -> None:
    """Another implementation than the one that computes; it takes the deviation of all splits, not of a
    sample of them.
    """
    library = pytest.importorskip(
        "torch_fidelity.metric_isc", reason="torch_fidelity is not installed (pip install 'tfmq[eval]')"
    )
    scores = held(0, count=200)
    expected = library.isc_features_to_metric(scores.values[permuted(200)], splits=10, shuffle=False)
    found = InceptionScore()(scores, None, seed=0)["is"]
    assert found.value == pytest.approx(expected["inception_score_mean"], rel=1e-6)
    assert found.deviation == pytest.approx(expected["inception_score_std"] * (10 / 9) ** 0.5, rel=1e-6)


def permuted(count: int) -> torch.Tensor:
    """Return the order in which the images of a seed, 0, are split."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return torch.randperm(count)


def test_torch_fidelity_finds_the_same_values_on_the_same_arrays(held: Make) -> None:
    """Another implementation than the one that computes: of FID, and of KID where each subset is the whole
    set.
    """
    fid = pytest.importorskip(
        "torch_fidelity.metric_fid", reason="torch_fidelity is not installed (pip install 'tfmq[eval]')"
    )
    kid = pytest.importorskip(
        "torch_fidelity.metric_kid", reason="torch_fidelity is not installed (pip install 'tfmq[eval]')"
    )
    images, others = held(0, count=50), held(1, count=50, shift=0.5)
    a, b = images.values.double(), others.values.double()
    expected = fid.fid_statistics_to_metric(
        *(fid.fid_features_to_statistics(values) for values in (a, b)), False
    )["frechet_inception_distance"]
    assert Fid()(images, others, seed=0)["fid"].value == pytest.approx(float(expected), rel=1e-5)
    whole = {"kid_subsets": 1, "kid_subset_size": 50, "verbose": False}
    expected = kid.kid_features_to_metric(a, b, **whole)["kernel_inception_distance_mean"]
    assert Kid()(images, others, seed=0)["kid"].value == pytest.approx(float(expected), rel=1e-3)


def test_identical_images_have_the_inception_score_one(held: Make) -> None:
    same = held(0, count=40)
    same.values.copy_(same.values[0].clone().expand_as(same.values))
    assert InceptionScore()(same, None, seed=0)["is"].value == pytest.approx(1)


def test_sure_and_varied_images_reach_the_number_of_classes(held: Make) -> None:
    """With two classes, each sure and as many of each as the splits leave, the score is near 2 and never
    above.
    """
    sure = held(0, count=2000, width=2)
    sure.values.copy_(1000 * torch.eye(2)[torch.arange(2000) % 2])
    assert 1.98 < InceptionScore()(sure, None, seed=0)["is"].value <= 2
    with pytest.raises(ValueError, match="at least 20"):
        InceptionScore()(held(0, count=19), None, seed=0)


def test_precision_and_recall_of_known_sets(held: Make) -> None:
    library = pytest.importorskip(
        "torch_fidelity.metric_prc", reason="torch_fidelity is not installed (pip install 'tfmq[eval]')"
    )
    same = PrecisionRecall()(held(0), held(0), seed=0)
    assert (same["precision"].value, same["recall"].value) == (1, 1)
    apart = PrecisionRecall()(held(0), held(1, shift=1000.0), seed=0)
    assert (apart["precision"].value, apart["recall"].value) == (0, 0)
    # Images of one tight spot inside the real ones: all of them precise, most real ones out of reach.
    tight = held(0)
    tight.values.mul_(0.01)
    found = PrecisionRecall()(tight, held(1), seed=0)
    assert found["precision"].value == 1 and found["recall"].value < 0.2
    own = library.calculate_precision_recall_full(held(2).values, held(3).values)
    ours = PrecisionRecall()(held(2), held(3), seed=0)
    assert (ours["precision"].value, ours["recall"].value) == pytest.approx(own)


def test_a_name_is_registered_once() -> None:
    with pytest.raises(ValueError, match="fid is registered already"):
        register_metric("fid")(Kid)
