"""The digit classifier of the judge: three convolutions on a mask, trained by `training/judge.py`."""

import torch
from torch import Tensor, nn

# Output channels of the three convolutions.
WIDTHS = (12, 24, 48)


class DigitClassifier(nn.Module):
    """Scores `[N, 10]` of the digits for masks `[N, 1, 28, 28]` in [0, 1]."""

    def __init__(self) -> None:
        super().__init__()
        first, second, third = WIDTHS
        self.first = nn.Conv2d(1, first, 5, padding=2)
        self.second = nn.Conv2d(first, second, 3, padding=1)
        self.third = nn.Conv2d(second, third, 3, padding=1)
        self.scores = nn.Linear(third * 9, 10)
        self.dropout = nn.Dropout(0.3)

    def forward(self, masks: Tensor) -> Tensor:
        """Return the scores of each digit."""
        hidden = masks
        for layer in (self.first, self.second, self.third):
            hidden = nn.functional.max_pool2d(torch.relu(layer(hidden)), 2)
        return self.scores(self.dropout(hidden.flatten(1)))
