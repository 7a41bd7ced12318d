"""Branches as a part of a job: executed by every backend, in graphs, stored, refused where they are
damaged.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tfmq
from tfmq.backends.backend import BACKENDS
from tfmq.backends.execution import execute
from tfmq.calibration.rescaling import Reader
from tfmq.calibration.splitting import Split
from tfmq.models.denoiser import Denoiser, Inputs
from tfmq.models.sampler import LoopSampler
from tfmq.nn.plan import packed_layers
from tfmq.nn.transform import Transform
from tfmq.numerics.errors import sqnr_db
from tfmq.numerics.low_rank import truncated
from tfmq.recipes import Recipe, Rule
from tfmq.recipes.recipe import Branch, Calibration, Rescaling
from tfmq.storage import read_tensors, seal, write_tensors
from tfmq.storage.digest import tensor_digest
from tfmq.storage.errors import CheckpointError, ForeignFileError

Make = Callable[..., LoopSampler]
Given = Callable[[LoopSampler], Inputs]
# Convolutions, a transposed one, tokens, both; every kind of branches.
MODELS = {"plain_rgb": "int8", "upsampler": "float16", "dit": "int8", "conditional": "int8_weight_only"}
CALIBRATION = Calibration(samples=2, steps=3, interval=1, batch_size=2, judged=0.0)


def recipe_of(dtype: str) -> Recipe:
    base = tfmq.scheme("rtn_w4a8")
    # The last rule names a layer that is to have none.
    return replace(
        base,
        calibration=CALIBRATION,
        branch=Branch(dtype=dtype),  # type: ignore[arg-type]
        rules=(
            *base.rules,
            Rule(match="role:first", weights={"rank": 0}),
            Rule(match="*", weights={"rank": 2}),
        ),
    )


def wild(reader: Reader, *, rank: int, **_: Any) -> Split | None:
    """Return factors that every layer would be wrong without, behind a factor of its inputs."""
    if not rank:
        return None
    layer = reader.layer
    factor = torch.exp2((torch.arange(layer.weight.shape[1] * layer.operation.groups) % 3 - 1).float())
    matrix = layer.weight.flatten(1).unflatten(0, (layer.operation.groups, -1))
    noise = torch.randn(matrix.shape, generator=torch.Generator().manual_seed(matrix.numel()))
    return Split(Transform(factor), truncated(matrix.std() * noise, None, min(rank, *matrix.shape[1:])))


@pytest.fixture(scope="module")
def made(
    sampler: Make, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, LoopSampler], dict[str, Path]]:
    """Return the models by name, and where they were saved."""
    found, directories = {}, {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tfmq.jobs.weights.best_split", wild)
        for name, dtype in MODELS.items():
            found[name], directories[name] = sampler(name), tmp_path_factory.mktemp(name) / "q"
            tfmq.quantize(found[name], recipe_of(dtype), output_dir=directories[name])
    return found, directories


@pytest.fixture
def quantized(made: tuple[dict[str, LoopSampler], dict[str, Path]]) -> dict[str, LoopSampler]:
    return made[0]


@pytest.fixture
def saved(made: tuple[dict[str, LoopSampler], dict[str, Path]]) -> dict[str, Path]:
    return made[1]


def branches(module: torch.nn.Module) -> set[str]:
    return {name for name, layer in packed_layers(module).items() if layer.branch is not None}


@torch.no_grad()
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MODELS)
def test_every_backend_computes_branches(
    quantized: dict[str, LoopSampler], name: str, backend: str, inputs_of: Given
) -> None:
    if lacking := BACKENDS[backend].missing():
        pytest.skip(lacking)
    denoiser, inputs = quantized[name].denoiser, inputs_of(quantized[name])
    expected = denoiser(inputs)
    try:
        coverage = execute(denoiser.module, backend)
        found = denoiser(inputs)
        # The codes that a branch shares are rounded by every backend but `float`.
        assert sqnr_db(expected, found) > (10 if backend == "float" else 35)
        if backend in ("reference", "torch", "openvino"):
            assert branches(denoiser.module) & set(coverage.integer)
    finally:
        execute(denoiser.module, "simulated")
    assert torch.equal(denoiser(inputs), expected)
    # Without its branches it would be another model.
    layers = packed_layers(denoiser.module)
    kept = {branch: layers[branch].branch for branch in branches(denoiser.module)}
    for branch in kept:
        layers[branch].branch = None
    lacking_branches = denoiser(inputs)
    for branch, beside in kept.items():
        layers[branch].branch = beside
    assert sqnr_db(expected, lacking_branches) < 10


@torch.no_grad()
@pytest.mark.parametrize("name", ["plain_rgb", "upsampler"])
def test_graphs_compute_branches(
    quantized: dict[str, LoopSampler], name: str, graph_sqnr_db: Callable[[LoopSampler], float]
) -> None:
    assert graph_sqnr_db(quantized[name]) > 60


@torch.no_grad()
@pytest.mark.parametrize("name", ["plain_rgb", "upsampler"])
def test_branches_are_saved_and_loaded(
    quantized: dict[str, LoopSampler], saved: dict[str, Path], sampler: Make, name: str, inputs_of: Given
) -> None:
    drawn = quantized[name]
    loaded = tfmq.load(saved[name], module=sampler(name, seed=1).denoiser.module, backend="simulated")
    assert torch.equal(Denoiser(loaded)(inputs_of(drawn)), drawn.denoiser(inputs_of(drawn)))
    manifest = json.loads((saved[name] / "tfmq.json").read_text())
    groups = [group for group in manifest["structure"]["layers"] if "branch" in group]
    assert all(group["branch"]["dtype"] == MODELS[name] for group in groups)
    named = {layer for group in groups for layer in group["names"]}
    assert manifest["version"] == 3 and named == branches(drawn.denoiser.module)
    assert not any("embed" in layer or "shift" in layer for layer in named), "temporal layers have none"
    first = next(iter(packed_layers(drawn.denoiser.module)))
    assert named and first not in named


def test_a_killed_job_has_the_same_branches(
    sampler: Make, saved: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tfmq.jobs.weights.best_split", lambda *_, **__: pytest.fail("split again"))
    whole = json.loads((saved["plain_rgb"] / "tfmq_report.json").read_text())

    def stop(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    recipe = recipe_of("int8")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("tfmq.jobs.weights.best_split", wild)
        patch.setattr("tfmq.jobs.calibration.collect", stop)
        tfmq.quantize(sampler("plain_rgb"), recipe, output_dir=tmp_path / "q")
    resumed = tfmq.quantize(sampler("plain_rgb"), recipe, output_dir=tmp_path / "q", resume=True).report
    assert resumed["sha256"] == whole["sha256"]


def damage(name: str, value: Any) -> Callable[[Any, Any], None]:
    def change(structure: Any, tensors: Any) -> None:
        tensors[name] = value(tensors[name])

    return change


def described(**fields: Any) -> Callable[[Any, Any], None]:
    def change(structure: Any, tensors: Any) -> None:
        group = next(group for group in structure["layers"] if "exit" in group["names"])
        group["branch"] = {**group["branch"], **fields}

    return change


@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        (
            "upsampler",
            damage("exit.branch.up", lambda t: t.fill_(float("nan"))),
            CheckpointError,
            "not finite",
        ),
        (
            "upsampler",
            damage("exit.branch.down", lambda t: t.fill_(float("inf"))),
            CheckpointError,
            "not finite",
        ),
        (
            "upsampler",
            lambda s, t: t.pop("exit.branch.down"),
            CheckpointError,
            r"branch\.down, which is missing",
        ),
        (
            "upsampler",
            damage("exit.branch.up", lambda t: t.float()),
            CheckpointError,
            "is torch.float32 .*float16",
        ),
        (
            "plain_rgb",
            damage("exit.branch.up", lambda t: t.half()),
            CheckpointError,
            "is torch.float16 .*int8",
        ),
        (
            "upsampler",
            damage("exit.branch.up", lambda t: t[:1]),
            CheckpointError,
            r"branch\.up: it has not . rows of 2",
        ),
        ("upsampler", damage("exit.branch.down", lambda t: t[:1]), CheckpointError, r"branch\.down"),
        (
            "upsampler",
            damage("exit.branch.down", lambda t: t[:, :, :1]),
            CheckpointError,
            "other rows than the codes",
        ),
        ("upsampler", damage("exit.branch.down", lambda t: t.flatten()), CheckpointError, "not a matrix"),
        ("plain_rgb", damage("exit.branch.up_scale", lambda t: -t), CheckpointError, "not positive"),
        ("plain_rgb", damage("exit.branch.down_scale", lambda t: t[:1]), CheckpointError, r"down_scale"),
        ("upsampler", described(rank=3), CheckpointError, r"branch\.up"),
        ("upsampler", described(rank=0), ForeignFileError, "rank is 0; it must be an integer"),
        ("upsampler", described(rank=10**9), ForeignFileError, "rank"),
        ("upsampler", described(rank=True), ForeignFileError, "rank"),
        (
            "upsampler",
            described(dtype="int4"),
            ForeignFileError,
            "dtype is 'int4'; it must be one of float16",
        ),
        ("upsampler", described(dtype="bfloat16"), CheckpointError, "not a matrix of bfloat16"),
        ("upsampler", described(order=[1]), ForeignFileError, "order"),
    ],
)
def test_a_damaged_branch_is_refused_by_name(
    sampler: Make,
    saved: dict[str, Path],
    tmp_path: Path,
    name: str,
    change: Callable[[Any, Any], Any],
    error: type[Exception],
    message: str,
) -> None:
    directory = shutil.copytree(saved[name], tmp_path / "q")
    tensors, _ = read_tensors(directory / "tfmq_model.safetensors")
    manifest = json.loads((directory / "tfmq.json").read_text())
    change(manifest["structure"], tensors)
    tensors = {key: value.contiguous() for key, value in tensors.items()}
    write_tensors(directory / "tfmq_model.safetensors", tensors)
    (directory / "tfmq.json").write_text(json.dumps(seal(tensors, manifest)))
    with pytest.raises(error, match=message):
        tfmq.load(directory, module=sampler(name).denoiser.module)


def test_without_a_rank_nothing_changes(sampler: Make) -> None:
    """No splitter and no rank make the model that there was before, to the bit, and so does a rank that
    nothing takes.
    """
    digests = set()
    for change in (
        {},
        {"branch": Branch(dtype="int8")},
        {"branch": Branch(splitters=()), "rules": (Rule(match="*", weights={"rank": 8}),)},
    ):
        made = sampler("plain_rgb")
        tfmq.quantize(made, replace(recipe_of("float16"), **{"rules": (), **change}))
        digests.add(tensor_digest(made.denoiser.module.state_dict()))
        assert not branches(made.denoiser.module)
    assert len(digests) == 1


def test_rescaling_and_branch_together_bring_a_planted_model_back(
    sampler: Make, script: Callable[[str], Any], inputs_of: Given
) -> None:
    """One channel behind each norm is 64 times as large, and its readers' weights 64 / 16 times smaller: it
    counts 16 times as much as others. At four bits a rescaling takes it from the range of the input into the
    weight, where it is a column of rank one; a branch alone leaves it in the input.
    """

    def planted() -> LoopSampler:
        drawn = sampler("dit")
        module, generator = drawn.denoiser.module, torch.Generator().manual_seed(0)
        with torch.no_grad():
            # adaLN-Zero starts at zero, where nothing would show.
            for parameter in module.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
            outliers = script("benchmarks/planted.py").norm_outliers(module)
            for name, child in outliers.named_modules():
                if name.endswith(("to_q", "to_k", "to_v", "ff.net.0.proj")):
                    stock = module.get_submodule(name).weight
                    child.weight[:, (child.weight != stock).any(dim=0)] *= 16
        return LoopSampler(
            Denoiser(outliers), drawn.scheduler, shape=drawn.shape, conditions=drawn.conditions
        )

    inputs, base = inputs_of(planted()), tfmq.scheme("svd_w4a4")
    base = replace(base, calibration=CALIBRATION, weights=replace(base.weights, rank=2))
    expected, found = planted().denoiser(inputs), {}
    for name, change in (
        ("both", {}),
        ("rescaling", {"branch": Branch(splitters=())}),
        ("branch", {"rescaling": Rescaling()}),
    ):
        drawn = planted()
        tfmq.quantize(drawn, replace(base, **change))
        found[name] = sqnr_db(expected, drawn.denoiser(inputs))
    assert found["both"] > max(found["rescaling"], found["branch"]) + 1, found
