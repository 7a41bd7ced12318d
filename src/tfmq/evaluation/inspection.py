"""What a model consists of, as quantization sees it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Literal

from torch import nn

from tfmq.artifact import stored_bytes, stored_manifest
from tfmq.evaluation.components import Component, find_components
from tfmq.evaluation.cost.system import describe_machine
from tfmq.kernels.onednn import available
from tfmq.models.denoiser import Denoiser, Inputs
from tfmq.models.program import LayerTrace, Trace
from tfmq.models.sampler import Sampler
from tfmq.models.trace import trace
from tfmq.nn.floating import Floating, floating
from tfmq.nn.operation import weight_of
from tfmq.nn.size import state_bytes
from tfmq.nn.structure import InputKind, describe, input_kind, named_specs
from tfmq.nn.swap import is_quantized
from tfmq.numerics.packing import packed_shape
from tfmq.numerics.segments import scales
from tfmq.recipes import scheme
from tfmq.recipes.paper import PAPER
from tfmq.recipes.plan import make_plan
from tfmq.recipes.recipe import Weights
from tfmq.reconstruction.units import Unit, find_units
from tfmq.storage.manifest import Manifest, Provenance

Speed = Literal["integer", "integer-slow", "simulated"]
SCHEMES = ("w8a8", "w4a8", "w4a32")
# Schemes for models that compute token by token.
TRANSFORMER_SCHEMES = ("transformer_w8a8", "transformer_w4a8")
INTEGER_INSTRUCTIONS = {"avx_vnni", "avx512_vnni", "amx_int8", "asimddp", "i8mm"}
# Numbers of steps for which the sizes of tables are shown.
TABLE_STEPS = (20, 50)


@dataclass(frozen=True)
class TemporalLayer:
    """A layer that depends on the timestep and not on the sample: a feature that other data meets, or a layer
    that only leads to one.
    """

    name: str
    depends_on: tuple[str, ...]
    cacheable: bool
    role: Literal["feature", "inner"]


@dataclass(frozen=True)
class LayerBits:
    """The precision of one layer, None being full precision, and how its input is quantized: once, per
    timestep, or dynamically by token.
    """

    name: str
    weight_bits: int | None
    activation_bits: int | None
    input: InputKind = "full"


@dataclass(frozen=True)
class MeasuredInput:
    """What static and dynamic input grids did to a layer's output in calibration, as energy of the error over
    that of the output; see `kept`.
    """

    name: str
    static: float
    dynamic: float
    kept: str


@dataclass(frozen=True)
class Inspection:
    """Family (class of the denoiser), number of parameters, temporal layers, reconstruction units, bits per
    layer, and bytes.

    `bytes` has `fp32` and `quantized` (None for a full-precision model); `predicted_bytes` of the tensors of
    8- and 4-bit weights for a full-precision model, empty for a quantized one. `temporal_parameters` are
    those of the temporal layers, `table_bytes` what int8 tables of the cacheable features take, by number of
    steps. `schemes` are the schemes and published experiments whose rules fit the model's layers. `inputs`
    are the layers of a quantized model whose input grids were chosen by measured error. `floating` are the
    modules with tensors that stay in floating point, the largest first: of a full-precision model those that
    no scheme quantizes. `embeddings` are the look-ups whose tables can be quantized, `components` the parts
    of the pipeline with weights. `speed` is what to expect of integers on this machine's CPU: `integer` with
    instructions for them, `integer-slow` without, else `simulated`.
    """

    family: str
    parameters: int
    temporal: tuple[TemporalLayer, ...]
    units: tuple[Unit, ...]
    layers: tuple[LayerBits, ...]
    bytes: Mapping[str, int | None]
    predicted_bytes: Mapping[str, int]
    temporal_parameters: int
    table_bytes: Mapping[str, int]
    schemes: tuple[str, ...]
    speed: Speed
    inputs: tuple[MeasuredInput, ...] = ()
    floating: tuple[Floating, ...] = ()
    embeddings: tuple[LayerBits, ...] = ()
    components: tuple[Component, ...] = ()


def speed_class() -> Speed:
    """Return what this machine's CPU is expected to make of integer layers; nothing is measured."""
    if not available():
        return "simulated"
    return "integer" if INTEGER_INSTRUCTIONS & set(describe_machine(1)["instructions"]) else "integer-slow"


def _fitting_schemes(traced: Trace) -> tuple[str, ...]:
    """Return the names of the recipes whose every rule matches a layer: what to begin with, the same with
    4-bit weights, and others.
    """

    def fits(name: str) -> bool:
        try:
            make_plan(scheme(name), traced)
        except ValueError:
            return False
        return True

    tokenwise = sum(layer.tokenwise for layer in traced.layers) > 0.9 * len(traced.layers)
    return tuple(
        name for name in (*(TRANSFORMER_SCHEMES if tokenwise else ()), *SCHEMES, *PAPER) if fits(name)
    )


def _temporal_figures(module: nn.Module, traced: Trace) -> tuple[int, dict[str, int]]:
    """Return the parameters of the temporal layers, and the bytes of tables: a code for each value, a scale,
    a zero-point and a choice a step.
    """
    layers = [module.get_submodule(layer.name) for layer in traced.temporal]
    cacheable = [layer.name for layer in traced.temporal if layer.cacheable and layer.name in traced.features]
    row = sum(weight_of(module.get_submodule(name)).shape[0] + 4 + 1 + 1 for name in cacheable)
    return sum(_parameters(layer) for layer in layers), {str(steps): steps * row for steps in TABLE_STEPS}


