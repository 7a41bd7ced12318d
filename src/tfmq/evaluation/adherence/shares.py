"""How many pictures show what they were asked to show, with the interval that so many pictures give."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

# The standard normal distribution has 95 % of its mass within this distance of zero.
QUANTILE = 1.959964
# A verdict as a number, where nothing was asked.
UNASKED = -1


@dataclass(frozen=True)
class Share:
    """Pictures that hold an attribute, of those asked for it."""

    held: int
    asked: int

    @property
    def value(self) -> float:
        """The share itself."""
        return self.held / self.asked

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval (Wilson, 1927), which stays inside [0, 1] and does not close at either end.

        >>> [round(bound, 4) for bound in Share(450, 500).interval]
        [0.8706, 0.9233]
        """
        squared = QUANTILE**2
        middle = (self.held + squared / 2) / (self.asked + squared)
        half = (
            QUANTILE
            / (self.asked + squared)
            * sqrt(self.held * (self.asked - self.held) / self.asked + squared / 4)
        )
        return middle - half, middle + half


def encoded(verdicts: Mapping[str, list[bool | None]]) -> dict[str, Tensor]:
    """Return verdicts as int8 tensors: 1 holds, 0 does not, -1 was not asked."""
    return {
        name: torch.tensor([UNASKED if v is None else int(v) for v in values], dtype=torch.int8)
        for name, values in verdicts.items()
    }


def share(verdicts: Tensor) -> Share | None:
    """Return the share of encoded verdicts `[N]`; None where no picture was asked for the attribute."""
    asked = int((verdicts != UNASKED).sum())
    return Share(int((verdicts == 1).sum()), asked) if asked else None
