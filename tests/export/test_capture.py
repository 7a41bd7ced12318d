"""A captured graph computes what the denoiser computes, for any batch; the layers behind its tables are gone
from it.
"""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_flatten

from tfmq.backends.execution import execute
from tfmq.export.capture import Call, FeatureGraph, Graph, KeyedGraph, capture
from tfmq.export.quiet import quiet_tools
from tfmq.kernels.onednn import available
from tfmq.models.denoiser import Denoiser, Inputs
from tfmq.models.sampler import LoopSampler
from tfmq.nn.temporal import tabulated


def quantized(
    sampler: Callable[..., LoopSampler], name: str, cached: bool = True
) -> tuple[nn.Module, Inputs]:
    """A tiny denoiser in W8A8, its temporal features from tables or not, and one call's inputs at calibrated
    timesteps.
    """
    from dataclasses import replace

    import tfmq

    made = sampler(name)
    recipe = tfmq.scheme("w8a8" if cached else "rtn_w8a8")
    recipe = replace(
        recipe,
        calibration=replace(recipe.calibration, steps=3, samples=2),
        learning=replace(recipe.learning, iterations=0),
    )
    recipe = replace(
        recipe, temporal=replace(recipe.temporal, learning=replace(recipe.temporal.learning, iterations=1))
    )
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
    graph = Graph(module, call.signature)
    for at, tensors in ((bins, call.tensors), (bins[[1, 1, 1]], call.resized(3))):
        given = graph.arguments(at, tensors)
        expected = tree_flatten(graph.output(at, tensors))[0][0]
        torch.testing.assert_close(graph(*given)[0], expected, rtol=0, atol=0)
        torch.testing.assert_close(program(*given)[0], expected, rtol=0, atol=1e-5)


@pytest.mark.skipif(not available(), reason="this torch has no integer operators of oneDNN")
def test_integer_transposed_convolutions_and_embeddings_are_captured(
    sampler: Callable[..., LoopSampler],
) -> None:
    module, inputs = quantized(sampler, "upsampler")
    assert not execute(module, "torch").floating
    call, bins = call_of(module, inputs), torch.tensor([0, 2])
    graph = Graph(module, call.signature)
    given = graph.arguments(bins, call.tensors)
    program = capture(graph, call, dynamic=False).module()
    torch.testing.assert_close(program(*given)[0], graph(*given)[0], rtol=0, atol=1e-5)


def test_the_layers_behind_a_table_are_gone_from_the_graph(sampler: Callable[..., LoopSampler]) -> None:
    counts = []
    for cached in (False, True):
        module, inputs = quantized(sampler, "unet", cached)
        call = call_of(module, inputs)
        graph = capture(Graph(module, call.signature), call, dynamic=False).graph
        targets = [str(node.target) for node in graph.nodes]
        counts.append(
            (
                sum("sin" in t or "cos" in t for t in targets),
                sum("addmm" in t or "linear" in t for t in targets),
            )
        )
    assert counts[0][0] > 0 and counts[1][0] == 0, "the sinusoid of the timestep"
    assert counts[1][1] < counts[0][1], "the time embedding and its projections"


def test_the_graph_of_features_holds_the_layers_behind_the_tables_alone(
    sampler: Callable[..., LoopSampler],
) -> None:
    module, inputs = quantized(sampler, "unet")
    call = call_of(module, inputs)
    # Without writes in place, which every engine does away with.
    with quiet_tools():
        graph = (
            capture(FeatureGraph(module, call.signature), call, dynamic=False).run_decompositions({}).graph
        )
    graph.eliminate_dead_code()
    targets = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    assert any("sin" in target or "cos" in target for target in targets)
    assert not any("conv" in target or "group_norm" in target for target in targets), "what reads the sample"


@pytest.mark.filterwarnings("ignore:.*was not calibrated")
@pytest.mark.parametrize("name", ["unet", "sdxl"])
def test_features_are_rows_of_the_tables_where_these_know_the_timestep(
    sampler: Callable[..., LoopSampler], name: str
) -> None:
    module, inputs = quantized(sampler, name)
    call = call_of(module, inputs)
    bins, exact, features = (
        torch.tensor([0, 2]),
        torch.tensor([False, True]),
        FeatureGraph(module, call.signature),
    )
    timestep = call.tensors[call.signature.timestep]
    timestep[0] += 30
    (values,) = features(bins, exact, *call.tensors)
    rows = tabulated(module, bins)
    assert torch.equal(values[1], rows[1]) and not torch.equal(values[0], rows[0])
    # With these features the denoiser is what it is layer by layer.
    expected = Denoiser(module)(Inputs(inputs.sample, timestep, inputs.conditions))
    assert torch.equal(Graph(module, call.signature)(bins, values, *call.tensors)[0], expected)


@pytest.mark.filterwarnings("ignore:.*was not calibrated")
def test_a_graph_finds_its_bins_from_the_timesteps(sampler: Callable[..., LoopSampler]) -> None:
    module, inputs = quantized(sampler, "unet")
    call = call_of(module, inputs)
    keyed, timestep = KeyedGraph(module, call.signature), call.tensors[call.signature.timestep]
    for _ in range(2):
        assert torch.equal(
            keyed(*call.tensors)[0], Denoiser(module)(Inputs(inputs.sample, timestep, inputs.conditions))
        )
        # A sample of the batch comes to stand where no table knows it.
        timestep[0] += 30


def test_a_signature_tells_calls_apart(sampler: Callable[..., LoopSampler]) -> None:
    module, inputs = quantized(sampler, "unet")
    arguments = {"sample": inputs.sample, "timestep": 7}
    key = Call.of(module, arguments).signature.key
    assert key == Call.of(module, {**arguments, "timestep": torch.tensor(9)}).signature.key
    assert key == Call.of(module, {**arguments, "sample": inputs.sample[:1]}).signature.key
    assert key != Call.of(module, {**arguments, "return_dict": False}).signature.key
    assert key != Call.of(module, {**arguments, "sample": inputs.sample[..., :4]}).signature.key
