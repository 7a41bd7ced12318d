"""Rescaled inputs as a part of a job: executed by every backend, in graphs, stored, refused where they are
damaged.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tfmq
from tfmq.backends.backend import BACKENDS
from tfmq.backends.execution import execute
from tfmq.calibration.rescaling import Reader
from tfmq.jobs.judging import plain
from tfmq.models.denoiser import Denoiser, Inputs
from tfmq.models.sampler import LoopSampler
from tfmq.nn.packed_layer import PackedLayer
from tfmq.nn.plan import packed_layers
from tfmq.nn.transform import Transform
from tfmq.numerics.errors import sqnr_db
from tfmq.recipes import Recipe
from tfmq.recipes.recipe import Calibration, Rescaling, Rule
from tfmq.storage import read_tensors, seal, write_tensors
from tfmq.storage.errors import CheckpointError, ForeignFileError

Make = Callable[..., LoopSampler]
Given = Callable[[LoopSampler], Inputs]
NAMES = ("plain_rgb", "unet", "dit", "upsampler")


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    base = tfmq.scheme("rtn_w4a8")
    calibration = Calibration(samples=2, steps=3, interval=1, batch_size=2, judged=0.0)
    return replace(
        base, calibration=calibration, rescaling=Rescaling(equalizers=("ranges", "peaks"), rotation=256)
    )


def wild(readers: Sequence[Reader], **_: Any) -> Transform:
    """Return factors that every layer would be wrong without, and a rotation of those that may have one; for
    wide layers that are not rotated, and for those with more outputs than inputs, an order and two clusters.
    """
    layer, seen, _ = readers[0]
    width = layer.weight.shape[1] * layer.operation.groups
    factor = torch.exp2((torch.arange(width) * 5 % 7 - 3).float())
    if layer.operation.groups > 1 or width < 4 or (seen.group and len(layer.weight) <= width):
        return Transform(factor, seen.group)
    order = torch.arange(width).reshape(2, -1).T.flatten() if width % 2 == 0 else torch.arange(width).flip(0)
    return Transform(factor, order=order.int(), segments=(3, width - 3))


@pytest.fixture(scope="module")
def made(
    sampler: Make, recipe: Recipe, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, LoopSampler], Path]:
    """Return the models by name, and where "plain_rgb" was saved."""
    found, directory = {}, tmp_path_factory.mktemp("made") / "q"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tfmq.jobs.weights.best_transform", wild)
        for name in NAMES:
            found[name] = sampler(name)
            tfmq.quantize(found[name], recipe, output_dir=directory if name == "plain_rgb" else None)
    return found, directory


@pytest.fixture
def quantized(made: tuple[dict[str, LoopSampler], Path]) -> dict[str, LoopSampler]:
    return made[0]


@pytest.fixture
def saved(made: tuple[dict[str, LoopSampler], Path]) -> Path:
    return made[1]


def entry(structure: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the description of a layer."""
    return next(layer for layer in structure["layers"] if name in layer["names"])


def rescaled(module: torch.nn.Module) -> dict[str, PackedLayer]:
    return {name: layer for name, layer in packed_layers(module).items() if layer.factor is not None}


@torch.no_grad()
@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("name", NAMES)
def test_every_backend_rescales(
    quantized: dict[str, LoopSampler], name: str, backend: str, inputs_of: Given
) -> None:
    denoiser, inputs = quantized[name].denoiser, inputs_of(quantized[name])
    layers = packed_layers(denoiser.module).values()
    assert rescaled(denoiser.module) and (name != "dit" or any(layer.rotated for layer in layers))
    expected = denoiser(inputs)
    try:
        execute(denoiser.module, backend)
        found = denoiser(inputs)
    finally:
        execute(denoiser.module, "simulated")
    # `float` does not round inputs, which the wild factors make coarse. Where an engine takes the neighbour
    # of one code of the timestep's features, 20 dB are left; without the factors there would be no likeness.
    least = {"float": 5, "openvino": 15}
    assert sqnr_db(expected, found) > least.get(backend, 30)


@torch.no_grad()
@pytest.mark.parametrize("name", ["plain_rgb", "dit"])
def test_graphs_rescale(
    quantized: dict[str, LoopSampler], name: str, graph_sqnr_db: Callable[[LoopSampler], float]
) -> None:
    assert graph_sqnr_db(quantized[name]) > 60


