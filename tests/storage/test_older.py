"""Files that older versions of the package wrote open to the same bits.

Each folder in `older` holds a plain denoiser that the package of its time quantized (c38654c wrote version 1,
60da508 version 2), and what it made of that: the dequantized weights and a prediction.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import tfmq
from tfmq.nn.plan import packed_layers

OLDER = Path(__file__).parent / "older"


@pytest.mark.parametrize("version", [1, 2])
def test_weights_are_the_same_bits_and_predictions_the_same(build: Callable[..., Any], version: int) -> None:
    directory = OLDER / f"version{version}"
    assert json.loads((directory / "tfmq.json").read_text())["version"] == version
    expected: dict[str, Tensor] = load_file(directory / "expected.safetensors")
    denoiser, _ = build("plain", seed=1)
    module = tfmq.load(directory, module=denoiser.module, backend="simulated")
    weights = {f"weight.{name}": layer.weight for name, layer in packed_layers(module).items()}
    assert weights.keys() == {name for name in expected if name.startswith("weight.")}
    assert all(torch.equal(weight, expected[name]) for name, weight in weights.items())
    with torch.no_grad():
        prediction = module(expected["sample"], expected["timestep"].expand(2))
    # Kernels of floating point differ from processor to processor in their last bits.
    torch.testing.assert_close(prediction, expected["prediction"], rtol=1e-5, atol=1e-6)
