import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tfmq.numerics.affine import dequantize, fake_quantize, quantize

SEEDS = st.integers(0, 2**31)
LEVELS = st.integers(2, 8).map(lambda bits: 2**bits)
SPREADS = st.sampled_from([1e-4, 0.1, 1.0, 300.0])


def draw(shape: tuple[int, ...], *, seed: int, spread: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * spread


def grid(rows: int, *, levels: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed + 1)
    scale = torch.rand(rows, generator=generator) * 0.2 + 1e-4
    return scale, torch.randint(levels, (rows,), generator=generator)


def gradient(function: object, x: Tensor, upstream: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    function(leaf).backward(upstream)  # type: ignore[operator]
    assert leaf.grad is not None
    return leaf.grad


@given(SEEDS, LEVELS, SPREADS)
def test_one_scale_agrees_bitwise_with_torch_values_and_gradients(
    seed: int, levels: int, spread: float
) -> None:
    x, (scale, zero) = draw((5, 40), seed=seed, spread=spread), grid(1, levels=levels, seed=seed)

    def torch_version(value: Tensor) -> Tensor:
        return torch.fake_quantize_per_tensor_affine(value, float(scale), int(zero), 0, levels - 1)

    def ours(value: Tensor) -> Tensor:
        return fake_quantize(value, scale, zero.float(), levels)

    upstream = draw((5, 40), seed=seed + 2)
    assert torch.equal(ours(x), torch_version(x))
    assert torch.equal(gradient(ours, x, upstream), gradient(torch_version, x, upstream))


@given(SEEDS, LEVELS, SPREADS, st.integers(0, 2))
def test_a_scale_per_channel_agrees_bitwise_with_torch_values_and_gradients(
    seed: int, levels: int, spread: float, axis: int
) -> None:
    shape = (4, 3, 5)
    x, (scale, zero) = draw(shape, seed=seed, spread=spread), grid(shape[axis], levels=levels, seed=seed)
    broadcast = [-1 if i == axis else 1 for i in range(3)]

    def torch_version(value: Tensor) -> Tensor:
        return torch.fake_quantize_per_channel_affine(value, scale, zero.to(torch.int32), axis, 0, levels - 1)

    def ours(value: Tensor) -> Tensor:
        return fake_quantize(value, scale.view(broadcast), zero.float().view(broadcast), levels)

    upstream = draw(shape, seed=seed + 2)
    assert torch.equal(ours(x), torch_version(x))
    assert torch.equal(gradient(ours, x, upstream), gradient(torch_version, x, upstream))


@given(SEEDS, LEVELS)
def test_fake_quantization_is_quantize_then_dequantize_with_and_without_gradients(
    seed: int, levels: int
) -> None:
    x, (scale, zero) = draw((64,), seed=seed), grid(1, levels=levels, seed=seed)
    codes = quantize(x, scale, zero.float(), levels)
    assert torch.equal(codes, codes.round())
    assert codes.min() >= 0 and codes.max() <= levels - 1
    expected = dequantize(codes.to(torch.uint8), scale, zero.float())
    assert torch.equal(fake_quantize(x, scale, zero.float(), levels), expected)
    assert torch.equal(
        fake_quantize(x.clone().requires_grad_(), scale, zero.float(), levels).detach(), expected
    )


def test_halves_round_to_even() -> None:
    x = torch.tensor([-1.5, -0.5, 0.5, 1.5, 2.5])
    assert quantize(x, torch.tensor(1.0), torch.tensor(8.0), 16).tolist() == [6.0, 8.0, 8.0, 10.0, 10.0]
    for leaf in (x, x.clone().requires_grad_()):
        assert fake_quantize(leaf, torch.tensor(1.0), torch.tensor(8.0), 16).tolist() == [
            -2.0,
            0.0,
            0.0,
            2.0,
            2.0,
        ]


@pytest.mark.parametrize("wants_gradient", [False, True])
def test_the_operands_are_left_alone(wants_gradient: bool) -> None:
    x = torch.linspace(-3, 3, 7).requires_grad_(wants_gradient)
    scale, zero = torch.tensor(0.5), torch.tensor(3.0)
    before = x.detach().clone()
    fake_quantize(x, scale, zero, 8)
    assert torch.equal(x.detach(), before)
    assert (float(scale), float(zero)) == (0.5, 3.0)


def test_a_frozen_graph_costs_no_gradient() -> None:
    x = torch.ones(3, requires_grad=True)
    with torch.no_grad():
        assert not fake_quantize(x, torch.tensor(0.5), torch.tensor(0.0), 8).requires_grad
    assert fake_quantize(x, torch.tensor(0.5), torch.tensor(0.0), 8).requires_grad
