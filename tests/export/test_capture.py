"""A captured graph computes what the denoiser computes, for any batch; the layers behind its tables are gone
from it.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_flatten

from tfmq.backends.execution import execute
from tfmq.export.capture import Call, Graph, KeyedGraph, capture
from tfmq.kernels.onednn import available
from tfmq.models.denoiser import Denoiser, Inputs
from tfmq.models.sampler import LoopSampler


def shallow(unet: Any) -> nn.Module:
    """Return a smaller model with random weights that takes the arguments of `unet`."""
    from diffusers import UNet2DConditionModel

    kinds = {"down_block_types": ["CrossAttnDownBlock2D"], "up_block_types": ["UpBlock2D"]}
    changed = {**unet.config, **kinds, "block_out_channels": [8], "mid_block_type": None}
    return UNet2DConditionModel.from_config(changed).eval().requires_grad_(False)


Quantized = Callable[..., tuple[nn.Module, Inputs]]


@pytest.fixture(scope="module")
def quantized(sampler: Callable[..., LoopSampler]) -> Quantized:
    """Return a function that gives a copy of a tiny denoiser in W8A8, quantized when it is first asked for,
    and one call's inputs at calibrated timesteps.
    """
    import tfmq

    recipe = tfmq.scheme("w8a8")
    recipe = replace(
        recipe,
        weights=replace(recipe.weights, ranges="min_max"),
        activations=replace(recipe.activations, ranges="min_max"),
        rounding=replace(recipe.rounding, solver="nearest"),
        calibration=replace(recipe.calibration, steps=3, samples=2),
        temporal=replace(recipe.temporal, learning=replace(recipe.temporal.learning, iterations=1)),
    )

    @cache
    def made(name: str) -> LoopSampler:
        target = sampler(name)
        if name == "sdxl":
            # Of one resolution and with one attention: a graph for any batch takes a second a dozen layers.
            target.denoiser = Denoiser(shallow(target.denoiser.module))
        tfmq.quantize(target, recipe)
        return target

    def give(name: str) -> tuple[nn.Module, Inputs]:
        target = made(name)
        module = copy.deepcopy(target.denoiser.module)
        example = target.example().resized(2)
        torch.manual_seed(1)
        steps = module.tfmq_steps.timesteps
        return module, Inputs(torch.randn_like(example.sample), steps[[0, 2]].long(), example.conditions)

    return give


def call_of(module: nn.Module, inputs: Inputs) -> Call:
    first = next(iter(module.tfmq_signature.parameters))
    return Call.of(module, {first: inputs.sample, module.tfmq_timestep: inputs.timestep, **inputs.conditions})


@pytest.mark.parametrize("name", ["plain", "sdxl", "upsampler"])
def test_a_graph_equals_the_denoiser_for_any_batch(quantized: Quantized, name: str) -> None:
    module, inputs = quantized(name)
    call = call_of(module, inputs)
    bins = torch.tensor([0, 2])
    program = capture(Graph(module, call.signature), call, dynamic=True).module()
    graph = Graph(module, call.signature)
    for at, tensors in ((bins, call.tensors), (bins[[1, 1, 1]], call.resized(3))):
        given = graph.arguments(at, tensors)
        expected = tree_flatten(graph.output(at, tensors))[0][0]
        torch.testing.assert_close(graph(*given)[0], expected, rtol=0, atol=0)
        torch.testing.assert_close(program(*given)[0], expected, rtol=0, atol=1e-5)


@pytest.mark.skipif(not available(), reason="this torch has no integer operators of oneDNN")
def test_integer_transposed_convolutions_and_embeddings_are_captured(quantized: Quantized) -> None:
    module, inputs = quantized("upsampler")
    assert not execute(module, "torch").floating
    call, bins = call_of(module, inputs), torch.tensor([0, 2])
    graph = Graph(module, call.signature)
    given = graph.arguments(bins, call.tensors)
    program = capture(graph, call, dynamic=False).module()
    torch.testing.assert_close(program(*given)[0], graph(*given)[0], rtol=0, atol=1e-5)


def targets(graph: torch.fx.Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if node.op == "call_function"]


def test_the_layers_behind_a_table_are_not_in_the_graph(quantized: Quantized) -> None:
    module, inputs = quantized("plain")
    call = call_of(module, inputs)
    kept = targets(capture(Graph(module, call.signature), call, dynamic=False).graph)

    def count(*kinds: str) -> int:
        return sum(any(kind in name for kind in kinds) for name in kept)

    assert count("aten.sin.", "aten.cos.") == 0
    # The time embedding and its two projections: this model has no other linear layer.
    assert count("addmm", "linear") == 0
    assert count("conv") == 4, "what reads the sample"


@pytest.mark.filterwarnings("ignore:.*was not calibrated")
def test_a_graph_finds_its_bins_from_the_timesteps(quantized: Quantized) -> None:
    module, inputs = quantized("unet")
    call = call_of(module, inputs)
    keyed, timestep = KeyedGraph(module, call.signature), call.tensors[call.signature.timestep]
    for _ in range(2):
        assert torch.equal(
            keyed(*call.tensors)[0], Denoiser(module)(Inputs(inputs.sample, timestep, inputs.conditions))
        )
        # A sample of the batch comes to stand where no table knows it.
        timestep[0] += 30


def test_a_signature_tells_calls_apart(quantized: Quantized) -> None:
    module, inputs = quantized("unet")
    arguments = {"sample": inputs.sample, "timestep": 7}
    key = Call.of(module, arguments).signature.key
    assert key == Call.of(module, {**arguments, "timestep": torch.tensor(9)}).signature.key
    assert key == Call.of(module, {**arguments, "sample": inputs.sample[:1]}).signature.key
    assert key != Call.of(module, {**arguments, "return_dict": False}).signature.key
    assert key != Call.of(module, {**arguments, "sample": inputs.sample[..., :4]}).signature.key
