"""The Frechet distance: closed forms, and the library's own value on the same arrays."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tfmq.evaluation.distribution.features import Moments
from tfmq.evaluation.distribution.frechet import Fid, SpatialFid, frechet_distance

fid = pytest.importorskip("torchmetrics.image.fid")
Make = Callable[..., Any]


def moments(values: Tensor) -> tuple[Tensor, Tensor]:
    return values.double().mean(dim=0), values.double().T.cov()


def test_identical_sets_are_at_no_distance(held: Make) -> None:
    assert frechet_distance(held(0), held(0), "pool") == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("shift", "scale"), [(0.0, 1.0), (0.5, 1.0), (0.0, 3.0), (-2.0, 0.25)])
def test_shifted_and_scaled_gaussians_have_the_closed_form(
    held: Make, whitened: Callable[[int, int], Tensor], shift: float, scale: float
) -> None:
    """`N(0, 1)` and `N(m, s^2)` in d dimensions are `d m^2 + d (1 - s)^2` apart."""
    width = 5
    base = whitened(60, width)
    images, others = replace(held(), values=base), replace(held(), values=base * scale + shift)
    expected = width * (shift**2 + (1 - scale) ** 2)
    assert frechet_distance(images, others, "pool") == pytest.approx(expected, abs=1e-8)


def test_it_is_the_librarys_value_on_the_same_arrays(held: Make) -> None:
    class Flat(nn.Module):
        num_features = 12

        def forward(self, images: Tensor) -> Tensor:
            return images.flatten(1).double()

    pictures = [
        torch.randint(0, 256, (30, 3, 2, 2), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
        for seed in (0, 1)
    ]
    own = fid.FrechetInceptionDistance(feature=Flat())
    own.update(pictures[0], real=False)
    own.update(pictures[1], real=True)
    ours = frechet_distance(*(replace(held(), values=images.flatten(1)) for images in pictures), kind="pool")
    assert ours == pytest.approx(float(own.compute()), rel=1e-9)


def test_statistics_stand_for_the_features_they_came_from(held: Make) -> None:
    images, others = held(0), held(1, count=33, shift=0.3)
    stored = Moments({"pool": moments(others.values)})
    assert frechet_distance(images, stored, "pool") == pytest.approx(
        frechet_distance(images, others, "pool"), rel=1e-9
    )


def test_chunks_do_not_matter(held: Make) -> None:
    values = [frechet_distance(held(0, size=size), held(1, size=3 * size), "pool") for size in (1, 7, 40)]
    assert values == pytest.approx([values[0]] * 3, rel=1e-9)


@pytest.mark.parametrize(
    ("others", "cause"),
    [
        (Moments({}), "not pool"),
        (Moments({"spatial": (torch.zeros(6), torch.eye(6))}), "spatial features, not pool"),
        (Moments({"pool": (torch.zeros(5), torch.eye(5))}), "5 features, the extractor gives 6"),
        (Moments({"pool": (torch.zeros(6), torch.eye(5))}), "statistics"),
    ],
)
def test_other_statistics_are_refused(held: Make, others: Moments, cause: str) -> None:
    with pytest.raises(ValueError, match=cause):
        Fid()(held(0), others, seed=0)


def test_one_image_has_no_covariance(held: Make) -> None:
    with pytest.raises(ValueError, match="at least two"):
        Fid()(held(0, count=1), held(1), seed=0)


def test_fid_and_sfid_read_other_features(held: Make) -> None:
    asked: list[str] = []

    class Asked:
        def __init__(self, seed: int) -> None:
            self.inner = held(seed)

        def __len__(self) -> int:
            return len(self.inner)

        def chunks(self, kind: Any) -> Any:
            asked.append(kind)
            return self.inner.chunks(kind)

    assert Fid()(Asked(0), Asked(1), seed=0).keys() == {"fid"} and set(asked) == {"pool"}
    asked.clear()
    assert SpatialFid()(Asked(0), Asked(1), seed=0).keys() == {"sfid"} and set(asked) == {"spatial"}
