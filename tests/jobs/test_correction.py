"""Corrections as a part of a job: executed by every backend, stored, moved to another schedule, refused where
they are damaged.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tfmq
from tfmq.backends.backend import BACKENDS
from tfmq.backends.execution import execute
from tfmq.errors import require
from tfmq.export.capture import Call, Graph, KeyedGraph, capture
from tfmq.jobs.correction import channel_axis
from tfmq.models.denoiser import Denoiser, Inputs
from tfmq.models.sampler import LoopSampler
from tfmq.nn.correction import Correction, correction_of
from tfmq.nn.swap import steps_of
from tfmq.numerics.errors import sqnr_db
from tfmq.recipes import Recipe
from tfmq.recipes.recipe import Calibration
from tfmq.recipes.recipe import Correction as CorrectionFields
from tfmq.storage.errors import CheckpointError, ForeignFileError

Make = Callable[..., LoopSampler]
Given = Callable[[LoopSampler], Inputs]
STEPS = 3


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    base = tfmq.scheme("rtn_w4a8")
    return replace(
        base,
        calibration=Calibration(samples=4, steps=STEPS, interval=1, batch_size=4, judged=0.0),
        correction=CorrectionFields(estimators=("bias", "gain", "affine")),
    )


def planted(module: nn.Module, *, gain: float) -> Correction:
    """Give a quantized model's correction values that nobody can miss."""
    correction = correction_of(module)
    assert correction is not None
    with torch.no_grad():
        rows = torch.arange(correction.gain.numel()).reshape(correction.gain.shape)
        correction.gain.copy_(gain + rows / 10)
        correction.bias.copy_(rows / 7)
    return correction


@pytest.fixture(scope="module")
def whole(
    sampler: Make, recipe: Recipe, tmp_path_factory: pytest.TempPathFactory
) -> tuple[LoopSampler, Any, Path]:
    """Return a model, the report of its job, and where it was saved."""
    drawn, directory = sampler("plain_rgb"), tmp_path_factory.mktemp("whole") / "q"
    return drawn, tfmq.quantize(drawn, recipe, output_dir=directory).report, directory


@pytest.fixture
def made(whole: tuple[LoopSampler, Any, Path]) -> tuple[LoopSampler, dict[str, Any]]:
    return whole[0], dict(whole[1]["correction"])


@torch.no_grad()
def test_a_correction_is_found_and_reported(
    made: tuple[LoopSampler, dict[str, Any]], sampler: Make, recipe: Recipe, inputs_of: Given
) -> None:
    drawn, report = made
    assert len(report["by_step"]) == STEPS and sum(report["steps"].values()) == STEPS
    assert 0 <= report["explained"] < 1 and all(0 <= share < 1 for share in report["by_step"])
    again = sampler("plain_rgb")
    tfmq.quantize(again, replace(recipe, correction=CorrectionFields()))
    correction = correction_of(drawn.denoiser.module)
    assert correction is not None and correction_of(again.denoiser.module) is None
    inputs = inputs_of(drawn)
    steps = steps_of(drawn.denoiser.module)
    with steps.at(inputs.timestep):
        expected = correction(again.denoiser(inputs))
    assert torch.equal(drawn.denoiser(inputs), expected)


@torch.no_grad()
@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_every_backend_corrects(
    made: tuple[LoopSampler, dict[str, Any]], backend: str, inputs_of: Given
) -> None:
    drawn, inputs = made[0], inputs_of(made[0])
    module = drawn.denoiser.module
    correction = planted(module, gain=1.5)
    without = [value.clone() for value in (correction.gain, correction.bias)]
    expected = drawn.denoiser(inputs)
    try:
        execute(module, backend)
        # `float` does not round the inputs of layers.
        assert sqnr_db(expected, drawn.denoiser(inputs)) > (20 if backend == "float" else 30)
        correction.gain.fill_(1.0)
        correction.bias.fill_(0.0)
        execute(module, backend)
        assert sqnr_db(expected, drawn.denoiser(inputs)) < 10
    finally:
        execute(module, "simulated")
        correction.gain.copy_(without[0])
        correction.bias.copy_(without[1])


@torch.no_grad()
@pytest.mark.parametrize("kind", [Graph, KeyedGraph])
def test_graphs_correct(
    made: tuple[LoopSampler, dict[str, Any]], kind: type[Graph], inputs_of: Given
) -> None:
    drawn, inputs = made[0], inputs_of(made[0])
    module = drawn.denoiser.module
    planted(module, gain=1.5)
    call = Call.of(module, {"x": inputs.sample, "t": inputs.timestep})
    graph = kind(module, call.signature)
    bins, _ = steps_of(module).lookup(inputs.timestep)
    program = capture(graph, call, dynamic=True)
    given = call.tensors if kind is KeyedGraph else graph.arguments(bins, call.tensors)
    assert sqnr_db(drawn.denoiser(inputs), program.module()(*given)[0]) > 60


