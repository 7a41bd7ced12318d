"""Estimators of an affine correction: what turns computed values into exact ones, fitted on pairs of both.

Least squares gives the smallest error, and a gain below one wherever the error is noise of its own: it takes
contrast from an image to save a little error. What any of them can remove is the share of the error that the
values explain.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Below this share of a mean square, a variance is rounding.
FLAT = 1e-12


@dataclass(frozen=True)
class Affine:
    """`gain y + bias` for each channel, float64 `[C]` each."""

    gain: Tensor
    bias: Tensor

    def __call__(self, values: Tensor) -> Tensor:
        """Return corrected `values` `[N, C]`."""
        return self.gain.to(values.device) * values + self.bias.to(values.device)


# Fits a correction to computed and exact values, float64 `[N, C]` each.
Estimator = Callable[[Tensor, Tensor], Affine]


def identity(channels: int) -> Affine:
    """Return the correction that changes nothing."""
    return Affine(torch.ones(channels, dtype=torch.float64), torch.zeros(channels, dtype=torch.float64))


def bias(computed: Tensor, exact: Tensor) -> Affine:
    """Return the mean error, taken off."""
    shift = (exact - computed).mean(dim=0)
    return Affine(torch.ones_like(shift), shift)


def gain(computed: Tensor, exact: Tensor) -> Affine:
    """Return the correlated part of the error and its mean, taken off (PTQD; He et al., 2023, section 3.2).

    The error is regressed on the exact values: `computed = (1 + k) exact + b + noise`. With `k` at least 0
    the rest of it keeps its variance.
    """
    slope = (_covariance(computed - exact, exact) / _variance(exact)).clamp(min=0)
    rest = computed.mean(dim=0) - (1 + slope) * exact.mean(dim=0)
    return Affine(1 / (1 + slope), -rest / (1 + slope))


def affine(computed: Tensor, exact: Tensor) -> Affine:
    """Return the least squares fit of the exact values on the computed ones (as TAC-Diffusion does for the
    gain; Yao et al., 2024).
    """
    slope = _covariance(computed, exact) / _variance(computed)
    return Affine(slope, exact.mean(dim=0) - slope * computed.mean(dim=0))


def _covariance(one: Tensor, other: Tensor) -> Tensor:
    return ((one - one.mean(dim=0)) * (other - other.mean(dim=0))).mean(dim=0)


def _variance(values: Tensor) -> Tensor:
    """Return the variance of each channel; infinite where a channel is constant, so that nothing is read into
    it.
    """
    found = values.var(dim=0, correction=0)
    return torch.where(found > FLAT * values.square().mean(dim=0), found, torch.inf)


# The simplest first: of equally good ones the simpler is taken.
ESTIMATORS: dict[str, Estimator] = {"bias": bias, "gain": gain, "affine": affine}
