"""How far quantized temporal features are from the full-precision ones, and whose timestep they look like."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tfmq.numerics.errors import cosine, relative_error


@dataclass(frozen=True)
class Disturbance:
    """Per feature and timestep, each `[S]`: relative error, cosine, and the index of the full-precision
    timestep that is nearest.
    """

    timesteps: Tensor
    relative_error: Mapping[str, Tensor]
    cosine: Mapping[str, Tensor]
    nearest: Mapping[str, Tensor]

    @property
    def max_relative_error(self) -> float:
        """Largest relative error over features and timesteps; 0 where there is no feature."""
        return max((float(error.max()) for error in self.relative_error.values()), default=0.0)

    @property
    def mean_relative_error(self) -> float:
        """Mean relative error over features and timesteps."""
        errors = [error.mean() for error in self.relative_error.values()]
        return float(torch.stack(errors).mean()) if errors else 0.0

    @property
    def mismatches(self) -> int:
        """Number of quantized features that are nearest to another timestep's feature (temporal information
        mismatch).
        """
        own = torch.arange(len(self.timesteps))
        return sum(int((index.cpu() != own).sum()) for index in self.nearest.values())


def disturbance(
    timesteps: Tensor, reference: Mapping[str, Tensor], quantized: Mapping[str, Tensor]
) -> Disturbance:
    """Compare features `[S, d]` by name, as TFMQ-DM (Huang et al., 2024, figure 3) does for one of them."""
    nearest = {
        name: torch.cdist(quantized[name].double(), value.double()).argmin(dim=1)
        for name, value in reference.items()
    }
    # Equal full-precision features at two timesteps are no mismatch.
    for name, index in nearest.items():
        same = (reference[name][index] == reference[name]).all(dim=1)
        nearest[name] = torch.where(same, torch.arange(len(timesteps), device=index.device), index)
    return Disturbance(
        timesteps,
        {name: relative_error(value, quantized[name]) for name, value in reference.items()},
        {name: cosine(value, quantized[name]) for name, value in reference.items()},
        nearest,
    )
