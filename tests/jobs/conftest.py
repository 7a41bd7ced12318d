"""What a denoiser of these tests is called with, and how near its graph comes to it."""

from collections.abc import Callable

import pytest
import torch

from tfmq.export.capture import Call, KeyedGraph, capture
from tfmq.models.denoiser import Inputs
from tfmq.models.sampler import LoopSampler
from tfmq.numerics.errors import sqnr_db


@pytest.fixture(scope="session")
def inputs_of() -> Callable[[LoopSampler], Inputs]:
    """Return a function that makes two samples of noise at two timesteps, for the denoiser of a sampler."""

    def made(sampler: LoopSampler) -> Inputs:
        example = sampler.example().resized(2)
        noise = torch.randn(example.sample.shape, generator=torch.Generator().manual_seed(0))
        return Inputs(noise, torch.tensor([333, 666]), example.conditions)

    return made


@pytest.fixture(scope="session")
def graph_sqnr_db(inputs_of: Callable[[LoopSampler], Inputs]) -> Callable[[LoopSampler], float]:
    """Return a function that measures how near the graph of a quantized denoiser, keyed by the timestep and
    for any batch, comes to the denoiser.
    """

    @torch.no_grad()
    def measured(sampler: LoopSampler) -> float:
        denoiser, inputs = sampler.denoiser, inputs_of(sampler)
        arguments = {denoiser.sample: inputs.sample, denoiser.timestep: inputs.timestep, **inputs.conditions}
        call = Call.of(denoiser.module, arguments)
        program = capture(KeyedGraph(denoiser.module, call.signature), call, dynamic=True)
        return float(sqnr_db(denoiser(inputs), program.module()(*call.tensors)[0]))

    return measured
