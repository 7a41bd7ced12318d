"""Exported models run without tfmq and compute what the reference does, keyed by timestep, for any batch."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import tfmq
from tfmq.backends.execution import execute
from tfmq.export.directory import DESCRIPTION, export
from tfmq.models.denoiser import Denoiser
from tfmq.models.sampler import LoopSampler
from tfmq.nn.plan import packed_layers
from tfmq.numerics.errors import sqnr_db


@pytest.fixture(scope="module", params=["plain", "upsampler", "plain grouped"])
def quantized(
    sampler: Callable[..., LoopSampler], request: pytest.FixtureRequest
) -> tuple[LoopSampler, dict[str, Tensor], Tensor]:
    """A quantized denoiser, the inputs of a call at two timesteps, and its exact output."""
    name, _, grouped = request.param.partition(" ")
    made = sampler(name)
    recipe = tfmq.scheme("w4a8" if grouped else "w8a8")
    recipe = replace(
        recipe,
        weights=replace(recipe.weights, ranges="min_max", group=8 if grouped else 0),
        activations=replace(recipe.activations, ranges="min_max"),
        rounding=replace(recipe.rounding, solver="nearest"),
        calibration=replace(recipe.calibration, steps=3, samples=2),
        temporal=replace(recipe.temporal, learning=replace(recipe.temporal.learning, iterations=1)),
    )
    tfmq.quantize(made, recipe)
    module: nn.Module = made.denoiser.module
    assert any(layer.group for layer in packed_layers(module).values()) == bool(grouped)
    torch.manual_seed(3)
    inputs = {"x": torch.randn(3, 2, 8, 8), "t": module.tfmq_steps.timesteps[[2, 0, 1]].long()}
    if name == "upsampler":
        inputs["class_labels"] = torch.tensor([3, 0, 9])
    execute(module, "reference")
    with torch.no_grad():
        return made, inputs, module(**inputs)


def run_openvino(directory: Path, inputs: dict[str, Tensor]) -> Tensor:
    import openvino

    model = openvino.compile_model(directory / "denoiser.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return torch.from_numpy(model({name: value.numpy() for name, value in inputs.items()})["out_0"].copy())


def run_onnx(directory: Path, inputs: dict[str, Tensor]) -> Tensor:
    session = pytest.importorskip("onnxruntime").InferenceSession(
        directory / "denoiser.onnx", providers=["CPUExecutionProvider"]
    )
    return torch.from_numpy(
        session.run(["out_0"], {name: value.numpy() for name, value in inputs.items()})[0]
    )


@pytest.mark.filterwarnings("ignore:.*was not calibrated")
@pytest.mark.parametrize(
    ("target", "package", "run"), [("openvino", "openvino", run_openvino), ("onnx", "onnxscript", run_onnx)]
)
def test_an_exported_model_runs_on_its_own(
    quantized: tuple[LoopSampler, dict[str, Tensor], Tensor],
    tmp_path: Path,
    target: str,
    package: str,
    run: Callable[..., Tensor],
) -> None:
    pytest.importorskip(package)
    made, inputs, expected = quantized
    example = made.example()
    described = export(made.denoiser, replace(example, timestep=example.timestep.long()), tmp_path, to=target)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*described["files"], DESCRIPTION])
    assert json.loads((tmp_path / DESCRIPTION).read_text()) == described
    assert [port["name"] for port in described["inputs"]] == list(inputs)
    assert described["inputs"][0]["shape"] == ["batch", 2, 8, 8]
    assert sqnr_db(expected, run(tmp_path, inputs)) > 40
    first = {name: value[:1] for name, value in inputs.items()}
    assert sqnr_db(expected[:1], run(tmp_path, first)) > 40
    # Two samples at timesteps that no table knows, one at a calibrated one.
    unseen = {**inputs, "t": inputs["t"] + torch.tensor([-100, 0, 100])}
    with torch.no_grad():
        between = made.denoiser.module(**unseen)
    assert sqnr_db(between, run(tmp_path, unseen)) > 40 > sqnr_db(between, expected)


def test_what_cannot_be_exported(
    quantized: tuple[LoopSampler, dict[str, Tensor], Tensor],
    sampler: Callable[..., LoopSampler],
    tmp_path: Path,
) -> None:
    made = quantized[0]
    with pytest.raises(ValueError, match=r"cannot export to 'tflite'; choose one of openvino, onnx"):
        export(made.denoiser, made.example(), tmp_path, to="tflite")
    pytest.importorskip("openvino")
    full = sampler("plain")
    with pytest.raises(ValueError, match="not quantized"):
        export(Denoiser(full.denoiser.module), full.example(), tmp_path, to="openvino")
