"""How many compiled graphs a denoiser keeps."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import tfmq
from tfmq.backends.graph import KEPT, GraphExecutor, Run
from tfmq.export.capture import Call, Graph
from tfmq.models.denoiser import Inputs
from tfmq.models.sampler import LoopSampler
from tfmq.recipes.recipe import Calibration


@torch.no_grad()
def test_the_graph_used_longest_ago_goes(sampler: Callable[..., LoopSampler]) -> None:
    """Whoever draws batches of many sizes does not fill the memory with compiled weights."""
    made, built = sampler("plain"), []
    tfmq.quantize(
        made, replace(tfmq.scheme("rtn_w8a8"), calibration=Calibration(samples=2, steps=2, interval=1))
    )
    denoiser, timestep = made.denoiser, made.denoiser.module.tfmq_steps.timesteps[:1].long()

    def build(graph: Graph, call: Call) -> Run:
        built.append(call.batch)
        return lambda bins, inputs: graph(bins, *inputs)

    denoiser.module.tfmq_executor = GraphExecutor(denoiser.module, build)

    def called(batch: int) -> None:
        denoiser(Inputs(torch.zeros(batch, 2, 8, 8), timestep))

    for batch in range(1, KEPT + 1):
        called(batch)
    called(1)
    assert built == [*range(1, KEPT + 1)]
    called(KEPT + 1)
    called(1)
    assert built == [*range(1, KEPT + 2)]
    called(2)
    assert built[-1] == 2


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*was not calibrated")
def test_features_of_a_timestep_outside_of_the_tables_are_computed_once(
    sampler: Callable[..., LoopSampler],
) -> None:
    made, ran = sampler("plain"), []
    recipe = replace(tfmq.scheme("quick_w8a8"), calibration=Calibration(samples=2, steps=2, interval=1))
    tfmq.quantize(made, recipe)
    denoiser = made.denoiser
    known = denoiser.module.tfmq_steps.timesteps.long()

    def build(graph: Graph, call: Call) -> Run:
        def run(bins: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            ran.append(graph.kind)
            return graph(bins, *inputs)

        return run

    sample = torch.randn(3, 2, 8, 8)
    timesteps = [known[:1], known[:1] + 30, known[:1] + 60, known[:1] + 30, known[:1] + 60]
    expected = [denoiser(Inputs(sample, timestep)) for timestep in timesteps]
    denoiser.module.tfmq_executor = GraphExecutor(denoiser.module, build)
    found = [denoiser(Inputs(sample, timestep)) for timestep in timesteps]
    assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))
    # One run of each graph more than there are calls, at which an engine compiles.
    assert (ran.count("features"), ran.count("denoiser")) == (3, 6)
    # Samples at timesteps of their own are computed together.
    timestep = torch.cat([known[:1] + 30, known[:1], known[:1] + 90])
    torch.testing.assert_close(denoiser(Inputs(sample, timestep))[1], found[0][1], rtol=0, atol=1e-5)
    assert ran.count("features") == 4
