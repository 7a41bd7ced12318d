"""Pipelines as samplers."""

import importlib
import inspect
import logging
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler
from diffusers.utils import logging as diffusers_logging
from safetensors.torch import load_file, save_file

import tfmq
from tfmq.evaluation.deviation import follow
from tfmq.integrations.diffusers.opening import open_pipeline
from tfmq.integrations.diffusers.pipelines import PipelineSampler, find_denoisers
from tfmq.integrations.diffusers.quiet import quiet
from tfmq.recipes.recipe import Calibration, Recipe, Temporal
from tfmq.reconstruction.learning import Learning
from tfmq.targets import open_sampler

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
    assert list(find_denoisers(pipeline)) == ["unet"]
    in_memory = PipelineSampler(pipeline).run(range(2), steps=3, seed=0)
    assert torch.equal(open_sampler(tmp_path / "q").run(range(2), steps=3, seed=0), in_memory)
    # The tables keep their own dtype whichever way the directory is opened.
    opened = open_pipeline(tmp_path / "q").unet.state_dict()
    assert {name: value.dtype for name, value in opened.items()} == {
        name: value.dtype for name, value in pipeline.unet.state_dict().items()
    }
    assert torch.float16 in {value.dtype for value in opened.values()}


def test_a_pipeline_without_its_weights_is_refused(pipeline: DDIMPipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path / "p")
    path = tmp_path / "p" / "unet" / "diffusion_pytorch_model.safetensors"
    save_file(
        {name: tensor for name, tensor in load_file(path).items() if not name.startswith("conv_in")},
        path,
        metadata={"format": "pt"},
    )
    with quiet(), pytest.raises(ValueError, match="lacks 2 tensors of unet, such as conv_in"):
        open_pipeline(tmp_path / "p")


def test_a_component_is_no_pipeline(pipeline: DDIMPipeline) -> None:
    with pytest.raises(ValueError, match="no pipeline"):
        open_sampler(pipeline.unet)


def test_prompts_without_effect_warn(pipeline: DDIMPipeline) -> None:
    with pytest.warns(UserWarning, match="prompts have no effect"):
        open_sampler(pipeline, prompts=("a cat",))


def test_eta_of_the_recipe_is_what_the_quantized_model_is_opened_with(
    pipeline: DDIMPipeline, tmp_path: Path
) -> None:
    recipe = replace(QUICK, calibration=replace(QUICK.calibration, eta=0.7))
    tfmq.quantize(pipeline, recipe, output_dir=tmp_path / "q")
    opened = open_sampler(tmp_path / "q")
    assert opened.options == {"eta": 0.7}
    noisy, expected = (
        PipelineSampler(pipeline, options=options).run(range(1), steps=3, seed=0)
        for options in ({}, {"eta": 0.7})
    )
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
            assert (
                diffusers_logging.get_verbosity() == logging.ERROR
                and not diffusers_logging.is_progress_bar_enabled()
            )
        assert (
            diffusers_logging.get_verbosity() == logging.INFO and diffusers_logging.is_progress_bar_enabled()
        )
    finally:
        diffusers_logging.set_verbosity(logging.WARNING)


def test_who_has_neither_library_needs_no_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tfmq.integrations.diffusers.quiet.find_spec", lambda name: None)
    monkeypatch.setattr("tfmq.integrations.diffusers.quiet.import_module", lambda name: pytest.fail(name))
    with quiet():
        pass


def test_what_is_decoded_is_noted() -> None:
    """A latent diffusion pipeline: its images are the decoder's of what was noted, which the last step
    left.
    """
    levels = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (4, 8),
    }
    torch.manual_seed(0)
    first_stage = diffusers.VQModel(
        **levels, norm_num_groups=4, sample_size=16, latent_channels=3, num_vq_embeddings=16
    ).eval()
    shape = {
        "sample_size": 8,
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
    }
    kinds = {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 8,
    }
    unet = diffusers.UNet2DModel(**shape, **kinds).eval()
    sampler = PipelineSampler(
        diffusers.LDMPipeline(first_stage, unet, diffusers.DDIMScheduler(clip_sample=False))
    )
    with sampler.noted_latents() as noted:
        images = sampler.run(range(2), steps=3, seed=1)
    (latent,) = noted
    assert latent.shape == (2, 3, 8, 8) and "decode" not in vars(first_stage)
    with torch.no_grad():
        assert torch.equal((first_stage.decode(latent).sample / 2 + 0.5).clamp(0, 1), images)
    walked = follow(sampler, range(2), steps=3, seed=1)
    assert walked.latent is not None and torch.equal(walked.latent, latent.flatten(1))
    assert not any(torch.equal(state, latent) for state in walked.states)
    # Pixels have no latent.
    assert (
        follow(
            PipelineSampler(diffusers.DDIMPipeline(unet, diffusers.DDIMScheduler())),
            range(1),
            steps=2,
            seed=0,
        ).latent
        is None
    )


def tiny_dit(**names: Any) -> diffusers.DiTPipeline:
    """Return a tiny DiT of ten classes; without `id2label` they have no names."""
    heads = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_layers": 1,
        "num_embeds_ada_norm": 10,
        "norm_num_groups": 4,
    }
    transformer = diffusers.DiTTransformer2DModel(
        in_channels=4, out_channels=4, sample_size=8, patch_size=2, **heads
    )
    levels = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (4, 8),
    }
    vae = diffusers.AutoencoderKL(**levels, norm_num_groups=4, sample_size=16, latent_channels=4)
    return diffusers.DiTPipeline(transformer, vae, DDIMScheduler(), **names)


@pytest.mark.filterwarnings("ignore:.*Expected types for id2label")
def test_names_of_classes_are_saved_with_a_quantized_pipeline(tmp_path: Path) -> None:
    """Without them another copy draws other classes: any of the table in the place of the named ones."""
    pipeline = tiny_dit(id2label={3: "three, drei", 8: "eight"})
    sampler = PipelineSampler(pipeline, options={"guidance_scale": 1.0})
    asked = sampler.asked(range(4))
    recipe = replace(tfmq.scheme("rtn_w8a8"), calibration=Calibration(samples=1, steps=2, batch_size=1))
    tfmq.quantize(sampler, recipe, output_dir=tmp_path / "q")
    for opened in (open_pipeline(tmp_path / "q"), tfmq.load(tmp_path / "q", backend="simulated")):
        assert opened.labels == {"drei": 3, "eight": 8, "three": 3}
        assert PipelineSampler(opened).asked(range(4)) == asked
    opened.save_pretrained(tmp_path / "again")
    assert open_pipeline(tmp_path / "again").labels == opened.labels


def test_the_classes_of_images_can_be_chosen() -> None:
    pipeline = tiny_dit()
    sampler = PipelineSampler(pipeline, labels=(7, 2), options={"guidance_scale": 1.0})
    seen: list[list[int]] = []
    pipeline.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["class_labels"].tolist()), with_kwargs=True
    )
    sampler.run(range(1, 4), steps=1, seed=0)
    assert seen == [[2, 7, 2]] and sampler.describe()["labels"] == [7, 2]
    sampler.labels = (10,)
    with pytest.raises(ValueError, match="the classes 0 to 9"):
        sampler.run(range(1), steps=1, seed=0)


def test_pipelines_load_quietly_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers", None)
    name = quiet.__module__
    # As a process finds it that has not imported it yet.
    monkeypatch.delitem(sys.modules, name)
    with importlib.import_module(name).quiet():
        assert diffusers_logging.get_verbosity() == logging.ERROR
