"""What a file of another program cannot hold of a quantized denoiser, and how its layers stand in the stock
architecture.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from torch import Tensor, nn

from tfmq.integrations.diffusers.architecture import stock_architecture, stock_class
from tfmq.integrations.diffusers.original.rows import Rows, to_original
from tfmq.integrations.diffusers.original.tables import TABLES
from tfmq.nn.correction import Correction
from tfmq.nn.packed import PackedWeight
from tfmq.nn.packed_layer import PackedLayer
from tfmq.nn.products import ProductQuantizers
from tfmq.nn.submodules import submodules
from tfmq.nn.temporal import CachedFeature, stock_name
from tfmq.numerics.blocks import UnheldError

Held = TypeVar("Held")


@dataclass
class Lost:
    """What the format cannot hold.

    Attributes:
        dequantized: layers whose integers are written dequantized, in floating point, by reason.
        inputs: layers that other loaders give another input grid than the model has.
        tables: layers whose table of temporal features is left out; they compute.
        products: owners of attention products that stay in floating point.
        corrections: how many corrections of the prediction are left out.
    """

    dequantized: dict[str, list[str]] = field(default_factory=dict)
    inputs: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    products: list[str] = field(default_factory=list)
    corrections: int = 0

    def joined(self, original: str, reasons: Mapping[str, str | None]) -> None:
        """Note the layers of a matrix that is written dequantized, and why they are no integers."""
        for name, reason in reasons.items():
            why = reason or f"joined with others in {original}, which differ"
            self.dequantized.setdefault(why, []).append(name)

    def lines(self, *, floats: str, inputs: str) -> Iterator[str]:
        """Yield what is left out, a line for each kind.

        Args:
            floats: what dequantized layers are written in.
            inputs: what layers have for grids of their own.
        """
        for reason, names in self.dequantized.items():
            yield f"{len(names)} layers in {floats} ({reason}): {', '.join(names)}"
        kinds = {
            f"layers have {inputs} in the place of their own": self.inputs,
            "tables of temporal features are left out": self.tables,
            "modules have attention products in floating point": self.products,
        }
        for kind, names in kinds.items():
            if names:
                yield f"{len(names)} {kind}: {', '.join(names)}"
        if self.corrections:
            yield "the correction of the prediction is left out"


def lost_parts(model: nn.Module) -> Lost:
    """Return what of the model is no layer."""
    return Lost(
        tables=list(submodules(model, CachedFeature)),
        products=[name.rpartition(".")[0] for name in submodules(model, ProductQuantizers)],
        corrections=len(submodules(model, Correction)),
    )


def plain_layer(layer: PackedWeight) -> PackedLayer:
    """Return a layer that is a plain product with its integers.

    Raises:
        UnheldError: it is another one.
    """
    if not isinstance(layer, PackedLayer) or not layer.operation.by_token:
        raise UnheldError("no linear layer")
    if layer.factor is not None:
        raise UnheldError("its input is rescaled")
    if layer.order is not None:
        raise UnheldError("the channels of its input are in another order")
    if layer.branch is not None:
        raise UnheldError("a branch is computed beside it")
    return layer


@dataclass(frozen=True)
class Published:
    """A quantized denoiser in the published layout of its family.

    Attributes:
        table: where its tensors are in the layout.
        packed: its quantized layers by their names in the stock architecture.
        stored: what the model stores, by such names.
        lost: what is left out; so far what is no layer.
    """

    table: Sequence[Rows]
    packed: Mapping[str, PackedWeight]
    stored: Mapping[str, Tensor]
    lost: Lost

    @classmethod
    def of(cls, model: nn.Module) -> "Published":
        """Lay out a denoiser.

        Raises:
            ValueError: it is of no layout that other loaders open.
        """
        kind, stock = layout_of(model), stock_architecture(model)
        return cls(TABLES[kind](stock), packed_by_name(model), stored_tensors(model), lost_parts(model))

    def plain(self, entry: Rows) -> Tensor:
        """Return a tensor of the layout, dequantized, in float32: one at a time, since all of them take
        several times the memory of the codes.
        """
        return to_original({name: self._part(name) for name in entry.parts}, [entry])[entry.original]

    def _part(self, name: str) -> Tensor:
        """Return a tensor of the stock architecture."""
        layer = self.packed.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        tensor = self.stored[name] if layer is None else layer.stock_weight
        return tensor.detach().float().cpu()

    def leave_out(self, entry: Rows, reasons: Mapping[str, str]) -> None:
        """Note the layers of a matrix that is written dequantized."""
        names = [name for name in layers_of(entry) if name in self.packed]
        self.lost.joined(entry.original, {name: reasons.get(name) for name in names})


def held_layers(
    packed: Mapping[str, PackedWeight], held: Callable[[PackedLayer], Held]
) -> tuple[dict[str, Held], dict[str, str]]:
    """Return what `held` makes of the layers and, for those of which it cannot make any, why."""
    found, reasons = {}, {}
    for name, layer in packed.items():
        try:
            found[name] = held(plain_layer(layer))
        except UnheldError as error:
            reasons[name] = str(error)
    return found, reasons


def layout_of(model: nn.Module) -> str:
    """Return the class of a denoiser that other loaders open a single file of.

    Raises:
        ValueError: there is no such file of it.
    """
    kind = stock_class(model).__name__
    if kind not in TABLES:
        raise ValueError(f"{kind} has no layout that other loaders open; {', '.join(TABLES)} have")
    return kind


def packed_by_name(model: nn.Module) -> dict[str, PackedWeight]:
    """Return the quantized layers by their names in the stock architecture."""
    return {stock_name(model, name): layer for name, layer in submodules(model, PackedWeight).items()}


def layers_of(entry: Rows) -> list[str]:
    """Return the layers whose weights are joined in a matrix of the layout."""
    return [part.removesuffix(".weight") for part in entry.parts if part.endswith(".weight")]


def stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return what a model stores by the names of the stock architecture."""
    state = {}
    for name, tensor in model.state_dict().items():
        layer, _, kind = name.rpartition(".")
        state[f"{stock_name(model, layer)}.{kind}" if layer else name] = tensor
    return state
