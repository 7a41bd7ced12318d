"""A captured graph computes what the denoiser computes, for any batch; the layers behind its tables are gone from it."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from tfmq.backends.execution import execute
from tfmq.export.capture import Call, Graph, KeyedGraph, capture
from tfmq.kernels.onednn import available
from tfmq.models.denoiser import Inputs
from tfmq.models.sampler import LoopSampler


def quantized(sampler: Callable[..., LoopSampler], name: str, cached: bool = True) -> tuple[nn.Module, Inputs]:
    """A tiny denoiser in W8A8, its temporal features from tables or not, and one call's inputs at calibrated timesteps."""
    from dataclasses import replace

    import tfmq

    made = sampler(name)
    recipe = tfmq.scheme("w8a8" if cached else "rtn_w8a8")
    recipe = replace(recipe, calibration=replace(recipe.calibration, steps=3, samples=2), learning=replace(recipe.learning, iterations=0))
    recipe = replace(recipe, temporal=replace(recipe.temporal, learning=replace(recipe.temporal.learning, iterations=1)))
    tfmq.quantize(made, recipe)
    module = made.denoiser.module
    example = made.example().resized(2)
    torch.manual_seed(1)
    steps = module.tfmq_steps.timesteps
    return module, Inputs(torch.randn_like(example.sample), steps[[0, 2]].long(), example.conditions)


def call_of(module: nn.Module, inputs: Inputs) -> Call:
    first = next(iter(module.tfmq_signature.parameters))
    return Call.of(module, {first: inputs.sample, module.tfmq_timestep: inputs.timestep, **inputs.conditions})


@pytest.mark.parametrize("name", ["plain", "sdxl", "upsampler"])
def test_a_graph_equals_the_denoiser_for_any_batch(sampler: Callable[..., LoopSampler], name: str) -> None:
    module, inputs = quantized(sampler, name)
    call = call_of(module, inputs)
    bins = torch.tensor([0, 2])
    program = capture(Graph(module, call.signature), call, dynamic=True).module()
    (expected,) = Graph(module, call.signature)(bins, *call.tensors)
    torch.testing.assert_close(program(bins, *call.tensors)[0], expected, rtol=0, atol=1e-5)
    wider = call.resized(3)
    (expected,) = Graph(module, call.signature)(bins[[1, 1, 1]], *wider)
    torch.testing.assert_close(program(bins[[1, 1, 1]], *wider)[0], expected, rtol=0, atol=1e-5)


@pytest.mark.skipif(not available(), reason="this torch has no integer operators of oneDNN")
def test_integer_transposed_convolutions_and_embeddings_are_captured(sampler: Callable[..., LoopSampler]) -> None:
    module, inputs = quantized(sampler, "upsampler")
    assert not execute(module, "torch").floating
    call, bins = call_of(module, inputs), torch.tensor([0, 2])
    expected = Graph(module, call.signature)(bins, *call.tensors)[0]
    program = capture(Graph(module, call.signature), call, dynamic=False).module()
    torch.testing.assert_close(program(bins, *call.tensors)[0], expected, rtol=0, atol=1e-5)


def test_the_layers_behind_a_table_are_gone_from_the_graph(sampler: Callable[..., LoopSampler]) -> None:
    counts = []
    for cached in (False, True):
        module, inputs = quantized(sampler, "unet", cached)
        call = call_of(module, inputs)
        graph = capture(Graph(module, call.signature), call, dynamic=False).graph
        for node in [node for node in graph.nodes if "_assert_" in str(node.target)]:
            graph.erase_node(node)
        graph.eliminate_dead_code()
        targets = [str(node.target) for node in graph.nodes]
        counts.append((sum("sin" in t or "cos" in t for t in targets), sum("addmm" in t or "linear" in t for t in targets)))
    assert counts[0][0] > 0 and counts[1][0] == 0, "the sinusoid of the timestep"
    assert counts[1][1] < counts[0][1], "the time embedding and its projections"


def test_a_graph_finds_its_bins_from_the_timesteps(sampler: Callable[..., LoopSampler]) -> None:
    module, inputs = quantized(sampler, "unet")
    call = call_of(module, inputs)
    (expected,) = Graph(module, call.signature)(torch.tensor([0, 2]), *call.tensors)
    assert torch.equal(KeyedGraph(module, call.signature)(*call.tensors)[0], expected)


def test_a_signature_tells_calls_apart(sampler: Callable[..., LoopSampler]) -> None:
    module, inputs = quantized(sampler, "unet")
    arguments = {"sample": inputs.sample, "timestep": 7}
    key = Call.of(module, arguments).signature.key
    assert key == Call.of(module, {**arguments, "timestep": torch.tensor(9)}).signature.key
    assert key == Call.of(module, {**arguments, "sample": inputs.sample[:1]}).signature.key
    assert key != Call.of(module, {**arguments, "return_dict": False}).signature.key
    assert key != Call.of(module, {**arguments, "sample": inputs.sample[..., :4]}).signature.key
