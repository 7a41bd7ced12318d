"""Rescaled products, in float64 and to the bit."""

import pytest
import torch
from torch import Tensor, nn

from tfmq.kernels.kernel import channels
from tfmq.nn.operation import operation_of, weight_of
from tfmq.numerics.equivalence import EQUALIZERS, Extremes, by_row, columns, power_of_two

LAYERS = {
    "linear": nn.Linear(6, 4),
    "convolution": nn.Conv2d(6, 4, 3, padding=1),
    "groups": nn.Conv2d(6, 4, 3, padding=1, groups=2),
    "depthwise": nn.Conv1d(6, 6, 3, groups=6),
    "transposed": nn.ConvTranspose2d(6, 4, 2, stride=2, groups=2),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_rescaled_product_is_the_product_to_the_bit(name: str) -> None:
    """Powers of two scale every term, input and weight, without rounding."""
    layer = LAYERS[name]
    operation = operation_of(layer)
    assert operation is not None
    shape = (2, 5, 6) if name == "linear" else (2, 6, 8) if name == "depthwise" else (2, 6, 8, 8)
    x, rows = torch.randn(shape), weight_of(layer)
    factor = torch.exp2(torch.tensor([-3.0, 0.0, 2.0, 1.0, -1.0, 5.0]))
    scaled = x * channels(factor, operation, x.ndim)
    found = operation(scaled, rows / by_row(factor, rows, operation.groups), layer.bias)
    assert torch.equal(found, operation(x, rows, layer.bias))


def test_weights_are_seen_by_input_channel() -> None:
    weight = torch.zeros(4, 3, 2)
    weight[1, 2, 1], weight[3, 0, 0] = -5.0, 7.0
    found = columns(weight, 2)
    assert (
        (found[2], found[3]) == (5.0, 7.0)
        and bool((found > 0).all())
        and float(found.min()) == pytest.approx(7e-4)
    )


def test_powers_of_two_are_the_nearest() -> None:
    assert power_of_two(torch.tensor([1.0, 1.5, 3.0, 0.3, 64.0])).tolist() == [1.0, 2.0, 4.0, 0.25, 64.0]


@pytest.mark.parametrize("name", EQUALIZERS)
@pytest.mark.parametrize(
    "high",
    [torch.zeros(3, 4), torch.tensor([[0.0, 1e-30, 1.0, 1e30]]).expand(3, -1)],
    ids=["nothing", "everything"],
)
def test_factors_are_positive_and_finite(name: str, high: Tensor) -> None:
    for factor in EQUALIZERS[name](Extremes(-high, high), torch.tensor([1.0, 2.0, 1e-3, 4.0])):
        snapped = power_of_two(factor)
        assert bool((snapped.isfinite() & (snapped > 0)).all())


def test_peaks_weigh_timesteps_by_their_size() -> None:
    """A channel that stands out tenfold at one of two timesteps, where its peak is ten times as large, counts
    nearly as if it always did.
    """
    high = torch.tensor([[1.0, 10.0], [1.0, 1.0]])
    found = next(EQUALIZERS["peaks"](Extremes(-high, high), torch.ones(2)))
    assert found.tolist() == pytest.approx([1.0, 1 / ((10 * 10 + 1 * 1) / 11)])


def test_ranges_even_out_inputs_alone_or_with_the_weights() -> None:
    high = torch.tensor([[1.0, 4.0], [16.0, 2.0]])
    found = list(EQUALIZERS["ranges"](Extremes(-high, high), torch.tensor([1.0, 4.0])))
    assert found[-1].tolist() == pytest.approx([0.5, 2.0])
    # sqrt(w / a), its geometric mean one.
    assert found[2].tolist() == pytest.approx([0.5, 2.0])
