"""Rescalings chosen for planted layers: an outlier channel has to be found, and where there is none nothing
is rescaled.
"""

from collections.abc import Callable
from math import log10
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tfmq.calibration.forward import readers_of_one
from tfmq.calibration.rescaling import (
    MOST,
    Reader,
    Seen,
    best_transform,
    observe,
    observed,
    output_error,
    proposed,
)
from tfmq.kernels.reference import ReferenceKernel
from tfmq.models.denoiser import Denoiser, Inputs
from tfmq.models.trace import trace
from tfmq.nn.layer import CalibratedLayer, pack
from tfmq.nn.operation import operation_of, weight_of
from tfmq.nn.plan import calibrated_layers, prepare
from tfmq.nn.transform import Transform
from tfmq.numerics.equivalence import EQUALIZERS
from tfmq.numerics.errors import sqnr_db
from tfmq.numerics.grids import IntegerFormat
from tfmq.quantizers.activation import ActivationQuantizer
from tfmq.quantizers.dynamic import DynamicQuantizer
from tfmq.quantizers.steps import StepContext
from tfmq.quantizers.weight import fit_grid
from tfmq.recipes.plan import make_plan
from tfmq.recipes.recipe import Recipe, Weights

STEPS = StepContext(torch.tensor([1.0, 5.0, 9.0]))
CHANNELS, OUTLIER, SIZE = 16, 3, 64.0


def layer_of(
    source: nn.Module, *, kind: str, bits: int = 8, segments: tuple[int, ...] = ()
) -> CalibratedLayer:
    operation = operation_of(source)
    assert operation is not None
    grid = fit_grid(
        weight_of(source).detach(), IntegerFormat(bits, True), segments=segments, method="min_max"
    )
    axis, fmt = operation.channel_axis, IntegerFormat(bits, False)
    quantizers: dict[str, Callable[[], Any]] = {
        "per step": lambda: ActivationQuantizer(fmt, steps=STEPS, segments=segments, axis=axis),
        "static": lambda: ActivationQuantizer(fmt, segments=segments, axis=axis),
        "dynamic": lambda: DynamicQuantizer(fmt, segments=segments),
        "none": lambda: None,
    }
    return CalibratedLayer(source, operation, grid, quantizers[kind]())


def read(layer: CalibratedLayer, inputs: list[Tensor], *, rotation: int = 0) -> Seen:
    with observed({"layer": layer}, STEPS, len(inputs), rotations={"layer": rotation}) as seen:
        for number, x in enumerate(inputs):
            with STEPS.at_bins(torch.tensor([number % 3])):
                layer(x)
    return seen["layer"]


def inputs_of(source: nn.Module, *, outlier: float) -> list[Tensor]:
    linear = isinstance(source, nn.Linear)
    found = [torch.randn((4, 20, CHANNELS) if linear else (4, CHANNELS, 6, 6)) for _ in range(6)]
    for x in found:
        (x[..., OUTLIER] if linear else x[:, OUTLIER]).mul_(outlier)
    return found


SOURCES = {
    "linear": lambda: nn.Linear(CHANNELS, 24),
    "convolution": lambda: nn.Conv2d(CHANNELS, 24, 3, padding=1),
    "groups": lambda: nn.Conv2d(CHANNELS, 24, 3, padding=1, groups=4),
    "transposed": lambda: nn.ConvTranspose2d(CHANNELS, 24, 2, stride=2),
}


@pytest.mark.parametrize("equalizer", EQUALIZERS)
@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, kind) for name in SOURCES for kind in ("per step", "static")] + [("linear", "dynamic")],
)
def test_an_outlier_channel_is_found(name: str, kind: str, equalizer: str) -> None:
    """One channel 64 times as large takes six bits of range from all others; the weights that read it are as
    much smaller, so there is room.
    """
    source = SOURCES[name]()
    with torch.no_grad():
        reading = source.weight if name == "transposed" else source.weight.transpose(0, 1)
        # Of four groups the first has the outlier, and the first 6 of 24 outputs.
        (reading[OUTLIER, :6] if name == "groups" else reading[OUTLIER]).div_(SIZE)
    layer = layer_of(source, kind=kind)
    seen = read(layer, inputs_of(source, outlier=SIZE))
    factor = best_transform([Reader(layer, seen, "min_max")], equalizers=(equalizer,)).factor
    assert factor is not None
    others = torch.arange(CHANNELS) != OUTLIER
    assert float(factor[OUTLIER] / factor[others].max()) <= 1 / 4
    before, after = (output_error(layer, seen, Transform(f), ranges="min_max") for f in (None, factor))
    assert after < before / 4