@torch.no_grad()
def test_what_is_rescaled_is_saved_and_loaded(
    quantized: dict[str, LoopSampler], saved: Path, sampler: Make, inputs_of: Given
) -> None:
    drawn = quantized["plain_rgb"]
    inputs = inputs_of(drawn)
    loaded = tfmq.load(saved, module=sampler("plain_rgb", seed=1).denoiser.module, backend="simulated")
    assert torch.equal(Denoiser(loaded)(inputs), drawn.denoiser(inputs))
    manifest = json.loads((saved / "tfmq.json").read_text())
    named = {
        name for group in manifest["structure"]["layers"] for name in group["names"] if group.get("rescaled")
    }
    rotated = {
        name: layer.rotated for name, layer in packed_layers(drawn.denoiser.module).items() if layer.rotated
    }
    groups = manifest["structure"]["layers"]
    assert rotated == {
        name: group["rotated"] for group in groups if "rotated" in group for name in group["names"]
    }
    assert manifest["version"] == 3 and named == rescaled(drawn.denoiser.module).keys()
    assert not any("embed" in name or "shift" in name for name in named), (
        "the temporal block has exact ranges of its own"
    )


def test_layers_that_share_a_transform_are_stored_apart(
    sampler: Make, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Libraries refuse to write a tensor that two names have."""

    def alike(readers: Sequence[Reader], **_: Any) -> Transform:
        width = readers[0].layer.weight.shape[1]
        order = torch.arange(width, dtype=torch.int32).flip(0)
        return Transform(torch.full((width,), 2.0), 0, order, (width - 1, 1))

    monkeypatch.setattr("tfmq.jobs.weights.best_transform", alike)
    drawn = sampler("dit")
    tfmq.quantize(drawn, replace(recipe, calibration=replace(recipe.calibration, steps=2)))
    drawn.denoiser.module.save_pretrained(tmp_path / "q")
    attention = drawn.denoiser.module.transformer_blocks[0].attn1
    assert torch.equal(attention.to_q.order, attention.to_k.order)


def test_measured_factors_bring_a_planted_model_back(
    sampler: Make, recipe: Recipe, script: Callable[[str], Any], inputs_of: Given
) -> None:
    """One channel behind each norm is 64 times as large, and its readers' weights as much smaller: the same
    model, harder to quantize.
    """

    def planted() -> LoopSampler:
        drawn = sampler("dit")
        module = drawn.denoiser.module
        with torch.no_grad():
            # adaLN-Zero starts at zero, where nothing would show.
            for parameter in module.parameters():
                parameter.add_(
                    0.1
                    * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
                )
        outliers = script("benchmarks/planted.py").norm_outliers(module)
        return LoopSampler(
            Denoiser(outliers), drawn.scheduler, shape=drawn.shape, conditions=drawn.conditions
        )

    inputs = inputs_of(planted())
    expected = planted().denoiser(inputs)
    found = {}
    for name, equalizers in (("off", ()), ("on", ("ranges",))):
        drawn = planted()
        tfmq.quantize(
            drawn,
            replace(
                recipe, weights=replace(recipe.weights, bits=8), rescaling=Rescaling(equalizers=equalizers)
            ),
        )
        assert bool(rescaled(drawn.denoiser.module)) == bool(equalizers)
        found[name] = sqnr_db(expected, drawn.denoiser(inputs))
    assert found["on"] > found["off"] + 6, found


def test_a_killed_job_has_the_same_factors(
    sampler: Make, recipe: Recipe, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tfmq.jobs.weights.best_transform", wild)
    whole = json.loads((saved / "tfmq_report.json").read_text())

    def stop(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("tfmq.jobs.calibration.collect", stop)
        tfmq.quantize(sampler("plain_rgb"), recipe, output_dir=tmp_path / "q")
    with monkeypatch.context() as patch:
        patch.setattr("tfmq.jobs.weights.observe", lambda *_, **__: pytest.fail("observed again"))
        resumed = tfmq.quantize(sampler("plain_rgb"), recipe, output_dir=tmp_path / "q", resume=True).report
    assert resumed["sha256"] == whole["sha256"]


@torch.no_grad()
def test_a_rule_says_which_layers_are_rescaled(
    sampler: Make, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    offered: dict[str, int] = {}

    def noted(readers: Sequence[Reader], *, equalizers: tuple[str, ...], **_: Any) -> Transform:
        offered[" ".join(equalizers)] = readers[0].seen.group
        return wild(readers)

    monkeypatch.setattr("tfmq.jobs.weights.best_transform", noted)
    drawn, name = sampler("dit"), "transformer_blocks.0.attn1"
    ruled = replace(
        recipe,
        rescaling=Rescaling(),
        rules=(
            Rule(match=f"{name}.to_out.0", rescaling={"equalizers": ("peaks",)}),
            Rule(match=f"{name}.to_q", rescaling={"equalizers": ("ranges",), "rotation": 4}),
            *recipe.rules,
        ),
    )
    tfmq.quantize(drawn, ruled)
    layers = packed_layers(drawn.denoiser.module)
    assert rescaled(drawn.denoiser.module).keys() == {f"{name}.to_out.0", f"{name}.to_q"}
    assert {n: layer.rotated for n, layer in layers.items() if layer.rotated} == {f"{name}.to_q": 4}
    assert offered == {"peaks": 0, "ranges": 4}
    assert plain(ruled).rules == recipe.rules
    clustered = replace(
        ruled,
        activations=replace(recipe.activations, clusters=4),
        rules=(Rule(match=f"{name}.to_q", activations={"clusters": 2}), *ruled.rules),
    )
    assert plain(clustered) == plain(ruled)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda s, t: t["exit.factor"].fill_(0.0), CheckpointError, "factor that is not positive"),
        (lambda s, t: t["exit.factor"].fill_(float("inf")), CheckpointError, "factor that is not positive"),
        (lambda s, t: t.pop("exit.factor"), CheckpointError, r"exit\.factor, which is missing"),
        (lambda s, t: t.update({"exit.factor": torch.ones(3)}), ValueError, r"exit\.factor"),
        (lambda s, t: s["layers"][0].update(rescaled="yes"), ForeignFileError, "rescaled"),
        (lambda s, t: s["layers"][0].update(rotated=True), ForeignFileError, "rotated"),
        (lambda s, t: s["layers"][0].update(rotated=32), ForeignFileError, "rotated is 32; .*power of four"),
        (lambda s, t: s["layers"][0].update(rotated=4**9), ForeignFileError, "rotated"),
        (lambda s, t: entry(s, "embed").update(rotated=16), ValueError, "rotates 16 inputs together"),
        (lambda s, t: entry(s, "exit").update(rotated=4), ValueError, "rotated input, which linear layers"),
        (lambda s, t: t["exit.order"].fill_(0), CheckpointError, "not each of 16 channels once"),
        (lambda s, t: t["exit.order"].add_(1), CheckpointError, "not each of 16 channels once"),
        (lambda s, t: t.update({"exit.order": torch.arange(8)}), CheckpointError, r"int64 \[8\], not int32"),
        (lambda s, t: t.pop("exit.order"), CheckpointError, r"exit\.order, which is missing"),
        (lambda s, t: s["layers"][0].update(ordered=1), ForeignFileError, "ordered"),
        (lambda s, t: entry(s, "embed").update(ordered=True), ForeignFileError, "a layer without segments"),
    ],
    ids=[
        "zero",
        "infinite",
        "missing",
        "short",
        "type",
        "turned",
        "no power",
        "too large",
        "no part",
        "image",
        "twice",
        "beyond",
        "wide order",
        "no order",
        "order type",
        "whole",
    ],
)
def test_a_damaged_factor_is_refused_by_name(
    sampler: Make,
    saved: Path,
    tmp_path: Path,
    change: Callable[[Any, Any], Any],
    error: type[Exception],
    message: str,
) -> None:
    directory = shutil.copytree(saved, tmp_path / "q")
    tensors, _ = read_tensors(directory / "tfmq_model.safetensors")
    manifest = json.loads((directory / "tfmq.json").read_text())
    change(manifest["structure"], tensors)
    write_tensors(directory / "tfmq_model.safetensors", tensors)
    (directory / "tfmq.json").write_text(json.dumps(seal(tensors, manifest)))
    with pytest.raises(error, match=message):
        tfmq.load(directory, module=sampler("plain_rgb").denoiser.module)
