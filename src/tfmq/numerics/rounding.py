"""Learned rounding (AdaRound; Nagel et al., 2020): `floor(w / s) + h(V)` with a rectified sigmoid `h`."""

import torch
from torch import Tensor

# Ends of the stretched sigmoid, in codes. Outside of [0, 1] they let a fraction become exactly 0 or 1.
GAMMA, ZETA = -0.1, 1.1


def rectified_sigmoid(logits: Tensor) -> Tensor:
    """Return `h(V) = clamp(sigmoid(V) * (zeta - gamma) + gamma, 0, 1)` (AdaRound, equation 23)."""
    return (torch.sigmoid(logits) * (ZETA - GAMMA) + GAMMA).clamp(0.0, 1.0)


def rounding_logits(fraction: Tensor) -> Tensor:
    """Return the `V` with `h(V) = fraction`, for fractions in `[0, 1)`."""
    return -torch.log((ZETA - GAMMA) / (fraction - GAMMA) - 1.0)


def rounding_penalty(soft: Tensor, beta: float) -> Tensor:
    """Return `sum(1 - |2 h(V) - 1|**beta)` of the soft roundings `h(V)` (AdaRound, equation 24): zero when
    all of them are 0 or 1.
    """
    return (1.0 - (2.0 * soft - 1.0).abs().pow(beta)).sum()


def annealed_beta(
    iteration: int, iterations: int, *, start: float, end: float, warmup: float
) -> float | None:
    """Return beta at `iteration`: None during the warm-up share, then linear from `start` to `end`."""
    first = warmup * iterations
    if iteration < first:
        return None
    remaining = 1.0 - (iteration - first) / max(1.0, iterations - first)
    return end + (start - end) * max(0.0, remaining)