@pytest.mark.parametrize("name", SOURCES)
def test_where_channels_are_alike_nothing_is_rescaled(name: str) -> None:
    source = SOURCES[name]()
    with torch.no_grad():
        source.weight.copy_(source.weight.sign())
    seen = read(
        layer := layer_of(source, kind="per step"), [x.sign() for x in inputs_of(source, outlier=1.0)]
    )
    assert best_transform([Reader(layer, seen, "min_max")], equalizers=("ranges", "peaks")).factor is None


@pytest.mark.parametrize(("kind", "gain"), [("per step", 6), ("static", 6), ("dynamic", 1)])
def test_a_rotation_spreads_an_outlier_over_its_group(kind: str, gain: float) -> None:
    """A channel of size 64 beside ones of size 1 sets the range. Rotated with 15 others it adds 64 / 4 to
    each, and these about 3: a range of 19, whose codes are 3.4 times as fine. That is 10 dB less error of the
    input; of tokens with grids of their own the outlier is large in some alone, and errors of weights stay,
    so that a rotation may not be worth it.
    """
    source = nn.Linear(CHANNELS, 24)
    layer = layer_of(source, kind=kind)
    seen = read(layer, inputs_of(source, outlier=SIZE), rotation=256)
    found = best_transform([Reader(layer, seen, "min_max")], equalizers=())
    assert found.factor is None and (found.rotated == CHANNELS or kind == "dynamic")
    before, after = (output_error(layer, seen, one, ranges="min_max") for one in (Transform(), found))
    assert after <= before / gain


def test_where_no_channel_stands_out_nothing_is_rotated() -> None:
    """Signs have the least range for their energy: every rotation makes it larger."""
    source = nn.Linear(CHANNELS, 24)
    layer = layer_of(source, kind="dynamic")
    seen = read(layer, [x.sign() for x in inputs_of(source, outlier=1.0)], rotation=256)
    assert seen.group == CHANNELS
    assert best_transform([Reader(layer, seen, "min_max")], equalizers=()) == Transform()


@pytest.mark.parametrize("name", ["convolution", "groups", "transposed"])
def test_linear_layers_alone_are_rotated(name: str) -> None:
    source = SOURCES[name]()
    layer = layer_of(source, kind="per step")
    assert read(layer, inputs_of(source, outlier=SIZE), rotation=256).group == 0


@torch.no_grad()
def test_a_rotated_layer_is_packed_as_it_is() -> None:
    source = nn.Linear(CHANNELS, 24)
    layer, x = layer_of(source, kind="dynamic"), inputs_of(source, outlier=SIZE)[0]
    exact = source(x)
    factor = torch.exp2((torch.arange(CHANNELS) % 5 - 2).float())
    layer.transform(Transform(factor, 16), ranges="min_max")
    torch.testing.assert_close(layer(x), exact, rtol=1e-4, atol=1e-4)
    layer.weight_precision = layer.input_precision = "quantized"
    packed = pack(layer)
    assert torch.equal(packed(x), layer(x))
    torch.testing.assert_close(packed.stock_weight, source.weight, rtol=0, atol=0.05)
    torch.testing.assert_close(packed.rows(source.weight), layer.weight)


def interleaved(source: nn.Module, size: float) -> list[Tensor]:
    """Inputs whose every other channel is `size` times as large; the weights that read the rest are so many
    times as large, so that both halves count alike.
    """
    inputs = inputs_of(source, outlier=1.0)
    linear = isinstance(source, nn.Linear)
    for x in inputs:
        (x[..., ::2] if linear else x[:, ::2]).mul_(size)
    with torch.no_grad():
        (weight_of(source) if linear else weight_of(source).transpose(0, 1)[None])[:, 1::2].mul_(size)
    return inputs


