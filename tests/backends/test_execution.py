"""Whole denoisers by every backend that computes layer by layer, on tiny models rounded to nearest."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tfmq
from tfmq.backends.auto import CONVERTING
from tfmq.backends.backend import BACKENDS, Options
from tfmq.backends.execution import backend_names, computed_by, execute
from tfmq.kernels.kernel import Rows
from tfmq.kernels.onednn import available
from tfmq.kernels.reference import ReferenceKernel, reference_product
from tfmq.models.denoiser import Denoiser, Inputs
from tfmq.models.sampler import LoopSampler
from tfmq.nn.packed_layer import PackedLayer
from tfmq.nn.plan import Plan, activation_sites, pack_all, packed_layers, prepare
from tfmq.nn.products import ProductKernels, ProductQuantizers
from tfmq.nn.scheme import ActivationScheme, LayerScheme, WeightScheme
from tfmq.nn.submodules import submodules
from tfmq.numerics.errors import sqnr_db
from tfmq.numerics.grids import IntegerFormat
from tfmq.quantizers.part import Held
from tfmq.quantizers.steps import StepContext
from tfmq.recipes.recipe import Calibration
from tfmq.storage.digest import tensor_digest

# With a grid for each token of the linear layers' inputs.
DYNAMIC = ("dit dynamic", "sd3 dynamic", "conditional dynamic")
MODELS = ("unet", "plain", "dit", "sd3", "conditional", "upsampler", *DYNAMIC)
needs_onednn = pytest.mark.skipif(not available(), reason="this torch has no integer operators of oneDNN")
# Those that convert take seconds for each model: `test_graph.py` and `test_trajectory.py` run them on some.
EVERY = [name for name in BACKENDS if name not in CONVERTING]
# The other two compute every layer in floating point.
INTEGER = [name for name in EVERY if name not in ("simulated", "float")]
UNIT = 2.0**-24

Quantized = Callable[[str], tuple[nn.Module, Inputs]]


@pytest.fixture(scope="session")
def quantized(rounded: Callable[..., LoopSampler]) -> Quantized:
    """Return a function that gives a W4A8 model of a name, in simulated arithmetic, and a batch of four at
    one timestep.
    """
    made: dict[str, tuple[nn.Module, Inputs]] = {}

    def give(name: str) -> tuple[nn.Module, Inputs]:
        if name not in made:
            drawn = rounded(name.removesuffix(" dynamic"), "dynamic" if name in DYNAMIC else "static")
            example = drawn.example()
            conditions = {key: value.expand(4, *value.shape[1:]) for key, value in example.conditions.items()}
            noise = torch.randn(4, *example.sample.shape[1:], generator=torch.Generator().manual_seed(0))
            made[name] = drawn.denoiser.module, Inputs(noise, torch.tensor([333] * 4), conditions)
        module, inputs = made[name]
        return copy.deepcopy(module), inputs

    return give


@torch.no_grad()
def run(module: nn.Module, inputs: Inputs) -> Tensor:
    return Denoiser(module)(inputs)


def row(inputs: Inputs, index: int) -> Inputs:
    return inputs.map(lambda tensor: tensor[index : index + 1])


@pytest.mark.parametrize("backend", INTEGER, indirect=True)
@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_near_the_simulation(quantized: Quantized, name: str, backend: str) -> None:
    module, inputs = quantized(name)
    expected = run(module, inputs)
    coverage = execute(module, backend)
    lacks = name == "upsampler" and backend in ("operators", "cuda")
    lacking = {"up": "it is a transposed convolution"} if lacks else {}
    assert (
        set(coverage.integer) == set(packed_layers(module)) - lacking.keys() and coverage.floating == lacking
    )
    # Sums that round differently move an activation across a tie now and then: one code of these tiny models
    # costs 48 to 60 dB, none 130.
    assert sqnr_db(expected, run(module, inputs)) > 35


@needs_onednn
@pytest.mark.parametrize("name", MODELS)
def test_the_library_is_near_the_reference(quantized: Quantized, name: str) -> None:
    module, inputs = quantized(name)
    outputs = []
    for backend in ("reference", "torch"):
        execute(module, backend)
        outputs.append(run(module, inputs))
    assert sqnr_db(*outputs) > 40


def gamma(n: int) -> float:
    return n * UNIT / (1 - n * UNIT)


@pytest.mark.parametrize("name", MODELS)
def test_every_layer_keeps_the_bound_of_the_parity_section(quantized: Quantized, name: str) -> None:
    module, inputs = quantized(name)
    checked, moved = [], []

    def check(layer: nn.Module, arguments: tuple[Tensor, ...], simulated: Tensor) -> None:
        assert isinstance(layer, PackedLayer) and layer.input_quantizer is not None
        (x,) = arguments
        exact = ReferenceKernel(layer.integer_weight(), layer.input_quantizer.format.levels)(
            x, layer.input_quantizer.rows(x)
        )
        bias = None if layer.bias is None else layer.bias.double().abs()
        magnitude = layer.operation(
            layer.input_quantizer(x).double().abs(), layer.weight.double().abs(), bias
        )
        terms, segments = layer.weight[0].numel(), max(1, len(layer.segments))
        difference = (simulated.double() - exact.double()).abs()
        assert bool((difference <= (gamma(terms + 3) + gamma(segments + 3)) * magnitude).all())
        checked.append(layer)
        moved.append(bool(difference.max() > 0))

    for layer in packed_layers(module).values():
        layer.register_forward_hook(check)  # type: ignore[arg-type]
    # At a timestep that no table has, so that the layers behind the tables run too.
    with pytest.warns(UserWarning, match="not calibrated"):
        run(module, Inputs(inputs.sample, torch.tensor([300] * 4), inputs.conditions))
    assert set(checked) == set(packed_layers(module).values()) and any(moved)


@pytest.mark.parametrize("backend", EVERY, indirect=True)
@pytest.mark.parametrize("name", ["unet", "dit", "sd3 dynamic"])
def test_a_mixed_batch_is_its_samples_one_by_one(quantized: Quantized, name: str, backend: str) -> None:
    module, inputs = quantized(name)
    mixed = Inputs(inputs.sample, torch.tensor([666, 0, 333, 666]), inputs.conditions)
    execute(module, backend)
    together, shifted = (
        run(module, mixed),
        run(module, Inputs(mixed.sample, mixed.timestep.roll(1), mixed.conditions)),
    )
    alone = torch.cat([run(module, row(mixed, index)) for index in range(4)])
    # What stays in floating point may round differently in another batch, which moves single codes; a wrong
    # timestep moves far more.
    assert sqnr_db(alone, together) > 40 > sqnr_db(alone, shifted)


@pytest.mark.parametrize("backend", EVERY, indirect=True)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_any_batch(quantized: Quantized, backend: str, size: int) -> None:
    module, inputs = quantized("unet")
    execute(module, backend)
    part = inputs.map(lambda tensor: tensor[:size])
    assert sqnr_db(run(module, inputs)[:size], run(module, part)) > 40


@pytest.mark.parametrize("backend", EVERY, indirect=True)
@pytest.mark.parametrize(("name", "where"), [("unet", "sample"), ("conditional", "encoder_hidden_states")])
def test_a_sample_with_nan_comes_out_as_nan_and_the_others_as_ever(
    quantized: Quantized, name: str, where: str, backend: str
) -> None:
    module, inputs = quantized(name)
    execute(module, backend)
    expected = run(module, inputs)
    given = {"sample": inputs.sample, **inputs.conditions}
    given[where] = given[where].clone()
    given[where][2].view(-1)[5] = torch.nan
    y = run(module, Inputs(given.pop("sample"), inputs.timestep, given))
    assert y[2].isnan().all() and torch.equal(y[[0, 1, 3]], expected[[0, 1, 3]])


@pytest.mark.parametrize("backend", EVERY, indirect=True)
def test_a_model_that_holds_nan_is_refused(quantized: Quantized, backend: str) -> None:
    module, _ = quantized("unet")
    module.conv_norm_out.weight[3] = torch.nan
    with pytest.raises(ValueError, match=r"conv_norm_out.weight holds NaN"):
        execute(module, backend)


@pytest.mark.parametrize("backend", EVERY, indirect=True)
def test_packed_weights_change_no_value(quantized: Quantized, backend: str) -> None:
    module, inputs = quantized("unet")
    execute(module, backend)
    expected = run(module, inputs)
    execute(module, backend, options=Options(weights="packed"))
    assert torch.equal(run(module, inputs), expected)
    assert not submodules(module, Held)


@pytest.mark.parametrize("backend", EVERY, indirect=True)
def test_the_state_does_not_change_and_the_simulation_comes_back(quantized: Quantized, backend: str) -> None:
    module, inputs = quantized("unet")
    expected, state, names = (
        run(module, inputs),
        tensor_digest(module.state_dict()),
        list(module.state_dict()),
    )
    execute(module, backend)
    run(module, inputs)
    assert tensor_digest(module.state_dict()) == state and list(module.state_dict()) == names
    coverage = execute(module, "simulated")
    assert coverage.integer == () and set(coverage.floating.values()) == {"simulated"}
    assert torch.equal(run(module, inputs), expected)
    assert all(layer.kernel is None for layer in packed_layers(module).values())
    assert all(child.execution is None for child in submodules(module, ProductQuantizers).values())


@pytest.mark.parametrize("backend", EVERY, indirect=True)
def test_a_copy_computes_as_the_original(quantized: Quantized, backend: str) -> None:
    module, inputs = quantized("unet")
    execute(module, backend)
    expected, other = run(module, inputs), copy.deepcopy(module)
    execute(module, "simulated")
    assert torch.equal(run(other, inputs), expected)


def test_half_precision_models_stay_in_half_precision(sampler: Callable[..., LoopSampler]) -> None:
    drawn = sampler("plain")
    module = drawn.denoiser.module.to(torch.bfloat16)
    tfmq.quantize(drawn, replace(tfmq.scheme("rtn_w8a8"), calibration=Calibration(samples=1, steps=3)))
    inputs = Inputs(torch.randn(4, 2, 8, 8, dtype=torch.bfloat16), torch.zeros(4, dtype=torch.bfloat16))
    outputs = {}
    for backend in ("simulated", "reference", "auto"):
        execute(module, backend)
        outputs[backend] = run(module, inputs)
        assert outputs[backend].dtype == torch.bfloat16
    assert min(sqnr_db(outputs["simulated"], outputs[backend]) for backend in ("reference", "auto")) > 25


class Assorted(nn.Module):
    """Layers that integer libraries take, and layers that they do not."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Conv2d(4, 4, 3, padding=1)
        self.same = nn.Conv2d(4, 4, 3, padding="same")
        self.cubic = nn.Conv3d(4, 4, 1)
        self.wide = nn.Linear(4, 4)
        self.weight_only = nn.Linear(4, 4)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = self.cubic(self.same(self.plain(x)).unsqueeze(2)).squeeze(2)
        return self.weight_only(self.wide(x.movedim(1, -1)))


