"""The shape of a quantized denoiser as plain data: enough to rebuild its modules around a stock architecture,
without any tensor.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tfmq.nn.branch import SideBranch
from tfmq.nn.correction import Correction, attach_correction
from tfmq.nn.embedding import PackedEmbedding
from tfmq.nn.entry import check_layer
from tfmq.nn.operation import is_embedding, operation_of, weight_of
from tfmq.nn.packed import PackedWeight
from tfmq.nn.packed_layer import PackedLayer
from tfmq.nn.products import ProductQuantizers, attach_products
from tfmq.nn.submodules import submodules
from tfmq.nn.swap import TIMESTEP, attach_steps, context_of, networks_of, replace_module, steps_of
from tfmq.nn.temporal import CachedFeature, FeatureTable, SkippedLayer, stock_name
from tfmq.numerics.grids import Grid, IntegerFormat, Table
from tfmq.numerics.operations import TransposedConvolution
from tfmq.quantizers.activation import ActivationQuantizer
from tfmq.quantizers.dynamic import DynamicQuantizer
from tfmq.quantizers.input import InputQuantizer
from tfmq.quantizers.part import Part
from tfmq.quantizers.steps import StepContext

Structure = Mapping[str, Any]
InputKind = Literal["full", "static", "per_step", "dynamic"]
# What `kind` of a layer may say; linear layers and convolutions have none.
EMBEDDING = "embedding"
KINDS = (None, EMBEDDING, TransposedConvolution.described)


def _describe_quantizer(quantizer: nn.Module | None) -> dict[str, Any] | None:
    return quantizer.describe() if isinstance(quantizer, InputQuantizer) else None


def _build_quantizer(spec: Mapping[str, Any] | None, steps: StepContext) -> InputQuantizer | None:
    if spec is None:
        return None
    fmt = IntegerFormat(spec["bits"], spec["symmetric"])
    if "dynamic" in spec:
        return DynamicQuantizer(fmt, segments=spec["segments"])
    return ActivationQuantizer(
        fmt, steps=steps if spec["per_step"] else None, segments=spec["segments"], axis=spec["axis"]
    )


def input_kind(spec: Mapping[str, Any] | None) -> InputKind:
    """Return how the input of a described layer is quantized."""
    if spec is None:
        return "full"
    if "dynamic" in spec:
        return "dynamic"
    return "per_step" if spec["per_step"] else "static"


def _describe_weight(child: PackedWeight) -> dict[str, Any]:
    weight = {**child.format.describe(), "segments": list(child.segments)}
    if isinstance(child, PackedEmbedding):
        return {**weight, "input": None, "kind": EMBEDDING}
    assert isinstance(child, PackedLayer)
    rescaled = {} if child.factor is None else {"rescaled": True}
    rotated = {"rotated": child.rotated} if child.rotated else {}
    ordered = {} if child.order is None else {"ordered": True}
    branch = {"branch": {"rank": child.branch.rank, "dtype": child.branch.dtype}} if child.branch else {}
    grouped = {"group": child.group} if child.group else {}
    beside = {**rescaled, **rotated, **ordered, **branch, **grouped}
    layer = {**weight, "input": _describe_quantizer(child.input_quantizer), **beside}
    # Linear layers and convolutions are what version 1 of the format had, and have no word of their own.
    kind = child.operation.described
    return {**layer, "kind": kind} if kind else layer


@dataclass(frozen=True)
class Section:
    """A list of the structure: one kind of part, as it is described and put into a stock architecture.

    Attributes:
        kind: class of the parts.
        name: returns the name of a part's entry, from the denoiser and the part's own name in it.
        spec: what the entry says; a section without one lists names alone.
        place: puts a part into a stock architecture, by its name, its entry and the step context. The tensors
            are not filled in.
        listed_empty: whether the list is there where it is empty. Sections that came after version 2 of the
            format are not.
    """

    kind: type[Part]
    name: Callable[[nn.Module, str], str]
    spec: Callable[[Any], dict[str, Any]] | None
    place: Callable[[nn.Module, str, Mapping[str, Any], StepContext], None]
    listed_empty: bool = True

    def listed(self, module: nn.Module) -> list[Any]:
        """Return the list of the parts that a denoiser has."""
        parts = submodules(module, self.kind)
        found = {
            self.name(module, name): self.spec(part) if self.spec else {} for name, part in parts.items()
        }
        return _grouped(found) if self.spec else list(found)


def _own_name(module: nn.Module, name: str) -> str:
    return name


def _owner_name(module: nn.Module, name: str) -> str:
    return name.rpartition(".")[0]


def _place_layer(module: nn.Module, name: str, spec: Mapping[str, Any], steps: StepContext) -> None:
    replace_module(module, name, _build_layer(_submodule(module, name), spec, steps, name))


def _place_table(module: nn.Module, name: str, spec: Mapping[str, Any], steps: StepContext) -> None:
    block = _submodule(module, name)
    table = FeatureTable(len(steps.timesteps), weight_of(block).shape[0], spec["format"])
    replace_module(module, name, CachedFeature(block, table, steps, everywhere=spec["everywhere"]))


def _place_skipped(module: nn.Module, name: str, spec: Mapping[str, Any], steps: StepContext) -> None:
    block = _submodule(module, name)
    replace_module(module, name, SkippedLayer(block, weight_of(block).shape[0], steps))


def _place_products(module: nn.Module, name: str, spec: Mapping[str, Any], steps: StepContext) -> None:
    left, right = ([_build_quantizer(entry, steps) for entry in spec[side]] for side in ("left", "right"))
    attach_products(_submodule(module, name), ProductQuantizers(left, right))


def _place_correction(module: nn.Module, name: str, spec: Mapping[str, Any], steps: StepContext) -> None:
    attach_correction(module, Correction(steps, channels=spec["channels"], axis=spec["axis"]))


# In the order in which they are put into an architecture: tables and skips go around layers.
SECTIONS: dict[str, Section] = {
    "layers": Section(PackedWeight, stock_name, _describe_weight, _place_layer),
    "products": Section(
        ProductQuantizers,
        _owner_name,
        lambda child: {
            side: [_describe_quantizer(q) for q in getattr(child, side)] for side in ("left", "right")
        },
        _place_products,
    ),
    "tables": Section(
        CachedFeature,
        _own_name,
        lambda child: {"format": child.table.table_format, "everywhere": child.everywhere},
        _place_table,
    ),
    "skipped": Section(SkippedLayer, _own_name, None, _place_skipped),
    "corrections": Section(
        Correction,
        _own_name,
        lambda child: {"channels": child.channels, "axis": child.axis},
        _place_correction,
        listed_empty=False,
    ),
}


def describe(module: nn.Module) -> dict[str, Any]:
    """Return the structure of a packed denoiser, as values that JSON keeps.

    Keys: `steps` (number of calibrated timesteps) and `timestep` (name of the argument), or for a component
    without a timestep `networks` (names of those that compute calls of their own, "" for the component); and
    `SECTIONS`, each a list of groups with one specification and the `names` it holds for, or of names. Layers
    behind a table have the name of the stock layer.
    """
    listed = {key: section.listed(module) for key, section in SECTIONS.items()}
    kept = {key: parts for key, parts in listed.items() if parts or SECTIONS[key].listed_empty}
    networks = networks_of(module)
    first = next(iter(networks.values()))
    timestep = getattr(first, TIMESTEP)
    called = {"networks": list(networks)} if timestep is None else {"timestep": timestep}
    return {"steps": len(steps_of(first).timesteps), **called, **kept}


def _grouped(specs: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return one entry for each distinct specification, with the names that share it."""
    groups: dict[str, dict[str, Any]] = {}
    for name, spec in specs.items():
        groups.setdefault(repr(spec), {**spec, "names": []})["names"].append(name)
    return list(groups.values())


