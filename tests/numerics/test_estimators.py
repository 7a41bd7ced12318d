"""Estimators against planted corrections, in float64."""

import pytest
import torch
from torch import Tensor

from tfmq.numerics.estimators import ESTIMATORS, Affine, affine, bias, gain

SIZE = 20_000


def values(seed: int, channels: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(SIZE, channels, generator=generator, dtype=torch.float64) * torch.tensor(
        [0.5, 1.0, 3.0]
    ) + torch.tensor([0.0, -1.0, 2.0])


def test_a_planted_bias_is_taken_off() -> None:
    exact, planted = values(0), torch.tensor([0.3, 0.0, -2.0], dtype=torch.float64)
    torch.testing.assert_close(bias(exact + planted, exact)(exact + planted), exact, rtol=0, atol=1e-12)


# `bias` fits no gain.
@pytest.mark.parametrize("name", [name for name in ESTIMATORS if name != "bias"])
def test_a_planted_gain_and_bias_are_taken_off(name: str) -> None:
    exact = values(1)
    planted = Affine(
        torch.tensor([1.2, 1.0, 1.05], dtype=torch.float64),
        torch.tensor([0.1, -0.2, 0.0], dtype=torch.float64),
    )
    computed = planted(exact)
    torch.testing.assert_close(ESTIMATORS[name](computed, exact)(computed), exact, rtol=0, atol=1e-10)


def test_least_squares_shrinks_noise_by_wieners_gain_and_the_published_gain_does_not() -> None:
    """At 20 dB of independent noise least squares has the gain 1 / 1.01, and takes one hundredth of the error
    away.
    """
    exact = values(2)
    noise = torch.randn(exact.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    computed = exact + 0.1 * exact.std(dim=0) * noise
    torch.testing.assert_close(
        affine(computed, exact).gain, torch.full((3,), 1 / 1.01, dtype=torch.float64), rtol=0, atol=2e-3
    )
    before, after = (
        float(((found - exact) / exact.std(dim=0)).square().mean())
        for found in (computed, affine(computed, exact)(computed))
    )
    assert after / before == pytest.approx(1 / 1.01, abs=2e-3)
    torch.testing.assert_close(
        gain(computed, exact).gain, torch.ones(3, dtype=torch.float64), rtol=0, atol=5e-3
    )


def test_gain_never_amplifies() -> None:
    """PTQD's correlation is not negative: a computed value that is too small stays as large as it is."""
    exact = values(4)
    torch.testing.assert_close(gain(0.8 * exact, exact).gain, torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_constant_channel_has_a_bias_alone(name: str) -> None:
    exact = torch.full((8, 2), 0.5, dtype=torch.float64)
    found = ESTIMATORS[name](exact + 0.25, exact)(exact + 0.25)
    assert bool(found.isfinite().all())
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-9)
