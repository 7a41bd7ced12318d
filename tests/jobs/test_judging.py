"""The last judge of a model: candidates that draw, and the one that is kept."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tfmq
from tfmq.jobs import judging
from tfmq.jobs.job import stage_seed
from tfmq.jobs.judging import PLAIN, RECIPE, exchange, plain, psnr_db, shared_copy
from tfmq.models.sampler import LoopSampler
from tfmq.nn.plan import packed_layers
from tfmq.recipes.recipe import Calibration, Recipe
from tfmq.storage.digest import tensor_digest

Make = Callable[..., LoopSampler]


@pytest.fixture
def recipe() -> Recipe:
    base = tfmq.scheme("w4a8")
    temporal = replace(base.temporal, learning=replace(base.temporal.learning, iterations=2))
    return replace(
        base,
        calibration=Calibration(samples=4, steps=3, interval=1, batch_size=4, judged=0.5),
        temporal=temporal,
    )


def digest(sampler: LoopSampler) -> str:
    return tensor_digest(sampler.denoiser.module.state_dict())


def loser(monkeypatch: pytest.MonkeyPatch, worst: str) -> None:
    """Let one candidate's images lose."""
    drawn: list[str] = []

    def measured(images: Any, expected: Any) -> Any:
        drawn.append((RECIPE, PLAIN)[len(drawn) % 2])
        return torch.full((len(images),), 10.0 if drawn[-1] == worst else 20.0, dtype=torch.float64)

    monkeypatch.setattr(judging, "psnr_db", measured)


def test_what_draws_nearer_is_kept_to_the_bit(
    sampler: Make, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Judged or not, each candidate is what its recipe makes alone, and the model that was passed in becomes
    it.
    """
    found = {}
    for worst in (PLAIN, RECIPE):
        loser(monkeypatch, worst)
        made = sampler("plain_rgb")
        module = made.denoiser.module
        report = tfmq.quantize(made, recipe).report
        assert made.denoiser.module is module and packed_layers(module)
        found[report["judged"]["kept"]] = digest(made)
        assert report["judged"]["images"] == 2 and (report["units"] == []) == (worst == RECIPE)
    for name, alone in ((RECIPE, recipe), (PLAIN, plain(recipe))):
        made = sampler("plain_rgb")
        tfmq.quantize(made, replace(alone, calibration=replace(alone.calibration, judged=0.0)))
        assert digest(made) == found[name], name


def test_the_judge_sees_what_each_model_draws(sampler: Make, recipe: Recipe) -> None:
    made, full = sampler("plain_rgb"), sampler("plain_rgb")
    found = tfmq.quantize(made, recipe).report["judged"]
    seed = stage_seed(0, "judging")
    images, expected = (each.run(range(2), steps=3, seed=seed).double() for each in (made, full))
    assert float(psnr_db(images, expected).mean()) == pytest.approx(found["psnr_db"][found["kept"]], abs=1e-3)
    assert found["psnr_db"][found["kept"]] == max(found["psnr_db"].values())


def test_a_killed_job_is_judged_to_the_same_bytes(
    sampler: Make, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tfmq.quantize(sampler("plain_rgb"), recipe, output_dir=tmp_path / "whole").report

    def stop(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("tfmq.api._manifest", stop)
        tfmq.quantize(sampler("plain_rgb"), recipe, output_dir=tmp_path / "q")
    with monkeypatch.context() as patch:
        patch.setattr(judging, "draw", lambda *_: pytest.fail("drawn again"))
        resumed = tfmq.quantize(sampler("plain_rgb"), recipe, output_dir=tmp_path / "q", resume=True).report
    assert resumed["sha256"] == whole["sha256"] and resumed["judged"] == whole["judged"]


def test_few_samples_and_the_plain_recipe_are_not_judged(sampler: Make, recipe: Recipe) -> None:
    few = replace(recipe, calibration=replace(recipe.calibration, judged=0.24))
    assert tfmq.quantize(sampler("plain_rgb"), few).report["judged"] is None
    assert tfmq.quantize(sampler("plain_rgb"), plain(recipe)).report["judged"] is None


def test_a_copy_shares_tensors_and_an_exchange_is_undone_by_another(build: Callable[..., Any]) -> None:
    denoiser, inputs = build("unet")
    module = denoiser.module
    other, kind, expected = shared_copy(module), type(module), denoiser(inputs)
    assert {id(value) for value in other.parameters()} == {id(value) for value in module.parameters()}
    other.conv_in = torch.nn.Identity()
    exchange(module, other)
    assert isinstance(module.conv_in, torch.nn.Identity) and type(module) is kind
    exchange(module, other)
    assert torch.equal(denoiser(inputs), expected)


def test_an_image_with_nan_loses() -> None:
    images = torch.zeros(2, 3, 2, 2, dtype=torch.float64)
    images[1, 0, 0, 0] = torch.nan
    found = psnr_db(images, torch.zeros_like(images))
    assert found.tolist() == [100.0, -torch.inf]