@torch.no_grad()
def test_a_correction_is_saved_and_loaded_and_follows_another_schedule(
    sampler: Make, recipe: Recipe, tmp_path: Path, inputs_of: Given
) -> None:
    drawn = sampler("plain_rgb")
    tfmq.quantize(drawn, recipe, output_dir=tmp_path / "q")
    module, inputs = drawn.denoiser.module, inputs_of(drawn)
    loaded = tfmq.load(
        tmp_path / "q", module=sampler("plain_rgb", seed=1).denoiser.module, backend="simulated"
    )
    assert torch.equal(Denoiser(loaded)(inputs), drawn.denoiser(inputs))
    manifest = json.loads((tmp_path / "q" / "tfmq.json").read_text())
    assert manifest["version"] == 3
    assert manifest["structure"]["corrections"] == [{"channels": 3, "axis": 1, "names": ["tfmq_correction"]}]
    correction = planted(module, gain=1.0)
    before = correction.gain.clone()
    tfmq.rebake(drawn, sampler("plain_rgb"), steps=2 * STEPS)
    assert correction.gain.shape == (2 * STEPS, 3) and set(map(tuple, correction.gain.tolist())) <= set(
        map(tuple, before.tolist())
    )
    assert bool(drawn.run(range(1), steps=2 * STEPS, seed=0).isfinite().all())


def test_a_killed_job_has_the_same_correction(
    sampler: Make,
    recipe: Recipe,
    whole: tuple[LoopSampler, Any, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, report, _ = whole

    def stop(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("tfmq.api._manifest", stop)
        tfmq.quantize(sampler("plain_rgb"), recipe, output_dir=tmp_path / "q")
    with monkeypatch.context() as patch:
        patch.setattr("tfmq.jobs.correction.Fitting", lambda *_, **__: pytest.fail("fitted again"))
        resumed = tfmq.quantize(sampler("plain_rgb"), recipe, output_dir=tmp_path / "q", resume=True).report
    assert resumed["sha256"] == report["sha256"] and resumed["correction"] == report["correction"]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda s, t: s["corrections"][0].update(channels=4), CheckpointError, "tfmq_correction.gain"),
        (lambda s, t: s["corrections"][0].update(channels=0), ForeignFileError, "channels"),
        (lambda s, t: s["corrections"][0].pop("axis"), ForeignFileError, "axis"),
        (lambda s, t: t["tfmq_correction.bias"].fill_(float("nan")), CheckpointError, "not finite"),
        (lambda s, t: t.pop("tfmq_correction.gain"), CheckpointError, "tfmq_correction.gain"),
        (lambda s, t: s.update(branches=[]), ForeignFileError, "branches"),
    ],
    ids=["channels", "none", "axis", "nan", "missing", "unknown section"],
)
def test_a_damaged_correction_is_refused_by_name(
    sampler: Make,
    whole: tuple[LoopSampler, Any, Path],
    tmp_path: Path,
    change: Callable[[Any, Any], Any],
    error: type[Exception],
    message: str,
) -> None:
    from tfmq.storage import read_tensors, seal, write_tensors

    directory = shutil.copytree(whole[2], tmp_path / "q")
    tensors, _ = read_tensors(directory / "tfmq_model.safetensors")
    manifest = json.loads((directory / "tfmq.json").read_text())
    change(manifest["structure"], tensors)
    write_tensors(directory / "tfmq_model.safetensors", tensors)
    (directory / "tfmq.json").write_text(json.dumps(seal(tensors, manifest)))
    with pytest.raises(error, match=message):
        tfmq.load(directory, module=sampler("plain_rgb").denoiser.module)


def test_a_recipe_says_which_estimators_compete(recipe: Recipe) -> None:
    yaml = require("tfmq.recipes.yaml", extra="cli")
    assert yaml.from_dict(yaml.to_dict(recipe)) == recipe
    with pytest.raises(
        ValueError, match=r"correction\.estimators is 'magic'; it must be one of bias, gain, affine"
    ):
        CorrectionFields(estimators=("magic",))
    with pytest.raises(ValueError, match="twice"):
        CorrectionFields(estimators=("bias", "bias"))


def test_tokens_have_their_channels_last() -> None:
    tokens, lines, image = torch.zeros(1, 4, 8), torch.zeros(1, 8, 4), torch.zeros(1, 3, 4, 4)
    assert channel_axis(tokens, nn.Linear(2, 8)) == -1
    assert channel_axis(lines, nn.Conv1d(2, 8, 1)) == 1
    assert channel_axis(image, nn.Linear(2, 12)) == 1
