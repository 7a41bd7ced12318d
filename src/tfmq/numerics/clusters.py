"""Channels of alike ranges: what lets a few grids serve an input whose channels differ (DGQ, Ryu et al.,
2025, section 3.2).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

# Rounds of k-means; a few hundred channels settle after a dozen.
ROUNDS = 50


def clusters(low: Tensor, high: Tensor, count: int) -> tuple[Tensor, tuple[int, ...]]:
    """Part channels with extremes `[S, C]`, by timestep, into at most `count` clusters.

    k-means on the extremes of all timesteps, each timestep's in units of its largest magnitude. Nothing is
    drawn: of two starts the one is kept that ends with less error.

    Returns:
        The channels cluster by cluster, int64 `[C]`, those of the least ranges first, and how many each
        cluster has.
    """
    unit = torch.maximum(-low, high).amax(dim=1, keepdim=True).clamp(min=torch.finfo(low.dtype).tiny)
    points = torch.cat([low / unit, high / unit]).T.double()
    width = ((high - low) / unit).double().sum(dim=0)
    ends = [_settled(points, centres) for centres in _starts(points, width, count)]
    nearest, _ = min(ends, key=lambda end: float(end[1]))
    members = [channels for k in range(count) if len(channels := (nearest == k).nonzero()[:, 0])]
    members.sort(key=lambda channels: float(width[channels].mean()))
    return torch.cat(members), tuple(map(len, members))


def _starts(points: Tensor, width: Tensor, count: int) -> Iterator[Tensor]:
    """Yield centres to start from: points at evenly spaced ranks of their width, and, from the narrowest on,
    always the one that is farthest from those taken, which finds the few that stand out.
    """
    ranks = torch.linspace(0, len(points) - 1, 2 * count + 1)[1::2].round().long()
    yield points[width.argsort(stable=True)[ranks]]
    taken = [int(width.argmin())]
    while len(taken) < count:
        taken.append(int(torch.cdist(points, points[taken]).amin(dim=1).argmax()))
    yield points[taken]


def _settled(points: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """Return the number of the centre that each point ends at, and the sum of squared distances."""
    for _ in range(ROUNDS):
        nearest = torch.cdist(points, centres).argmin(dim=1)
        parts = [points[nearest == k] for k in range(len(centres))]
        # A centre that has lost its points stays where it was.
        moved = torch.stack(
            [part.mean(dim=0) if len(part) else centre for part, centre in zip(parts, centres, strict=True)]
        )
        if torch.equal(moved, centres):
            break
        centres = moved
    distances = torch.cdist(points, centres)
    return distances.argmin(dim=1), distances.amin(dim=1).square().sum()
