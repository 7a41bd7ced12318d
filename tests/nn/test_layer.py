import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tfmq.nn.layer import CalibratedLayer, pack
from tfmq.nn.operation import operation_of, weight_of
from tfmq.nn.packed_layer import PackedLayer
from tfmq.numerics.grids import IntegerFormat
from tfmq.quantizers.activation import ActivationQuantizer
from tfmq.quantizers.weight import AdaptiveRounding, fit_grid

FORMATS = st.builds(IntegerFormat, st.integers(2, 8), symmetric=st.booleans())


def calibrated(
    source: nn.Module, fmt: IntegerFormat, *, segments: tuple[int, ...] = (), inputs: bool = True
) -> CalibratedLayer:
    """A layer whose weights and inputs are quantized."""
    operation = operation_of(source)
    assert operation is not None
    quantizer = (
        ActivationQuantizer(IntegerFormat(8), segments=segments, axis=operation.channel_axis)
        if inputs
        else None
    )
    if quantizer is not None:
        groups = quantizer.scale.shape[1]
        quantizer.fit(torch.linspace(0.02, 0.05, groups)[None], torch.full((1, groups), 120.0))
    layer = CalibratedLayer(
        source, operation, fit_grid(weight_of(source).detach(), fmt, segments=segments), quantizer
    )
    layer.weight_precision = layer.input_precision = "quantized"
    return layer


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    axes, groups = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2]))
    options = {
        "kernel_size": draw(st.integers(1, 3)),
        "stride": draw(st.integers(1, 2)),
        "padding": draw(st.integers(0, 2)),
        "dilation": draw(st.integers(1, 2)),
        "bias": draw(st.booleans()),
    }
    torch.manual_seed(draw(st.integers(0, 2**31)))
    kinds: list[Any] = [nn.Conv1d, nn.Conv2d, nn.Conv3d]
    if draw(st.booleans()):
        kinds = [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d]
        options["output_padding"] = draw(st.integers(0, max(options["stride"], options["dilation"]) - 1))
    source = kinds[axes - 1](4, 6, groups=groups, **options)
    return source, torch.randn(2, 4, *([6] * axes))


