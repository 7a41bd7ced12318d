import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tfmq.models.denoiser import Denoiser, Inputs
from tfmq.models.trace import trace
from tfmq.nn.layer import CalibratedLayer
from tfmq.nn.plan import pack_all, prepare
from tfmq.nn.products import ProductQuantizers, attach_products
from tfmq.nn.swap import STEPS, attach_steps, precision, replace_module, steps_of
from tfmq.numerics.grids import IntegerFormat
from tfmq.numerics.operations import Linear
from tfmq.quantizers.activation import ActivationQuantizer
from tfmq.quantizers.steps import StepContext
from tfmq.quantizers.weight import fit_grid
from tfmq.recipes.plan import make_plan
from tfmq.recipes.recipe import Recipe, Weights


class Model(nn.Module):
    """A denoiser that returns the bins which its step context has while it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))

    def forward(self, x: Tensor, t: Tensor, *, fail: bool = False) -> Tensor:
        if fail:
            raise KeyError
        return steps_of(self).index

    def product(self, x: Tensor) -> Tensor:
        return x @ x


def stepped() -> tuple[Model, StepContext]:
    model, steps = Model(), StepContext(torch.tensor([1.0, 5.0, 9.0]))
    attach_steps(model, steps, timestep="t")
    return model, steps


def test_every_call_sets_the_step_from_its_own_argument() -> None:
    model, steps = stepped()
    x = torch.zeros(2, 2)
    assert model(x, torch.tensor([9, 1])).tolist() == [2, 0]
    assert model(x=x, t=torch.tensor(5)).tolist() == [1]
    assert model(x, t=5).tolist() == [1], "a timestep may be a Python number"
    with pytest.raises(RuntimeError, match="outside"):
        _ = steps.index


def test_a_failing_call_leaves_no_step() -> None:
    model, steps = stepped()
    with pytest.raises(KeyError):
        model(torch.zeros(1, 2), torch.tensor(1), fail=True)
    with pytest.raises(RuntimeError, match="outside"):
        _ = steps.index


def test_the_class_stays_a_subclass_of_itself_and_other_instances_are_untouched() -> None:
    model, _ = stepped()
    assert isinstance(model, Model) and type(model).__name__ == "Model"
    assert type(Model()) is Model
    assert STEPS in dict(model.named_children()) and f"{STEPS}.timesteps" in model.state_dict()


def test_copies_have_a_context_of_their_own() -> None:
    model, _ = stepped()
    other = copy.deepcopy(model)
    steps_of(other).timesteps.copy_(torch.tensor([100.0, 200.0, 300.0]))
    assert other(torch.zeros(1, 2), torch.tensor(300)).tolist() == [2]
    assert model(torch.zeros(1, 2), torch.tensor(5)).tolist() == [1]


def test_a_stepped_model_still_names_its_arguments() -> None:
    model, _ = stepped()
    assert list(inspect.signature(model.forward).parameters) == ["x", "t", "fail"]
    denoiser = Denoiser(model)
    assert (denoiser.sample, denoiser.timestep) == ("x", "t")


def test_an_owner_of_products_still_names_its_arguments() -> None:
    model = Model()
    attach_products(model, ProductQuantizers([None], [None]))
    assert list(inspect.signature(model.forward).parameters) == ["x", "t", "fail"]


@pytest.mark.parametrize("training", [True, False])
def test_a_replacement_stands_in_the_place_and_mode_of_the_old_module(training: bool) -> None:
    model = Model()
    model.inner[1].train(training)
    new = nn.Linear(2, 2)
    replace_module(model, "inner.1", new)
    assert model.inner[1] is new and new.training == training
    with pytest.raises(AttributeError):
        replace_module(model, "inner.7", nn.Linear(2, 2))


def calibrated_pair() -> nn.Module:
    def layer() -> CalibratedLayer:
        source = nn.Linear(4, 4)
        quantizer = ActivationQuantizer(IntegerFormat(2))
        quantizer.fit(torch.full((1, 1), 0.7), torch.full((1, 1), 1.0))
        return CalibratedLayer(
            source, Linear(), fit_grid(source.weight.detach(), IntegerFormat(2)), quantizer
        )

    model = nn.Module()
    model.layers = nn.Sequential(layer(), layer())
    model.products = ProductQuantizers([None], [None])
    model.products.enabled = False
    return model


def state(model: nn.Module) -> list[object]:
    return [(layer.weight_precision, layer.input_precision) for layer in model.layers] + [
        model.products.enabled
    ]


def test_precision_reaches_every_layer_and_product_for_a_while() -> None:
    model = calibrated_pair()
    model.layers[1].weight_precision = "quantized"
    before = state(model)
    with precision(model, weights="quantized", inputs="quantized"):
        assert state(model) == [("quantized", "quantized")] * 2 + [True]
        with precision(model, weights="full"):
            assert state(model) == [("full", "quantized")] * 2 + [True], "what is not named stays"
        assert state(model) == [("quantized", "quantized")] * 2 + [True]
    assert state(model) == before
    with pytest.raises(KeyError), precision(model, weights="full", inputs="full"):
        assert state(model) == [("full", "full")] * 2 + [False]
        raise KeyError
    assert state(model) == before


def test_full_precision_is_the_stock_computation_and_quantized_is_not() -> None:
    model, x = calibrated_pair(), torch.randn(3, 4)
    stock = x
    for layer in model.layers:
        stock = nn.functional.linear(stock, layer.weight, layer.bias)
    with precision(model, weights="full", inputs="full"):
        assert torch.equal(model.layers(x), stock)
    for change in ({"weights": "quantized"}, {"inputs": "quantized"}):
        with precision(model, **change):
            assert not torch.allclose(model.layers(x), stock)


class Picky(nn.Module):
    """Refuses a dtype, as diffusers' quantized models do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.layer(sample)

    def to(self, *args: object, **kwargs: object) -> "Picky":
        if "dtype" in kwargs:
            raise ValueError("casting a quantized model is unsupported")
        return super().to(*args, **kwargs)


def test_a_cast_to_the_dtype_that_it_has_is_none() -> None:
    model = Picky()
    attach_steps(model, StepContext(torch.tensor([1.0])), timestep="timestep")
    assert model.to(dtype=torch.float32, device="cpu") is model and model.to("cpu") is model
    with pytest.raises(ValueError, match="unsupported"):
        model.to(dtype=torch.float16)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_quantized_model_in_another_dtype_keeps_its_grids_and_timesteps(
    build: Callable[..., Any], dtype: torch.dtype
) -> None:
    """333 is no number of eight binary digits, and a scale rounded to as many is another grid."""
    denoiser, example = build("plain")
    steps = StepContext(torch.tensor([333.0, 666.0]))
    recipe = Recipe(name="w4a8", weights=Weights(ranges="min_max"))
    prepare(denoiser.module, make_plan(recipe, trace(denoiser, example)), steps, timestep=denoiser.timestep)
    pack_all(denoiser.module)
    before = {name: value.clone() for name, value in denoiser.module.state_dict().items()}
    denoiser.module.to(dtype)
    for name, value in denoiser.module.state_dict().items():
        kept = name not in dict(denoiser.module.named_parameters()) and name != "frequencies"
        assert value.dtype == (before[name].dtype if kept else dtype), name
        assert not kept or torch.equal(value, before[name])
    output = denoiser(Inputs(example.sample.to(dtype), torch.tensor([333]), example.conditions))
    assert output.dtype == dtype and bool(output.isfinite().all())
