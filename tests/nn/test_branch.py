"""A branch beside a layer: the same layer in full precision, whole or in the layer's own codes."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from tfmq.calibration.splitting import branch_of
from tfmq.export.fake_quantize import FakeQuantizeKernel
from tfmq.kernels.reference import ReferenceKernel
from tfmq.nn.branch import BRANCH_TYPES, BranchType
from tfmq.nn.layer import CalibratedLayer, pack
from tfmq.nn.operation import operation_of, weight_of
from tfmq.nn.packed_layer import KernelExecution, PackedLayer
from tfmq.nn.transform import Transform
from tfmq.numerics.grids import IntegerFormat
from tfmq.numerics.low_rank import LowRank, truncated
from tfmq.quantizers.activation import ActivationQuantizer
from tfmq.quantizers.weight import fit_grid

IMAGE, SEGMENTS = (2, 8, 6, 6), {"concatenated": (3, 5)}
CASES: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(8, 12), (2, 5, 8)),
    "no bias": (nn.Linear(8, 12, bias=False), (2, 8)),
    "concatenated": (nn.Linear(8, 12), (2, 5, 8)),
    "convolution": (nn.Conv2d(8, 12, 3, padding=1, stride=2), IMAGE),
    "groups": (nn.Conv2d(8, 12, 3, padding=1, groups=2), IMAGE),
    "transposed": (nn.ConvTranspose2d(8, 12, 2, stride=2), IMAGE),
    "transposed groups": (nn.ConvTranspose2d(8, 12, 3, stride=2, groups=2), IMAGE),
    "volume": (nn.Conv3d(4, 6, 3, padding=1), (1, 4, 4, 4, 4)),
}


def split(name: str, dtype: BranchType, rank: int = 2) -> tuple[CalibratedLayer, Tensor, Tensor]:
    """Return a layer with a branch, an input, and what the stock layer makes of it."""
    source, shape = CASES[name]
    operation, segments = operation_of(source), SEGMENTS.get(name, ())
    assert operation is not None
    quantizer = ActivationQuantizer(IntegerFormat(8), segments=segments, axis=operation.channel_axis)
    groups = quantizer.scale.shape[1]
    quantizer.fit(torch.linspace(0.02, 0.05, groups)[None], torch.full((1, groups), 120.0))
    grid = fit_grid(weight_of(source).detach(), IntegerFormat(4), segments=segments)
    layer, x = CalibratedLayer(source, operation, grid, quantizer), torch.randn(shape)
    matrix = layer.weight.flatten(1).unflatten(0, (operation.groups, -1))
    layer.split(branch_of(layer, truncated(matrix, None, rank), dtype), ranges="search")
    return layer, x, source(x)


@torch.no_grad()
@pytest.mark.parametrize("dtype", BRANCH_TYPES)
@pytest.mark.parametrize("name", CASES)
def test_a_split_layer_is_the_layer(name: str, dtype: BranchType) -> None:
    layer, x, expected = split(name, dtype)
    assert layer.branch is not None
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    source = CASES[name][0]
    whole = layer.weight + layer.branch.product()
    torch.testing.assert_close(whole, weight_of(source), rtol=0, atol=1e-6)
    layer.weight_precision = layer.input_precision = "quantized"
    packed = pack(layer)
    assert torch.equal(packed(x), layer(x))
    torch.testing.assert_close(packed.rows(source.weight), layer.weight)
    torch.testing.assert_close(packed.stock_weight, source.weight, rtol=0, atol=0.05)
    # The branch carries what the codes lack: without it the output is another one.
    with_branch = packed(x)
    packed.branch = None
    assert not torch.allclose(packed(x), with_branch, atol=0.05)


def kernels(packed: PackedLayer) -> list[object]:
    weight = packed.integer_weight()
    assert packed.input_quantizer is not None
    zero_points = packed.input_quantizer.zero_points()
    return [ReferenceKernel(weight, 256), FakeQuantizeKernel(weight, zero_points)]


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["float16", "int8", "int8_weight_only"])
@pytest.mark.parametrize("name", CASES)
def test_kernels_compute_the_branch_with_the_weight(name: str, dtype: BranchType) -> None:
    """With codes of its own the branch has rows behind those of the weight, else it stands beside."""
    layer, x, _ = split(name, dtype)
    layer.weight_precision = layer.input_precision = "quantized"
    packed = pack(layer)
    expected = packed(x)
    for kernel in kernels(packed):
        packed.execute(KernelExecution(kernel))
        torch.testing.assert_close(packed(x), expected, rtol=1e-4, atol=1e-5)
    rows = len(packed.integer_weight().values)
    assert rows == 12 + 2 * layer.operation.groups * (dtype == "int8") or name == "volume"


@torch.no_grad()
def test_with_all_of_the_rank_nothing_is_left_to_codes() -> None:
    layer, x, expected = split("linear", "float32", rank=8)
    assert float(layer.weight.abs().max()) < 1e-6
    layer.weight_precision = layer.input_precision = "quantized"
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_branch_keeps_its_dtype_and_moves() -> None:
    layer, _, _ = split("linear", "float16")
    packed = pack(layer)
    assert packed.branch is not None
    before = packed.branch.down.clone()
    assert packed.double().branch is packed.branch and packed.branch.down.dtype == torch.float16
    assert torch.equal(packed.branch.down, before)
    assert {"branch.down", "branch.up"} <= packed.state_dict().keys()


@torch.no_grad()
def test_rescaled_inputs_reach_the_branch() -> None:
    """SVDQuant's order: the input is rescaled, then read by both."""
    source, x = nn.Linear(8, 12), torch.randn(3, 8)
    operation = operation_of(source)
    assert operation is not None
    layer = CalibratedLayer(source, operation, fit_grid(source.weight.detach(), IntegerFormat(4)), None)
    layer.transform(Transform(torch.exp2((torch.arange(8) % 3).float()), 4), ranges="search")
    factors = truncated(layer.weight[None], None, 2)
    layer.split(branch_of(layer, LowRank(factors.up, factors.down), "float32"), ranges="search")
    torch.testing.assert_close(layer(x), source(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(pack(layer).rows(source.weight), layer.weight)


def test_integers_of_a_joined_weight_keep_its_bias() -> None:
    layer, _, _ = split("groups", "int8")
    packed = pack(layer)
    joined, own = packed.integer_weight(), replace(packed.integer_weight())
    assert packed.branch is not None and joined.bias is not None
    assert joined.bias.unflatten(0, (2, -1))[:, :6].flatten().tolist() == packed.bias.tolist()  # type: ignore[union-attr]
    assert bool((joined.bias.unflatten(0, (2, -1))[:, 6:] == 0).all()) and own.narrow