@pytest.fixture
def assorted() -> nn.Module:
    """Return the quantized form of `Assorted`: 4 bits, but an asymmetric 8-bit grid in `wide`."""
    module, steps = Assorted().requires_grad_(False), StepContext(torch.tensor([0.0, 10.0]))
    weights = {bits: WeightScheme(grid=IntegerFormat(bits), ranges="min_max") for bits in (4, 8)}
    inputs = ActivationScheme(grid=IntegerFormat(8), ranges="min_max")
    layers = {
        name: LayerScheme(
            weight=weights[8 if name == "wide" else 4], input=None if name == "weight_only" else inputs
        )
        for name, _ in module.named_children()
    }
    module.wide.weight[:, 0] = 1.0
    module.wide.weight[:, 1:] = -0.2
    prepare(module, Plan(layers, {}), steps, timestep="t")
    for site in activation_sites(module).values():
        site.fit(torch.full((1, 1), 0.03), torch.full((1, 1), 128.0))
    pack_all(module)
    return module


@needs_onednn
def test_what_the_library_lacks_stays_in_floating_point_with_a_reason(assorted: nn.Module) -> None:
    x, t = torch.randn(2, 4, 6, 6), torch.zeros(2)
    expected = assorted(x, t)
    coverage = execute(assorted, "torch")
    assert coverage.integer == ("plain", "same")
    words = {
        "cubic": "no integer operator",
        "wide": "eight signed bits",
        "weight_only": "its input is not quantized",
    }
    assert coverage.floating.keys() == words.keys()
    assert all(word in coverage.floating[name] for name, word in words.items())
    assert sqnr_db(expected, assorted(x, t)) > 35


