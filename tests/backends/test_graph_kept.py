"""How many compiled graphs a denoiser keeps."""

from collections.abc import Callable
from dataclasses import replace

import torch

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
