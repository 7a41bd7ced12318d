"""Models that an engine cannot compile as they are run all the same, and each fault of docs/upstream.md is
still one.
"""

import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tfmq
from tfmq.backends.execution import execute
from tfmq.kernels.halves import saturates
from tfmq.models.denoiser import Denoiser, Inputs
from tfmq.models.sampler import LoopSampler
from tfmq.numerics.errors import sqnr_db
from tfmq.recipes.recipe import Calibration

ov = pytest.importorskip("openvino")

from openvino import opset13 as ops  # noqa: E402

from tfmq.export.workarounds import scale_by_single_weights  # noqa: E402


class Normalized(nn.Module):
    """A denoiser with a normalisation over channels and places, which is shifted by a perceptron of width one
    for its one channel.
    """

    def __init__(self, rows: Callable[[Tensor], int]) -> None:
        super().__init__()
        self.rows = rows
        self.embedding = nn.Embedding(1000, 16)
        self.shift = nn.Sequential(nn.Linear(16, 1), nn.GELU(), nn.Linear(1, 1))
        self.norm = nn.LayerNorm([1, 6, 6])
        self.entry, self.exit = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 1, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        shift = self.shift(self.embedding(t)).reshape(self.rows(x), -1, 1, 1)
        return self.exit(F.silu(self.entry(self.norm(x + shift))))


def size(x: Tensor) -> int:
    """The batch as a graph sees it."""
    return x.shape[0]


def quantized(rows: Callable[[Tensor], int]) -> LoopSampler:
    """Return a sampler of such a model in W8A8, its temporal layers in the graph."""
    from diffusers import DDIMScheduler

    made = LoopSampler(Denoiser(Normalized(rows).eval()), DDIMScheduler(), shape=(1, 6, 6))
    tfmq.quantize(made, replace(tfmq.scheme("rtn_w8a8"), calibration=Calibration(samples=1, steps=2)))
    return made


# `len` is a number to whoever captures a graph: it fixes the batch.
@pytest.mark.parametrize("rows", [size, len])
def test_a_perceptron_of_width_one_runs_at_every_batch(
    rows: Callable[[Tensor], int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TFMQ_CACHE", str(tmp_path))
    made = quantized(rows)
    module, noise = made.denoiser.module, torch.randn(3, 1, 6, 6)
    timestep = module.tfmq_steps.timesteps[[0, 1, 0]].long()
    execute(module, "reference")
    with torch.no_grad():
        exact = made.denoiser(Inputs(noise, timestep))
        execute(module, "openvino")
        for batch in (1, 2, 3):
            assert sqnr_db(exact[:batch], made.denoiser(Inputs(noise[:batch], timestep[:batch]))) > 40


@torch.no_grad()
@pytest.mark.skipif(saturates(), reason="without VNNI integer products are computed one by one")
def test_an_engine_that_fails_to_compile_names_the_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        compiled(perceptron((3, 1, 1)))
        pytest.skip("this OpenVINO has the fault mended")
    except RuntimeError as error:
        assert "Layout rank" in str(error)
    monkeypatch.setenv("TFMQ_CACHE", str(tmp_path))
    monkeypatch.setattr("tfmq.export.openvino.scale_by_single_weights", lambda model: None)
    made = quantized(size)
    execute(made.denoiser.module, "openvino")
    said = (
        r"OpenVINO cannot compile the denoiser for a batch of 1: Layout rank .*; "
        r"at MatMul \S+ of the layer shift\.2; torch computes"
    )
    with pytest.warns(UserWarning, match=said):
        made.denoiser(Inputs(torch.randn(1, 1, 6, 6), made.denoiser.module.tfmq_steps.timesteps[:1].long()))


def perceptron(widths: tuple[int, ...]) -> Any:
    """Return the OpenVINO model of a perceptron."""
    given = y = ops.parameter([2, widths[0]], ov.Type.f32)
    for entry, leave in itertools.pairwise(widths):
        y = ops.relu(
            ops.matmul(
                y, np.arange(1.0, entry * leave + 1, dtype=np.float32).reshape(leave, entry), False, True
            )
        )
    return ov.Model([y], [given])


def compiled(model: Any) -> Any:
    return ov.compile_model(model, "CPU", {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"})


@pytest.mark.parametrize("widths", [(3, 1, 1), (1, 1, 3), (1, 1, 1, 1), (3, 2, 1, 1, 2)])
def test_a_product_with_one_weight_is_a_multiplication(widths: tuple[int, ...]) -> None:
    model = perceptron(widths)
    scale_by_single_weights(model)
    kinds = Counter(node.get_type_name() for node in model.get_ops())
    ones = sum(pair == (1, 1) for pair in itertools.pairwise(widths))
    assert kinds["Multiply"] == ones and kinds["MatMul"] == len(widths) - 1 - ones
    x = torch.randn(2, widths[0]).abs()
    expected = x
    for entry, leave in itertools.pairwise(widths):
        expected = F.relu(expected @ torch.arange(1.0, entry * leave + 1).reshape(leave, entry).T)
    torch.testing.assert_close(torch.from_numpy(compiled(model)([x.numpy()])[0].copy()), expected)
