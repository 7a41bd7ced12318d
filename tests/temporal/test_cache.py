from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tfmq.models.denoiser import Denoiser, Inputs
from tfmq.nn.layer import CalibratedLayer
from tfmq.nn.plan import calibrated_layers, prepare
from tfmq.nn.swap import precision
from tfmq.nn.temporal import CachedFeature, SkippedLayer
from tfmq.numerics.errors import relative_error
from tfmq.quantizers.steps import StepContext
from tfmq.recipes.plan import make_plan
from tfmq.recipes.recipe import Activations, Recipe, Weights
from tfmq.temporal.block import TemporalBlock
from tfmq.temporal.cache import install_tables, quantized_features
from tfmq.temporal.probe import layer_outputs

TIMESTEPS = torch.tensor([1.0, 5.0, 400.0, 900.0, 999.0])
W2 = Recipe(
    name="w2", weights=Weights(bits=2, ranges="min_max"), activations=Activations(bits=None, products=False)
)


def prepared(build: Callable[..., Any], name: str) -> tuple[TemporalBlock, StepContext, dict[str, Tensor]]:
    """A model whose temporal layers have two-bit weights, with its full-precision features."""
    denoiser, example = build(name)
    block = TemporalBlock(denoiser, example, batch=4)
    full = block(TIMESTEPS)
    steps = StepContext(TIMESTEPS)
    prepare(denoiser.module, make_plan(W2, block.trace), steps, timestep=denoiser.timestep)
    for layer in calibrated_layers(denoiser.module).values():
        layer.weight_precision = "quantized"
    return block, steps, full


def kinds(module: nn.Module, kind: type[nn.Module]) -> set[str]:
    return {name for name, child in module.named_modules() if isinstance(child, kind)}


def test_quantized_features_are_what_the_whole_model_computes(build: Callable[..., Any]) -> None:
    block, steps, full = prepared(build, "unet")
    features = quantized_features(block, steps)
    sample = torch.randn(len(TIMESTEPS), 3, 8, 8)
    with torch.no_grad(), layer_outputs(block.module, list(full)) as seen:
        block.denoiser(Inputs(sample, TIMESTEPS.long()))
    for name in full:
        torch.testing.assert_close(features[name], seen[name], rtol=1e-5, atol=1e-6)
        assert relative_error(full[name], features[name]).min() > 0.01


@pytest.mark.parametrize("table_format", ["int8", "float16"])
def test_a_cached_model_has_its_full_precision_features_at_the_calibrated_timesteps(
    build: Callable[..., Any], table_format: str
) -> None:
    block, steps, full = prepared(build, "unet")
    install_tables(block, full, steps, table_format=table_format)  # type: ignore[arg-type]
    assert kinds(block.module, CachedFeature) == set(full)
    assert kinds(block.module, SkippedLayer) == {"time_embedding.linear_1", "time_embedding.linear_2"}
    with torch.no_grad(), layer_outputs(block.module, list(full)) as seen:
        block.denoiser(Inputs(torch.randn(2, 3, 8, 8), torch.tensor([5, 900])))
    for name, feature in full.items():
        assert relative_error(feature[[1, 3]], seen[name]).max() < (0.02 if table_format == "int8" else 1e-3)


def test_other_timesteps_still_go_through_the_block(build: Callable[..., Any]) -> None:
    block, steps, full = prepared(build, "unet")
    with torch.no_grad(), precision(block.module, weights="quantized"):
        sample = torch.randn(1, 3, 8, 8)
        with pytest.warns(UserWarning, match="444"):
            before = block.denoiser(Inputs(sample, torch.tensor([444])))
        install_tables(block, full, steps, table_format="int8")
        assert torch.equal(block.denoiser(Inputs(sample, torch.tensor([444]))), before)


def test_layers_that_also_feed_features_without_a_table_are_not_skipped(build: Callable[..., Any]) -> None:
    block, steps, full = prepared(build, "sdxl")
    install_tables(block, full, steps, table_format="int8")
    assert kinds(block.module, CachedFeature) == set(full) == {"time_embedding.linear_2"}
    assert kinds(block.module, SkippedLayer) == set()


def test_a_selection_takes_for_each_key_the_smaller_disturbance(build: Callable[..., Any]) -> None:
    block, steps, full = prepared(build, "unet")
    name = "mid_block.resnets.0.time_emb_proj"
    layer = block.module.get_submodule(name)
    assert isinstance(layer, CalibratedLayer)
    layer.weight_precision = "full"
    for inner in ("time_embedding.linear_1", "time_embedding.linear_2"):
        block.module.get_submodule(inner).weight_precision = "full"  # type: ignore[assignment]
    through_block = quantized_features(block, steps)
    install_tables(block, full, steps, table_format="int8", scope="key")
    assert not block.module.get_submodule(name).use_table.any(), "a block in full precision beats every table"
    assert block.module.get_submodule("mid_block.resnets.1.time_emb_proj").use_table.all()
    assert kinds(block.module, SkippedLayer) == set()
    with torch.no_grad():
        selected = quantized_features(block, steps)
    for key, feature in full.items():
        cached = block.module.get_submodule(key)
        through_table = cached.table(torch.arange(len(TIMESTEPS)))  # type: ignore[operator]
        best = torch.minimum(
            relative_error(feature, through_block[key]), relative_error(feature, through_table)
        )
        assert (relative_error(feature, selected[key]) <= best + 1e-6).all()


def test_a_model_without_cacheable_features_is_left_alone(build: Callable[..., Any]) -> None:
    block, steps, full = prepared(build, "class_conditional")
    assert full == {}
    install_tables(block, full, steps, table_format="int8", scope="key")
    assert kinds(block.module, CachedFeature) == kinds(block.module, SkippedLayer) == set()


def test_a_denoiser_of_the_cached_model_can_be_made_again(build: Callable[..., Any]) -> None:
    block, steps, full = prepared(build, "plain")
    install_tables(block, full, steps, table_format="int8")
    inputs = Inputs(torch.randn(1, 2, 8, 8), torch.tensor([5]))
    with torch.no_grad():
        assert torch.equal(Denoiser(block.module)(inputs), block.denoiser(inputs))
