"""How many compiled graphs a denoiser keeps, and which calls share one."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

import tfmq
from tfmq.backends.graph import KEPT, LONG, GraphExecutor, Run
from tfmq.export.capture import Call, Graph
from tfmq.models.denoiser import Denoiser, Inputs
from tfmq.models.sampler import LoopSampler
from tfmq.nn.swap import attach_steps
from tfmq.quantizers.steps import StepContext
from tfmq.recipes.recipe import Calibration


class Choosing(nn.Module):
    """Returns a tuple, or with `return_dict` a dictionary, which may hold a second tensor."""

    def __init__(self, *more: str) -> None:
        super().__init__()
        self.more = more
        self.calls: list[int] = []
        self.computed: list[int] = []
        attach_steps(self, StepContext(torch.tensor([10.0, 500.0])), timestep="timestep")

    def forward(
        self, sample: Tensor, timestep: Tensor, scale: float | None = None, return_dict: bool = True
    ) -> Any:
        self.calls.append(len(sample))
        if not isinstance(sample, FakeTensor):
            self.computed.append(len(sample))
        scaled = sample * (2.0 if scale is None else scale)
        return {"sample": scaled, **dict.fromkeys(self.more, -sample)} if return_dict else (scaled,)


def counted(module: nn.Module) -> list[str]:
    """Let `module` run as graphs without an engine; return the list of what is built from now on."""
    built: list[str] = []

    def build(graph: Graph, call: Call) -> Run:
        built.append(call.signature.key)
        return lambda bins, inputs: graph(bins, *inputs)

    module.tfmq_executor = GraphExecutor(module, build)  # type: ignore[assignment]
    return built


@torch.no_grad()
def test_calls_share_a_graph_whatever_wraps_their_output_or_says_a_default() -> None:
    module, sample = Choosing(), torch.randn(3, 2)
    built = counted(module)
    wrapped = module(sample, torch.tensor([10]))
    (first,) = module(sample, 10, scale=None, return_dict=False)
    assert wrapped.keys() == {"sample"} and torch.equal(wrapped["sample"], first)
    assert torch.equal(first, 2 * sample) and len(built) == 1
    (other,) = module(sample, 10, scale=3.0, return_dict=False)
    assert torch.equal(other, 3 * sample) and len(built) == 2
    # One row of each kind of call says what wraps its output, without its values; another executor of the
    # model knows it.
    assert module.calls.count(1) == 3 and 1 not in module.computed
    counted(module)
    module(sample, torch.tensor([10]))
    assert module.calls.count(1) == 3


class Looking(Choosing):
    """Looks at a value, which fake tensors have none of."""

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = True) -> Any:
        return super().forward(sample * float(sample.abs().max() > 0), timestep, return_dict=return_dict)


@torch.no_grad()
def test_a_model_that_looks_at_values_is_run_for_its_wrap() -> None:
    module, sample = Looking(), torch.randn(3, 2)
    counted(module)
    assert torch.equal(module(sample, 10)["sample"], 2 * sample)
    assert module.computed == [1, 3, 3]


@torch.no_grad()
def test_a_model_that_wraps_more_tensors_has_a_graph_for_each_wrap() -> None:
    module, sample = Choosing("negative"), torch.randn(3, 2)
    built = counted(module)
    for _ in range(2):
        (first,) = module(sample, 10, return_dict=False)
        wrapped = module(sample, 10)
        assert torch.equal(wrapped["sample"], first) and torch.equal(wrapped["negative"], -sample)
    assert len(set(built)) == 2


@torch.no_grad()
def test_a_pipeline_and_its_denoiser_alone_share_a_graph(sampler: Callable[..., LoopSampler]) -> None:
    made = sampler("sdxl")
    tfmq.quantize(
        made, replace(tfmq.scheme("rtn_w8a8"), calibration=Calibration(samples=2, steps=2, interval=1))
    )
    module, example = made.denoiser.module, made.example().resized(2)
    inputs = replace(example, timestep=module.tfmq_steps.timesteps[:1].expand(2).long())
    expected, built = made.denoiser(inputs), counted(made.denoiser.module)
    (found,) = module(
        inputs.sample,
        inputs.timestep[0],
        **inputs.conditions,
        timestep_cond=None,
        cross_attention_kwargs=None,
        return_dict=False,
    )
    assert torch.equal(found, expected) and torch.equal(Denoiser(module)(inputs), expected)
    assert (
        type(module(inputs.sample, inputs.timestep, **inputs.conditions)).__name__ == "UNet2DConditionOutput"
    )
    assert len(built) == 1


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


@pytest.mark.parametrize(
    ("seconds", "sizes"), [(0.9 * LONG, [2, 6, 3]), (LONG, [2, 2, 2, 2, 3]), (2 * LONG, [2, 2, 2, 2, 3])]
)
@pytest.mark.filterwarnings("ignore:.*was not calibrated")
@torch.no_grad()
def test_a_graph_that_takes_long_computes_larger_batches_part_by_part(
    sampler: Callable[..., LoopSampler],
    monkeypatch: pytest.MonkeyPatch,
    seconds: float,
    sizes: list[int],
) -> None:
    """Batches of two, six and three: three is no multiple of two."""
    made, now, ran = sampler("conditional"), [0.0], []
    recipe = replace(tfmq.scheme("quick_w8a8"), calibration=Calibration(samples=2, steps=2, interval=1))
    tfmq.quantize(made, recipe)
    denoiser, example = made.denoiser, made.example()
    known = denoiser.module.tfmq_steps.timesteps.long()

    def build(graph: Graph, call: Call) -> Run:
        def run(bins: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            now[0] += seconds
            ran.append(len(bins))
            return graph(bins, *inputs)

        return run

    monkeypatch.setattr("tfmq.stopwatch.clock", lambda: now[0])
    batch = example.resized(6)
    sample, generator = batch.sample, torch.Generator().manual_seed(0)
    # Some timesteps of their own, one of them in no table.
    timestep = torch.cat([known[[0, 1, 0, 1, 1]], known[:1] + 7])
    inputs = replace(batch, sample=torch.randn(sample.shape, generator=generator), timestep=timestep)
    expected = denoiser(inputs)
    denoiser.module.tfmq_executor = GraphExecutor(denoiser.module, build)
    found = [denoiser(part) for part in (inputs.rows(0, 2), inputs, inputs.rows(0, 3))]
    # Each graph runs once more when it is built.
    for size in set(sizes):
        ran.remove(size)
    assert ran == sizes
    for rows, one in zip((2, 6, 3), found, strict=True):
        torch.testing.assert_close(one, expected[:rows], rtol=0, atol=1e-5)