@st.composite
def linears(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(draw(st.integers(0, 2**31)))
    return nn.Linear(4, 6, bias=draw(st.booleans())), torch.randn(*draw(st.sampled_from([(3, 4), (2, 5, 4)])))


def oracle(source: nn.Module, x: Tensor, fmt: IntegerFormat) -> Tensor:
    """The stock layer with a weight and an input quantized by torch."""
    rows, operation = weight_of(source), operation_of(source)
    grid = fit_grid(rows.detach(), fmt)
    weight = torch.fake_quantize_per_channel_affine(
        rows, grid.scale[:, 0], grid.zero_point[:, 0].to(torch.int32), 0, 0, fmt.levels - 1
    )
    stock = copy.deepcopy(source)
    assert operation is not None
    stock.weight.data.copy_(operation.stored(weight))
    return stock(torch.fake_quantize_per_tensor_affine(x, float(torch.tensor(0.02)), 120, 0, 255))


@given(convolutions() | linears(), FORMATS)
def test_packed_and_calibrated_layers_are_the_stock_layer_on_quantized_values(
    case: tuple[nn.Module, Tensor], fmt: IntegerFormat
) -> None:
    source, x = case
    layer = calibrated(source, fmt)
    expected = oracle(source, x, fmt)
    assert torch.equal(layer(x), expected)
    assert torch.equal(pack(layer)(x), expected)


@given(convolutions() | linears(), FORMATS)
def test_a_calibrated_layer_starts_in_full_precision(
    case: tuple[nn.Module, Tensor], fmt: IntegerFormat
) -> None:
    source, x = case
    layer = calibrated(source, fmt)
    layer.weight_precision = layer.input_precision = "full"
    assert torch.equal(layer(x), source(x))
    layer.weight_precision = "quantized"
    assert torch.equal(layer(x), layer.operation(x, layer.quantized_weight(), layer.bias))


@given(FORMATS, st.sampled_from([(3, 1), (1, 1, 2)]), st.booleans())
def test_segments_survive_packing(fmt: IntegerFormat, segments: tuple[int, ...], spatial: bool) -> None:
    source = nn.Conv2d(4, 6, 3) if spatial else nn.Linear(4, 6)
    x = torch.randn(2, 4, 5, 5) if spatial else torch.randn(2, 7, 4)
    layer = calibrated(source, fmt, segments=segments)
    packed = pack(layer)
    assert torch.equal(packed(x), layer(x))
    parts = [fit_grid(part, fmt) for part in source.weight.detach().split(segments, dim=1)]
    expected = torch.cat(
        [
            g.decode(g.encode(p))
            for g, p in zip(parts, source.weight.detach().split(segments, dim=1), strict=True)
        ],
        dim=1,
    )
    assert torch.equal(packed.weight, expected)


def test_learned_codes_are_what_gets_packed() -> None:
    layer = calibrated(nn.Linear(4, 6), IntegerFormat(4))
    layer.codes.copy_(torch.randint(16, (6, 4)))
    packed = pack(layer)
    assert torch.equal(packed.codes, layer.codes)
    x = torch.randn(2, 4)
    assert torch.equal(
        packed(x), F.linear(layer.input_quantizer(x), layer.grid.decode(layer.codes.float()), layer.bias)
    )


def test_roundings_take_the_place_of_codes_while_they_are_learned() -> None:
    layer = calibrated(nn.Linear(4, 6), IntegerFormat(3), inputs=False)
    x, nearest = torch.randn(2, 4), layer.quantized_weight()
    layer.rounding = AdaptiveRounding(layer.weight, layer.grid)
    assert not torch.equal(layer.quantized_weight(), nearest)
    layer(x).sum().backward()
    assert layer.rounding.logits.grad is not None and layer.weight.grad is None
    layer.rounding = None
    assert torch.equal(layer.quantized_weight(), nearest)


@given(convolutions() | linears(), FORMATS)
def test_the_state_of_a_packed_layer_is_complete_from_birth(
    case: tuple[nn.Module, Tensor], fmt: IntegerFormat
) -> None:
    source, x = case
    done = pack(calibrated(source, fmt, inputs=False))
    born = PackedLayer(
        done.operation,
        fmt,
        tuple(weight_of(source).shape),
        bias=None if source.bias is None else torch.float32,
    )
    described = {name: (tuple(value.shape), value.dtype) for name, value in done.state_dict().items()}
    assert {name: (tuple(value.shape), value.dtype) for name, value in born.state_dict().items()} == described
    expected = (
        {"packed", "scale"}
        | ({"bias"} if source.bias is not None else set())
        | (set() if fmt.symmetric else {"zero_point"})
    )
    assert set(described) == expected
    before = list(born.state_dict())
    born(x)
    assert list(born.state_dict()) == before, "forward creates nothing"
    born.load_state_dict(done.state_dict())
    assert torch.equal(born(x), done(x))


@pytest.mark.parametrize(("bits", "per_row"), [(2, 9), (3, 14), (4, 18), (8, 36)])
def test_packed_codes_take_the_bits_they_say(bits: int, per_row: int) -> None:
    packed = pack(calibrated(nn.Conv2d(4, 6, 3), IntegerFormat(bits)))
    assert packed.packed.dtype == torch.uint8 and tuple(packed.packed.shape) == (6, per_row)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("source", [nn.Conv2d(4, 6, 3), nn.Linear(4, 6)])
def test_other_precisions_run_in_their_own_dtype(dtype: torch.dtype, source: nn.Module) -> None:
    source = copy.deepcopy(source).to(dtype)
    # Within the grid of the inputs: 36 of them err by 0.01 each under weights of 1/6 at most, and weights by
    # half a step of 1/765 under inputs of 2.
    x = torch.randn(2, 4, *([5, 5] if isinstance(source, nn.Conv2d) else [])).clamp(-2, 2).to(dtype)
    layer = calibrated(source, IntegerFormat(8))
    full, packed = source(x), pack(layer)
    for quantized in (layer, packed):
        out = quantized(x)
        assert out.dtype == dtype
        assert (out - full).abs().max() < 0.15
    if dtype != torch.float64:  # grids and biases are stored in float32
        assert torch.equal(packed(x), layer(x))


def test_packing_leaves_the_training_mode_and_gradients_alone() -> None:
    packed = pack(calibrated(nn.Linear(4, 6), IntegerFormat(4)))
    assert not any(parameter.requires_grad for parameter in packed.parameters())
    kinds: dict[str, Any] = dict(packed.named_parameters())
    assert set(kinds) == {"bias"}, "codes and scales are buffers, which no optimizer touches"


def test_a_packed_layer_has_the_sizes_of_a_stock_one() -> None:
    source = nn.Linear(6, 4)
    packed = pack(calibrated(source, IntegerFormat(4)))
    assert (packed.in_features, packed.out_features) == (source.in_features, source.out_features)


def test_the_input_may_be_passed_by_the_name_it_has_in_torch() -> None:
    layer, x = calibrated(nn.Linear(4, 3), IntegerFormat(4)), torch.randn(2, 4)
    seen: list[Tensor] = []
    layer.register_forward_hook(lambda _, args, __: seen.append(args[0]))
    assert torch.equal(layer(input=x), layer(x)) and all(value is x for value in seen)
    packed = pack(layer)
    assert torch.equal(packed(input=x), packed(x))


@pytest.mark.parametrize("fmt", [IntegerFormat(4), IntegerFormat(8, symmetric=True)])
@pytest.mark.parametrize("segments", [(), (3, 1)])
def test_another_weight_is_rounded_to_nearest_on_its_own_grid(
    fmt: IntegerFormat, segments: tuple[int, ...]
) -> None:
    source, other = nn.Linear(4, 3), nn.Linear(4, 3)
    layer, expected = (pack(calibrated(module, fmt, segments=segments)) for module in (source, other))
    layer.round(other.weight.detach())
    assert torch.equal(layer.weight, expected.weight) and torch.equal(layer.codes, expected.codes)
    assert torch.equal(layer.bias, source.bias)