@pytest.mark.parametrize("kind", ["per step", "static", "dynamic"])
def test_clusters_part_interleaved_populations(kind: str) -> None:
    """The small half has steps 16 times as fine in a cluster of its own, and met weights 16 times as large:
    24 dB less error there, and as the other half keeps its own, 21 for the input together (DGQ), one of which
    the codes of the weight may take. Neighbours as segments bring nothing.
    """
    source = nn.Linear(CHANNELS, 24)
    inputs = interleaved(source, 16.0)
    layer = layer_of(source, kind=kind)
    layer.input_quantizer.format = IntegerFormat(6)  # type: ignore[union-attr]
    seen = read(layer, inputs)
    reader = Reader(layer, seen, "min_max")
    found = best_transform([reader], equalizers=(), clusters=2)
    assert found.order is not None and found.factor is None
    assert {tuple(part.tolist()) for part in found.order.split(found.segments)} == {
        tuple(range(0, CHANNELS, 2)),
        tuple(range(1, CHANNELS, 2)),
    }
    neighbours = Transform(order=torch.arange(CHANNELS, dtype=torch.int32), segments=(8, 8))
    before, parted, after = (
        output_error(layer, seen, one, ranges="min_max") for one in (Transform(), neighbours, found)
    )
    assert 10 * log10(before / after) > 20 * log10(16) - 4
    assert abs(10 * log10(before / parted)) < 3


@pytest.mark.parametrize("equalizers", [(), ("ranges",)])
def test_alike_channels_are_in_no_clusters(equalizers: tuple[str, ...]) -> None:
    source = nn.Linear(CHANNELS, 24)
    layer = layer_of(source, kind="per step")
    seen = read(layer, [x.clamp(-1.5, 1.5) for x in inputs_of(source, outlier=1.0)])
    assert best_transform([Reader(layer, seen, "search")], equalizers=equalizers, clusters=4).order is None


def test_channels_in_groups_are_in_no_clusters() -> None:
    layer = layer_of(source := SOURCES["groups"](), kind="per step")
    reader = Reader(layer, read(layer, inputs_of(source, outlier=SIZE)), "min_max")
    assert best_transform([reader], equalizers=(), clusters=2) == Transform()
    few = layer_of(nn.Linear(3, 24), kind="per step")
    seen = read(few, [torch.randn(4, 20, 3) * torch.tensor([1.0, 1.0, 50.0]) for _ in range(3)])
    assert best_transform([Reader(few, seen, "min_max")], equalizers=(), clusters=2) == Transform()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["per step", "static", "dynamic"])