def _temporal(traced: Trace) -> tuple[TemporalLayer, ...]:
    def describe_layer(layer: LayerTrace) -> TemporalLayer:
        return TemporalLayer(
            layer.name,
            tuple(sorted(layer.depends_on)),
            layer.cacheable,
            "feature" if layer.name in traced.features else "inner",
        )

    return tuple(describe_layer(layer) for layer in traced.temporal)


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _predicted_bytes(module: nn.Module, traced: Trace, bits: int) -> int:
    """Return the bytes of the tensors if the weights of the layers had `bits`, apart from activation grids
    and temporal tables.

    A weight takes its packed codes, and for each row and concatenated source a scale, below 8 bits with a
    zero-point. Rows of embeddings have the bits that recipes have for them.
    """
    weights = [(layer.name, bits, scales(layer.segments)) for layer in traced.layers]
    weights += [(name, Weights().embeddings or bits, 1) for name in traced.embeddings]
    total = 4 * _parameters(module)
    for name, own, sources in weights:
        shape = tuple(weight_of(module.get_submodule(name)).shape)
        total += (
            prod(packed_shape(shape, bits=own))
            + shape[0] * sources * (4 if own == 8 else 5)
            - 4 * prod(shape)
        )
    return total


def _of_full_precision(module: nn.Module, traced: Trace) -> Inspection:
    names = [layer.name for layer in traced.layers]
    parameters = _parameters(module)
    return Inspection(
        type(module).__name__,
        parameters,
        _temporal(traced),
        find_units(module, names, exclude=[layer.name for layer in traced.temporal]),
        tuple(LayerBits(name, None, None) for name in names),
        {"fp32": 4 * parameters, "quantized": None},
        {f"w{bits}": _predicted_bytes(module, traced, bits) for bits in (8, 4)},
        *_temporal_figures(module, traced),
        _fitting_schemes(traced),
        speed_class(),
        floating=floating(module, (), quantized=traced.quantizable),
        embeddings=tuple(LayerBits(name, None, None) for name in traced.embeddings),
    )


def _stock(module: nn.Module, example: Inputs) -> tuple[nn.Module, Trace, Provenance]:
    """Return the stock architecture of a quantized diffusers model, without weights, its trace, and where the
    model comes from.
    """
    from tfmq.integrations.diffusers.architecture import manifest_of, stock_architecture

    stock, values = stock_architecture(module), manifest_of(module)
    provenance = (
        Provenance()
        if values is None
        else Manifest.from_json(values, source="the manifest of the model").provenance
    )
    return stock, trace(Denoiser(stock), example.map(lambda tensor: tensor.to("meta"))), provenance


def _bits(module: nn.Module) -> dict[str, tuple[int, int | None, InputKind]]:
    """Return the bits of weight and input of each quantized layer, and how its input is quantized."""
    return {
        name: (spec["bits"], spec["input"]["bits"] if spec["input"] else None, input_kind(spec["input"]))
        for name, spec in named_specs(describe(module), "layers")
    }


def _of_quantized(
    module: nn.Module, example: Inputs, directory: Path | None, original: Denoiser | None
) -> Inspection:
    if original is None:
        stock, traced, provenance = _stock(module, example)
    else:
        stock, traced = original.module, trace(original, example)
        provenance = stored_manifest(directory).provenance if directory else Provenance()
    bits = _bits(module)
    maintained = [layer.name for layer in traced.temporal] if provenance.maintenance != "none" else []
    names = [layer.name for layer in traced.layers]
    parameters = _parameters(stock)
    return Inspection(
        type(stock).__name__,
        parameters,
        _temporal(traced),
        find_units(stock, [name for name in names if name in bits], exclude=maintained),
        tuple(LayerBits(name, *bits.get(name, (None, None))) for name in names),
        {"fp32": 4 * parameters, "quantized": stored_bytes(directory) if directory else state_bytes(module)},
        {},
        *_temporal_figures(stock, traced),
        (),
        speed_class(),
        tuple(MeasuredInput(**found) for found in provenance.inputs),
        floating(module, traced.quantizable),
        tuple(LayerBits(name, *bits.get(name, (None, None))) for name in traced.embeddings),
    )


def inspect(sampler: Sampler, *, directory: Path | None = None, stock: Denoiser | None = None) -> Inspection:
    """Describe the denoiser of `sampler`, full-precision or quantized.

    No weight is read: the structure comes from a traced call, for a quantized model from one of its stock
    architecture.

    Args:
        sampler: gives the denoiser and an example of its inputs.
        directory: where a quantized model is stored; its bytes on disk count. Without it the bytes of its
            tensors do.
        stock: the full-precision denoiser that a quantized module was made from, where diffusers cannot build
            it.

    Raises:
        ValueError: a quantized module that diffusers cannot rebuild.
    """
    module, example = sampler.denoiser.module, sampler.example()
    found = (
        _of_quantized(module, example, directory, stock)
        if is_quantized(module)
        else _of_full_precision(module, trace(sampler.denoiser, example))
    )
    return replace(found, components=find_components(sampler))
