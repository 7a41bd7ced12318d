"""What each layer of a denoiser is to become, and making it so."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import nn

from tfmq.nn.embedding import CalibratedEmbedding, PackedEmbedding
from tfmq.nn.layer import CalibratedLayer
from tfmq.nn.operation import operation_of, weight_of
from tfmq.nn.packed import PackedWeight
from tfmq.nn.packed_layer import PackedLayer
from tfmq.nn.products import ProductQuantizers, attach_products
from tfmq.nn.scheme import ActivationScheme, LayerScheme, OperandScheme
from tfmq.nn.submodules import Kind, submodules
from tfmq.nn.swap import attach_steps, replace_module
from tfmq.nn.temporal import stock_name
from tfmq.quantizers.activation import ActivationQuantizer
from tfmq.quantizers.part import Part
from tfmq.quantizers.steps import StepContext
from tfmq.quantizers.weight import fit_grid


@dataclass(frozen=True)
class Plan:
    """Schemes of layers, of attention products by the module that owns them, and of the rows of embeddings,
    by name.

    An owner has its number of products, and one scheme for all their operands; None is full precision.
    """

    layers: Mapping[str, LayerScheme]
    products: Mapping[str, tuple[int, ActivationScheme | None]]
    embeddings: Mapping[str, OperandScheme] = field(default_factory=dict)

    def measures(self, name: str) -> bool:
        """Whether calibration decides on the input grids of the layer `name`."""
        entry = self.layers[name].input
        return entry is not None and entry.tokens == "measured"


def untied(plan: Plan, module: nn.Module) -> Plan:
    """Return the plan without embeddings whose table another module below `module` reads too: packed rows
    are no tensor to share.
    """
    tensors = [tensor for child in module.modules() for tensor in child.parameters(recurse=False)]
    readers = Counter(map(id, tensors))
    own = {
        name: rows
        for name, rows in plan.embeddings.items()
        if readers[id(weight_of(module.get_submodule(name)))] == 1
    }
    return replace(plan, embeddings=own)


def prepare(module: nn.Module, plan: Plan, steps: StepContext, *, timestep: str | None) -> None:
    """Swap calibrated layers and product quantizers into `module` in place; it still computes in full
    precision.
    """
    for name, layer in plan.layers.items():
        source = module.get_submodule(name)
        operation = operation_of(source)
        if operation is None:
            raise ValueError(f"{name} is a {type(source).__name__}, which has no quantized form")
        grid = fit_grid(
            weight_of(source).detach(),
            layer.weight.grid,
            segments=layer.weight.segments,
            group=layer.weight.group,
            method=layer.weight.ranges,
        )
        quantizer = layer.input.quantizer(steps, axis=operation.channel_axis) if layer.input else None
        replace_module(module, name, CalibratedLayer(source, operation, grid, quantizer))
    for name, rows in plan.embeddings.items():
        table: nn.Embedding = module.get_submodule(name)  # type: ignore[assignment]
        grid = fit_grid(table.weight.detach(), rows.grid, method=rows.ranges)
        replace_module(module, name, CalibratedEmbedding(table, grid))
    for owner, (sites, operand) in plan.products.items():
        left, right = (
            [operand.quantizer(steps) if operand else None for _ in range(sites)] for _ in range(2)
        )
        quantizers = ProductQuantizers(left, right)
        quantizers.enabled = False
        attach_products(module.get_submodule(owner), quantizers)
    # Attach the steps last, so that they are outermost where the denoiser computes attention products itself.
    attach_steps(module, steps, timestep=timestep)


def activation_sites(module: nn.Module) -> dict[str, ActivationQuantizer]:
    """Return every activation quantizer below `module` that calibration fits, by name."""
    return submodules(module, ActivationQuantizer)


def _by_stock_name(module: nn.Module, kind: type[Kind]) -> dict[str, Kind]:
    """Return the layers of a class below `module` by the name of the stock layer that each replaced."""
    return {stock_name(module, name): child for name, child in submodules(module, kind).items()}


def calibrated_layers(module: nn.Module) -> dict[str, CalibratedLayer]:
    """Return every calibrated layer below `module` by the name of the stock layer that it replaced."""
    return _by_stock_name(module, CalibratedLayer)


def pack_all(module: nn.Module) -> None:
    """Replace all that is calibrated below `module` by its packed form, and let product quantizers act."""
    for name, part in submodules(module, Part).items():
        if (finished := part.finished()) is not part:
            replace_module(module, name, finished)


def calibrated_embeddings(module: nn.Module) -> dict[str, CalibratedEmbedding]:
    """Return every calibrated embedding below `module`, by name."""
    return submodules(module, CalibratedEmbedding)


def packed_embeddings(module: nn.Module) -> dict[str, PackedEmbedding]:
    """Return every packed embedding below `module`, by name."""
    return submodules(module, PackedEmbedding)


def packed_weights(module: nn.Module) -> dict[str, PackedWeight]:
    """Return every packed layer and embedding below `module` by the name of the stock module that it
    replaced.
    """
    return _by_stock_name(module, PackedWeight)


def packed_layers(module: nn.Module) -> dict[str, PackedLayer]:
    """Return every packed layer below `module` by the name of the stock layer that it replaced."""
    return _by_stock_name(module, PackedLayer)