def named_specs(structure: Structure, kind: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield `(name, specification)` for every entry of a section of a structure."""
    for group in structure.get(kind, ()):
        for name in group["names"]:
            yield name, group


def kind_of(module: nn.Module) -> str | None:
    """Return what the `kind` of a stock module's quantized form would be: None for a linear layer or a
    convolution.

    Raises:
        TypeError: it has no quantized form.
    """
    if is_embedding(module):
        return EMBEDDING
    operation = operation_of(module)
    if operation is None:
        raise TypeError(f"a {type(module).__name__} has no quantized form")
    return operation.described


def _grid_of(spec: Mapping[str, Any]) -> Grid:
    """Return the grid of a described weight. The values of a table come with it, so that no table needs to be
    known here.
    """
    if "grid" in spec:
        return Table(spec["grid"], tuple(spec["values"]))
    return IntegerFormat(spec["bits"], spec["symmetric"])


def _build_layer(source: nn.Module, spec: Mapping[str, Any], steps: StepContext, name: str) -> PackedWeight:
    kind, fmt = spec.get("kind"), _grid_of(spec)
    if kind not in KINDS:
        raise ValueError(
            f"{name}: the checkpoint holds a layer of kind {kind!r}, this tfmq "
            f"knows {', '.join(map(repr, KINDS[1:]))}; upgrade tfmq"
        )
    operation = operation_of(source)
    if (operation is None and not is_embedding(source)) or kind_of(source) != kind:
        held = (kind or "layer").replace("_", " ")
        raise ValueError(
            f"{name}: the checkpoint holds a quantized {held}, the "
            f"architecture has a {type(source).__name__} there"
        )
    if operation is None:
        return PackedEmbedding(fmt, tuple(weight_of(source).shape), dtype=weight_of(source).dtype)
    channels = operation.rows(weight_of(source)).shape[1]
    check_layer(name, spec, operation.channel_axis, channels=channels, groups=operation.groups)
    shape, segments = tuple(weight_of(source).shape), tuple(spec["segments"])
    return PackedLayer(
        operation,
        fmt,
        shape,
        bias=source.bias.dtype if isinstance(source.bias, Tensor) else None,
        segments=segments,
        input_quantizer=_build_quantizer(spec["input"], steps),
        rescaled=spec.get("rescaled", False),
        rotated=spec.get("rotated", 0),
        ordered=spec.get("ordered", False),
        group=spec.get("group", 0),
        branch=SideBranch(operation, shape, **spec["branch"], segments=segments)
        if "branch" in spec
        else None,
    )


def assemble(module: nn.Module, structure: Structure) -> None:
    """Swap the modules of `structure` into a stock architecture, in place, on the device of its parameters
    (meta included).

    The tensors are not filled in: load a state dict afterwards.

    Raises:
        ValueError: the architecture lacks a layer that `structure` names, or has something else there, or no
            such timestep argument.
    """
    device = next(module.parameters()).device
    with torch.device(device):
        names, count = structure.get("networks", ("",)), structure["steps"]
        contexts = {network: StepContext(torch.zeros(count)) for network in names}
        for key, section in SECTIONS.items():
            entries = (
                named_specs(structure, key)
                if section.spec
                else ((name, {}) for name in structure.get(key, ()))
            )
            for name, spec in entries:
                section.place(module, name, spec, context_of(contexts, name))
        for network, steps in contexts.items():
            attach_steps(_submodule(module, network), steps, timestep=structure.get("timestep"))


def _submodule(module: nn.Module, name: str) -> nn.Module:
    try:
        return module.get_submodule(name)
    except AttributeError:
        raise ValueError(
            f"the checkpoint names {name}, which {type(module).__name__} does not have"
        ) from None
