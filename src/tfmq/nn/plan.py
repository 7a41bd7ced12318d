"""What each layer of a denoiser is to become, and making it so."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from tfmq.nn.embedding import CalibratedEmbedding, PackedEmbedding
from tfmq.nn.layer import CalibratedLayer, PackedLayer
from tfmq.nn.operation import operation_of, weight_of
from tfmq.nn.packed import PackedWeight
from tfmq.nn.products import ProductQuantizers, attach_products
from tfmq.nn.swap import attach_steps, replace_module
from tfmq.nn.temporal import stock_name
from tfmq.numerics.formats import IntegerFormat
from tfmq.quantizers.activation import ActivationQuantizer
from tfmq.quantizers.dynamic import DynamicQuantizer
from tfmq.quantizers.input import InputQuantizer
from tfmq.quantizers.part import Part
from tfmq.quantizers.steps import StepContext
from tfmq.quantizers.weight import fit_grid

Tokens = Literal["static", "dynamic", "measured"]
StepGrids = bool | Literal["measured"]


@dataclass(frozen=True, kw_only=True)
class QuantizerPlan:
    """An activation quantizer: its grid, whether it has one per timestep, and whether its range is exact
    (`min_max`) or searched.

    With `per_step` `measured` it has, until calibration finds that one for all does as well.

    `shared` says that the grids of all timesteps have one zero-point.

    `tokens` says how it comes by its grids: `static` ones are fitted in calibration, `dynamic` ones are those
    of each token at each call, and `measured` are static until calibration has compared the two.
    """

    format: IntegerFormat
    per_step: StepGrids
    ranges: str
    tokens: Tokens = "static"
    shared: bool = False

    def zero_points(self, site: str) -> tuple[int, ...]:
        """Return the codes that the one zero-point of the quantizer called `site` may be; none where each
        timestep has its own.

        A product of two activations is an integer product in engines if the right one has signed codes, and
        the left one signed or unsigned ones.
        """
        if not self.shared:
            return ()
        middle = self.format.middle
        sides = {".tfmq_products.left.": (0, middle), ".tfmq_products.right.": (middle,)}
        return next(
            (codes for side, codes in sides.items() if side in f".{site}."), tuple(range(self.format.levels))
        )

    def build(self, steps: StepContext, *, segments: tuple[int, ...] = (), axis: int = 1) -> InputQuantizer:
        """Return the quantizer, unfitted."""
        if self.tokens == "dynamic":
            return DynamicQuantizer(self.format, segments=segments)
        return ActivationQuantizer(
            self.format, steps=steps if self.per_step else None, segments=segments, axis=axis
        )


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """A quantized layer: weight grid and how it is fitted, the input segments that get grids of their own,
    and the input quantizer.
    """

    weight: IntegerFormat
    ranges: str
    segments: tuple[int, ...]
    input: QuantizerPlan | None


@dataclass(frozen=True, kw_only=True)
class EmbeddingPlan:
    """A quantized embedding: the grid of its rows, and how it is fitted."""

    weight: IntegerFormat
    ranges: str


@dataclass(frozen=True)
class Plan:
    """Plans by layer name, by owner one quantizer plan for all operands of its attention products (None: full
    precision), and by embedding name.
    """

    layers: Mapping[str, LayerPlan]
    products: Mapping[str, tuple[int, QuantizerPlan | None]]
    embeddings: Mapping[str, EmbeddingPlan] = field(default_factory=dict)

    def measures(self, name: str) -> bool:
        """Whether calibration decides on the input grids of the layer `name`."""
        entry = self.layers[name].input
        return entry is not None and entry.tokens == "measured"


def prepare(module: nn.Module, plan: Plan, steps: StepContext, *, timestep: str) -> None:
    """Swap calibrated layers and product quantizers into `module` in place; it still computes in full
    precision.
    """
    for name, layer in plan.layers.items():
        source = module.get_submodule(name)
        operation = operation_of(source)
        if operation is None:
            raise ValueError(f"{name} is a {type(source).__name__}, which has no quantized form")
        grid = fit_grid(
            weight_of(source).detach(), layer.weight, segments=layer.segments, method=layer.ranges
        )
        quantizer = (
            layer.input.build(steps, segments=layer.segments, axis=operation.channel_axis)
            if layer.input
            else None
        )
        replace_module(module, name, CalibratedLayer(source, operation, grid, quantizer))
    for name, embedding in plan.embeddings.items():
        table: nn.Embedding = module.get_submodule(name)  # type: ignore[assignment]
        grid = fit_grid(table.weight.detach(), embedding.weight, method=embedding.ranges)
        replace_module(module, name, CalibratedEmbedding(table, grid))
    for owner, (sites, quantizer_plan) in plan.products.items():
        left, right = (
            [quantizer_plan.build(steps) if quantizer_plan else None for _ in range(sites)] for _ in range(2)
        )
        quantizers = ProductQuantizers(left, right)
        quantizers.enabled = False
        attach_products(module.get_submodule(owner), quantizers)
    # Last, so that it is outermost where the denoiser computes attention products itself.
    attach_steps(module, steps, timestep=timestep)


def activation_sites(module: nn.Module) -> dict[str, ActivationQuantizer]:
    """Return every activation quantizer below `module` that calibration fits, by name."""
    return {name: child for name, child in module.named_modules() if isinstance(child, ActivationQuantizer)}


def calibrated_layers(module: nn.Module) -> dict[str, CalibratedLayer]:
    """Return every calibrated layer below `module` by the name of the stock layer that it replaced."""
    return {
        stock_name(module, name): child
        for name, child in module.named_modules()
        if isinstance(child, CalibratedLayer)
    }


def pack_all(module: nn.Module) -> None:
    """Replace all that is calibrated below `module` by its packed form, and let product quantizers act."""
    for name, child in list(module.named_modules()):
        if isinstance(child, Part) and (finished := child.finished()) is not child:
            replace_module(module, name, finished)


def calibrated_embeddings(module: nn.Module) -> dict[str, CalibratedEmbedding]:
    """Return every calibrated embedding below `module`, by name."""
    return {name: child for name, child in module.named_modules() if isinstance(child, CalibratedEmbedding)}


def packed_embeddings(module: nn.Module) -> dict[str, PackedEmbedding]:
    """Return every packed embedding below `module`, by name."""
    return {name: child for name, child in module.named_modules() if isinstance(child, PackedEmbedding)}


def packed_weights(module: nn.Module) -> dict[str, PackedWeight]:
    """Return every packed layer and embedding below `module` by the name of the stock module that it
    replaced.
    """
    return {
        stock_name(module, name): child
        for name, child in module.named_modules()
        if isinstance(child, PackedWeight)
    }


def packed_layers(module: nn.Module) -> dict[str, PackedLayer]:
    """Return every packed layer below `module` by the name of the stock layer that it replaced."""
    return {
        stock_name(module, name): child
        for name, child in module.named_modules()
        if isinstance(child, PackedLayer)
    }