@pytest.mark.parametrize("name", ["linear", "convolution", "transposed"])
def test_a_layer_with_its_channels_in_order_is_packed_as_it_is(name: str, kind: str) -> None:
    source = SOURCES[name]()
    if kind == "dynamic" and name != "linear":
        pytest.skip("linear layers alone have dynamic grids")
    layer, x = layer_of(source, kind=kind), inputs_of(source, outlier=SIZE)[0]
    exact = source(x)
    order = torch.randperm(CHANNELS, dtype=torch.int32)
    layer.transform(
        Transform(torch.exp2((torch.arange(CHANNELS) % 5 - 2).float()), 0, order, (5, 11)), ranges="min_max"
    )
    torch.testing.assert_close(layer(x), exact, rtol=1e-4, atol=1e-4)
    quantizer = layer.input_quantizer
    assert quantizer is not None and quantizer.segments == layer.grid.segments == (5, 11)
    if isinstance(quantizer, ActivationQuantizer):
        assert quantizer.per_step == (kind == "per step")
        quantizer.fit(torch.rand(len(quantizer.scale), 2) + 0.5, torch.full((len(quantizer.scale), 2), 100.0))
    layer.weight_precision = layer.input_precision = "quantized"
    packed = pack(layer)
    with STEPS.at_bins(torch.tensor([1])):
        expected = layer(x)
        assert torch.equal(packed(x), expected)
        rows = packed.input_quantizer.rows(packed.transformed(x))  # type: ignore[union-attr]
        integers = ReferenceKernel(packed.integer_weight(), 256)(packed.transformed(x), rows)
    torch.testing.assert_close(integers, expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(packed.stock_weight, source.weight, rtol=0, atol=0.05)
    torch.testing.assert_close(packed.rows(source.weight), layer.weight)


def test_weights_alone_are_rescaled_for_themselves() -> None:
    """An input channel with large weights spoils the grid of each row, whatever reads it."""
    source = nn.Linear(CHANNELS, 24)
    with torch.no_grad():
        source.weight[:, OUTLIER] *= SIZE
    layer = layer_of(source, kind="none", bits=4)
    seen = read(layer, inputs_of(source, outlier=1 / SIZE))
    factor = best_transform([Reader(layer, seen, "min_max")], equalizers=("ranges",)).factor
    assert factor is not None and float(factor[OUTLIER] / factor.median()) >= 4


def test_segments_have_grids_of_their_own() -> None:
    """The outlier is alone in its segment, where its range costs nobody anything."""
    source = nn.Conv2d(CHANNELS, 24, 3, padding=1)
    inputs = inputs_of(source, outlier=SIZE)
    order = [OUTLIER, *(c for c in range(CHANNELS) if c != OUTLIER)]
    apart, together = (
        layer_of(source, kind="per step", segments=segments) for segments in ((1, CHANNELS - 1), ())
    )
    errors = [
        output_error(layer, read(layer, [x[:, order] for x in inputs]), Transform(), ranges="min_max")
        for layer in (apart, together)
    ]
    assert errors[0] < errors[1] / 4


@torch.no_grad()
def test_the_error_is_that_of_the_layer() -> None:
    """What decides is what the layer itself does to these rows, its input grid fitted to their exact
    extremes.
    """
    source = nn.Linear(CHANNELS, 24, bias=False)
    layer = layer_of(source, kind="dynamic", bits=6)
    inputs = inputs_of(source, outlier=SIZE)[:1]
    seen = read(layer, inputs)
    factor = torch.ones(CHANNELS)
    factor[OUTLIER] = 1 / 32
    found = output_error(layer, seen, Transform(factor), ranges="min_max")
    exact = seen.rows[0][0] @ source.weight.mT
    layer.transform(Transform(factor), ranges="min_max")
    packed = pack(layer)
    assert found == pytest.approx(float((packed(seen.rows[0][0]) - exact).double().square().sum()), rel=1e-4)
    assert torch.equal(packed.stock_weight, packed.weight * factor)


@torch.no_grad()
def test_a_model_whose_layers_are_rescaled_computes_the_same_in_full_precision(
    build: Callable[..., Any],
) -> None:
    denoiser: Denoiser
    inputs: Inputs
    denoiser, inputs = build("unet")
    expected = denoiser(inputs)
    prepare(
        denoiser.module,
        make_plan(Recipe(name="w4a8", weights=Weights(ranges="min_max")), trace(denoiser, inputs)),
        STEPS,
        timestep="timestep",
    )
    batch = inputs.resized(2)
    layers = calibrated_layers(denoiser.module)
    seen = observe(
        denoiser,
        layers,
        STEPS,
        [Inputs(batch.sample, torch.tensor([1.0, 9.0]))] * 3,
        rotations={},
        advance=lambda _=1: None,
    )
    assert seen.keys() == layers.keys() and all(
        sum(map(lambda rows: rows.shape[1], found.rows)) <= MOST for found in seen.values()
    )
    for name, layer in layers.items():
        width = layer.weight.shape[1] * layer.operation.groups
        layer.transform(Transform(torch.exp2((torch.arange(width) % 5 - 2).float())), ranges="min_max")
        assert seen[name].plain.low.shape == (3, width)
    # The same terms, summed in another order where a library has another kernel for other strides.
    assert sqnr_db(expected, denoiser(inputs)) > 120


class Joint(nn.Module):
    """Reads one tensor by three layers, changes it in place, and reads it once more."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.late, self.twice = (nn.Linear(4, 4) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        total = self.q(x) + self.k(x) + self.v(x)
        x.mul_(2)
        return self.twice(self.twice(self.late(x) + total))


def test_layers_that_read_one_tensor_are_found() -> None:
    net = Joint()
    layers = {name: module for name, module in net.named_modules() if name}
    found = readers_of_one(layers, lambda: net(torch.randn(2, 4)))
    assert found == [["q", "k", "v"], ["late"], ["twice"]]


def test_one_transform_serves_all_that_read_a_tensor() -> None:
    """A layer whose weights are small where the input is large gains by a factor that another, whose weights
    are as large there as elsewhere, loses little by; alone, the second would take none.
    """
    sources = [nn.Linear(CHANNELS, 24) for _ in range(2)]
    with torch.no_grad():
        sources[0].weight[:, OUTLIER].div_(SIZE)
    layers = [layer_of(source, kind="per step") for source in sources]
    inputs = inputs_of(sources[0], outlier=SIZE)
    readers = [Reader(layer, read(layer, inputs), "min_max") for layer in layers]
    found = best_transform(readers, equalizers=("ranges",))
    assert found.factor is not None
    shares = [reader.error(found) / reader.error(Transform()) for reader in readers]
    assert sum(shares) / 2 < 0.99
    for alone in proposed(readers, ("ranges",)):
        assert sum(reader.error(alone) / reader.error(Transform()) for reader in readers) >= sum(shares)
