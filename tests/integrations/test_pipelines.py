"""Pipelines as samplers."""

import inspect
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler
from diffusers.utils import logging as diffusers_logging

import tfmq
from tfmq.api import open_sampler
from tfmq.integrations.diffusers.pipelines import PipelineSampler, find_denoiser, open_pipeline
from tfmq.integrations.diffusers.quiet import quiet
from tfmq.recipes.recipe import Calibration, Recipe, Temporal
from tfmq.reconstruction.learning import Learning

Build = Callable[..., Any]
QUICK = Recipe(
    name="quick",
    temporal=Temporal(table="float16", learning=Learning(iterations=0)),
    learning=Learning(iterations=0),
    calibration=Calibration(samples=1, steps=3),
)


@pytest.fixture
def pipeline(build: Build) -> DDIMPipeline:
    return DDIMPipeline(build("unet")[0].module, DDIMScheduler())


def test_half_precision_files_are_opened_in_float32(pipeline: DDIMPipeline, tmp_path: Path) -> None:
    expected = {name: value.half().float() for name, value in pipeline.unet.state_dict().items()}
    pipeline.unet.half()
    pipeline.save_pretrained(tmp_path / "half")
    opened = open_pipeline(tmp_path / "half").unet.state_dict()
    assert {value.dtype for value in opened.values()} == {torch.float32}
    assert all(torch.equal(opened[name], value) for name, value in expected.items())


def test_a_quantized_pipeline_is_a_sampler_again(pipeline: DDIMPipeline, tmp_path: Path) -> None:
    arguments = inspect.signature(pipeline.unet.forward)
    tfmq.quantize(pipeline, QUICK, output_dir=tmp_path / "q")
    assert inspect.signature(pipeline.unet.forward) == arguments
    assert find_denoiser(pipeline)[0] == "unet"
    in_memory = PipelineSampler(pipeline).run(range(2), steps=3, seed=0)
    assert torch.equal(open_sampler(tmp_path / "q").run(range(2), steps=3, seed=0), in_memory)
    # The tables keep their own dtype whichever way the directory is opened.
    opened = open_pipeline(tmp_path / "q").unet.state_dict()
    assert {name: value.dtype for name, value in opened.items()} == {name: value.dtype for name, value in pipeline.unet.state_dict().items()}
    assert torch.float16 in {value.dtype for value in opened.values()}


def test_a_component_is_no_pipeline(pipeline: DDIMPipeline) -> None:
    with pytest.raises(ValueError, match="no pipeline"):
        open_sampler(pipeline.unet)


def test_prompts_without_effect_warn(pipeline: DDIMPipeline) -> None:
    with pytest.warns(UserWarning, match="prompts have no effect"):
        open_sampler(pipeline, prompts=("a cat",))


def test_eta_of_the_recipe_is_what_the_quantized_model_is_opened_with(pipeline: DDIMPipeline, tmp_path: Path) -> None:
    recipe = replace(QUICK, calibration=replace(QUICK.calibration, eta=0.7))
    tfmq.quantize(pipeline, recipe, output_dir=tmp_path / "q")
    opened = open_sampler(tmp_path / "q")
    assert opened.options == {"eta": 0.7}
    noisy, expected = (PipelineSampler(pipeline, options=options).run(range(1), steps=3, seed=0) for options in ({}, {"eta": 0.7}))
    assert torch.equal(opened.run(range(1), steps=3, seed=0), expected) and not torch.equal(noisy, expected)


def test_options_without_effect_warn(pipeline: DDIMPipeline) -> None:
    with pytest.warns(UserWarning, match="guidance_scale has no effect: DDIMPipeline takes none"):
        assert open_sampler(pipeline, options={"guidance_scale": 3.0}).options == {}
    with pytest.warns(UserWarning, match="eta of the recipe have no effect: the sampler brings its own"):
        open_sampler(PipelineSampler(pipeline), options={"eta": 1.0})


def test_quiet_silences_and_restores() -> None:
    diffusers_logging.set_verbosity(logging.INFO)
    try:
        with quiet():
            assert diffusers_logging.get_verbosity() == logging.ERROR and not diffusers_logging.is_progress_bar_enabled()
        assert diffusers_logging.get_verbosity() == logging.INFO and diffusers_logging.is_progress_bar_enabled()
    finally:
        diffusers_logging.set_verbosity(logging.WARNING)
