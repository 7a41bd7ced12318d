"""Factors of a weight, against torch's singular value decomposition, and on planted weights."""

from math import sqrt

import pytest
import torch
from torch import Tensor

from tfmq.numerics.low_rank import LowRank, second_moments, truncated

SHAPES = [(12, 20), (20, 12), (9, 9)]


def moments(columns: int) -> Tensor:
    """Second moments of inputs whose channels differ and go together."""
    mixed = torch.randn(2, 300, columns, dtype=torch.float64) @ torch.randn(
        columns, columns, dtype=torch.float64
    )
    return second_moments(mixed * torch.logspace(-1, 1, columns, dtype=torch.float64))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 5])
def test_a_plain_split_is_torchs_truncated_svd(shape: tuple[int, int], rank: int) -> None:
    weight = torch.randn(2, *shape, dtype=torch.float64)
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    expected = left[:, :, :rank] * values[:, None, :rank] @ right[:, :rank]
    found = truncated(weight, None, rank)
    torch.testing.assert_close(found.product, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.up.abs().amax(dim=1), found.down.abs().amax(dim=2))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 5])
def test_a_weighted_split_is_the_svd_of_the_weighted_weight(shape: tuple[int, int], rank: int) -> None:
    weight, weighing = torch.randn(2, *shape, dtype=torch.float64), moments(shape[1])
    # Another root than Cholesky's: the symmetric one.
    energies, axes = torch.linalg.eigh(weighing)
    root = axes * energies.sqrt()[:, None, :] @ axes.mT
    left, values, right = torch.linalg.svd(weight @ root, full_matrices=False)
    expected = (left[:, :, :rank] * values[:, None, :rank] @ right[:, :rank]) @ torch.linalg.inv(root)
    found = truncated(weight, weighing, rank)
    torch.testing.assert_close(found.product, expected, rtol=1e-6, atol=1e-6)

    def error(factors: LowRank) -> Tensor:
        rest = weight - factors.product
        return ((rest @ weighing) * rest).sum(dim=(1, 2))

    # Eckart and Young: what is left is the energy of the other singular values.
    torch.testing.assert_close(error(found), values[:, rank:].square().sum(dim=1))
    assert bool((error(found) <= error(truncated(weight, None, rank)) * (1 + 1e-9)).all())


def test_all_of_the_rank_leaves_nothing() -> None:
    weight = torch.randn(1, 6, 10, dtype=torch.float64)
    for weighing in (None, moments(10)[:1]):
        torch.testing.assert_close(truncated(weight, weighing, 6).product, weight, rtol=1e-9, atol=1e-9)


def test_a_planted_direction_is_taken_out_of_the_range() -> None:
    """Signs times 16 in rank one, beside a rest of size 1: the range falls from 17 to little above 1.

    The found direction is off by what the rest has along it: each row's share of it is a mean of 256 values
    of variance 1/3, each column's one of 64. Four standard deviations of the latter are 0.29. More rank takes
    little more.
    """
    planted = torch.randn(1, 64, 1).sign() @ torch.randn(1, 1, 256).sign()
    weight = (16 * planted + 2 * torch.rand(1, 64, 256) - 1).double()
    one, eight = (float((weight - truncated(weight, None, rank).product).abs().max()) for rank in (1, 8))
    assert float(weight.abs().max()) > 16.9 and one < 1 + 4 / sqrt(3 * 64)
    assert one / 1.3 < eight < one * 1.3