def test_the_reference_takes_every_layer_with_a_quantized_input(assorted: nn.Module) -> None:
    x, t = torch.randn(2, 4, 6, 6), torch.zeros(2)
    expected = assorted(x, t)
    coverage = execute(assorted, "reference")
    assert set(coverage.integer) == {"plain", "same", "cubic", "wide"} and set(coverage.floating) == {
        "weight_only"
    }
    assert sqnr_db(expected, assorted(x, t)) > 35


def test_a_backend_that_fails_to_attach_leaves_the_simulation(
    assorted: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(weight: Any, levels: int) -> Any:
        if weight.values.ndim == 5:
            raise ValueError("sums do not fit into int32")
        return lambda x, rows: torch.zeros(0)

    monkeypatch.setattr("tfmq.backends.reference.ReferenceKernel", refuse)
    with pytest.raises(ValueError, match="int32"):
        execute(assorted, "reference")
    assert all(layer.kernel is None for layer in packed_layers(assorted).values())


def test_refusals(assorted: nn.Module) -> None:
    with pytest.raises(ValueError, match=rf"no backend 'abacus'; choose one of {', '.join(backend_names())}"):
        execute(assorted, "abacus")
    with pytest.raises(ValueError, match="Linear holds no model quantized by tfmq"):
        execute(nn.Linear(1, 1))
    with pytest.raises(ValueError, match="'nonsense'"):
        Options(weights="nonsense")  # type: ignore[arg-type]
    assert {"auto", "float", "simulated", "reference", "torch", "operators", "cuda"} <= set(backend_names())


def test_what_the_machine_lacks_is_named(assorted: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tfmq.backends.onednn.available", lambda: False)
    with pytest.raises(ValueError, match="the backend torch needs oneDNN"):
        execute(assorted, "torch")
    execute(assorted, "auto")
    assorted(torch.randn(2, 4, 6, 6), torch.zeros(2))
    assert computed_by(assorted) in ("float", "openvino")


def test_products_go_through_the_kernel(quantized: Quantized) -> None:
    module, inputs = quantized("unet")
    execute(module, "reference")
    seen: list[Rows] = []
    owners = [child for child in module.modules() if isinstance(child, ProductQuantizers)]

    def watched(left: Tensor, left_rows: Rows, right: Tensor, right_rows: Rows) -> Tensor:
        seen.append(left_rows)
        return reference_product(left, left_rows, right, right_rows)

    for owner in owners:
        assert isinstance(owner.execution, ProductKernels)
        assert owner.execution.kernel is reference_product
        owner.execution.kernel = watched
    run(module, inputs)
    assert len(seen) == sum(len(owner.left) for owner in owners) > 0
