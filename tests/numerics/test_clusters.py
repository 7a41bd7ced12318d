"""Channels of alike ranges are found, whatever their order and at whatever timestep they stand out."""

import pytest
import torch

from tfmq.numerics.clusters import clusters


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_interleaved_populations_are_told_apart(scale: float) -> None:
    """Channels of ranges 1, 4 and 16, one after the other, within a tenth of each."""
    size = torch.tensor([1.0, 16.0, 4.0]).repeat(8) * (1 + 0.1 * torch.rand(24)) * scale
    order, widths = clusters(-size[None], 0.5 * size[None], 3)
    assert widths == (8, 8, 8)
    found = [sorted(part.tolist()) for part in order.split(widths)]
    assert found == [list(range(start, 24, 3)) for start in (0, 2, 1)]


def test_a_channel_that_is_large_at_one_timestep_alone_is_found() -> None:
    """In its own timestep it is large beside the others, though smaller than all are at the next one."""
    size = torch.ones(2, 12)
    size[0, 5], size[1] = 10.0, 100.0
    order, widths = clusters(-size, size, 2)
    assert widths == (11, 1) and order[-1] == 5


def test_the_side_of_zero_counts() -> None:
    low, high = torch.zeros(1, 8), torch.zeros(1, 8)
    low[0, ::2], high[0, 1::2] = -1.0, 1.0
    order, widths = clusters(low, high, 2)
    assert widths == (4, 4) and {tuple(part.tolist()) for part in order.split(widths)} == {
        (0, 2, 4, 6),
        (1, 3, 5, 7),
    }


def test_fewer_kinds_than_clusters_make_fewer_clusters() -> None:
    size = torch.tensor([[1.0, 1.0, 8.0, 1.0, 8.0, 8.0]])
    order, widths = clusters(-size, size, 4)
    assert sum(widths) == 6 and sorted(order.tolist()) == list(range(6)) and len(widths) <= 4
    alike, whole = clusters(-torch.ones(2, 6), torch.ones(2, 6), 3)
    assert whole == (6,) and alike.tolist() == list(range(6))
    # Channels that are always zero have no range, and no scale comes of them.
    assert sum(clusters(torch.zeros(2, 6), torch.zeros(2, 6), 2)[1]) == 6
