"""A quantized denoiser in the place of the original: other pipelines, ControlNet residuals, guidance in one
call or two.
"""

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import tfmq
from tfmq.recipes import Calibration

Make = Callable[[str], Any]
pytestmark = pytest.mark.filterwarnings("default")
STEPS = 4


@contextmanager
def calibrated_steps_only() -> Iterator[None]:
    """Let the warning about uncalibrated timesteps fail the test."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*was not calibrated")
        yield


def parts(sampler: Any) -> dict[str, Any]:
    """Return what a Stable Diffusion pipeline of another kind is made of."""
    return {"image_encoder": None, **sampler.pipeline.components}


def picture() -> Tensor:
    return torch.linspace(0, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)


def image_to_image(components: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return diffusers.StableDiffusionImg2ImgPipeline(**components, requires_safety_checker=False), {
        "image": picture(),
        "strength": 0.5,
    }


def inpainting(components: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 8:] = 1
    pipeline = diffusers.StableDiffusionInpaintPipeline(**components, requires_safety_checker=False)
    return pipeline, {"image": picture(), "mask_image": mask, "strength": 1.0, "height": 16, "width": 16}


def controlled(components: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    config = {
        key: components["unet"].config[key]
        for key in ("block_out_channels", "down_block_types", "layers_per_block", "norm_num_groups")
    }
    torch.manual_seed(1)
    channels = {
        "conditioning_embedding_out_channels": (4, 8),
        "cross_attention_dim": 8,
        "attention_head_dim": 2,
    }
    control = diffusers.ControlNetModel(**config, **channels)
    for block in (*control.controlnet_down_blocks, control.controlnet_mid_block):
        torch.nn.init.normal_(block.weight, std=0.5)  # they start at zero, where a ControlNet does nothing
    pipeline = diffusers.StableDiffusionControlNetPipeline(
        **components, controlnet=control, requires_safety_checker=False
    )
    return pipeline, {"image": picture()}


def image_prompted(components: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Stable Diffusion with an IP-Adapter, loaded by diffusers from a state dict in the released layout: keys
    and values of an image's tokens.
    """
    unet = copy.deepcopy(components["unet"])
    pipeline = diffusers.StableDiffusionPipeline(
        **{**components, "unet": unet}, requires_safety_checker=False
    )
    width, tokens, generator = unet.config.cross_attention_dim, 4, torch.Generator().manual_seed(2)

    def weight(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    crossing = [name.removesuffix(".processor") for name in unet.attn_processors if "attn2" in name]
    sizes = [unet.get_submodule(f"{name}.to_q").out_features for name in crossing]
    layers = {
        f"{2 * i + 1}.{kind}.weight": weight(size, width)
        for i, size in enumerate(sizes)
        for kind in ("to_k_ip", "to_v_ip")
    }
    projection = {"proj.weight": weight(tokens * width, 6), "proj.bias": torch.zeros(tokens * width)}
    projection |= {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}
    pipeline.load_ip_adapter(
        {"image_proj": projection, "ip_adapter": layers},
        subfolder="",
        weight_name="",
        image_encoder_folder=None,
    )
    pipeline.set_ip_adapter_scale(1.0)
    return pipeline, {"ip_adapter_image_embeds": [torch.cat([torch.zeros(1, 1, 6), 3 * torch.ones(1, 1, 6)])]}


def draw(pipeline: Any, **options: Any) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return torch.from_numpy(
        pipeline("a", num_inference_steps=STEPS, generator=generator, output_type="np", **options).images
    )


@pytest.mark.parametrize("build", [image_to_image, inpainting, controlled])
def test_other_pipelines_take_the_quantized_unet(
    family: Make, build: Callable[[dict[str, Any]], tuple[Any, dict[str, Any]]]
) -> None:
    made = family("sd1")
    full, options = build(parts(made.reference))
    assert tfmq.PipelineSampler(full).others == (), "a ControlNet is no denoiser"
    quantized, _ = build(parts(made.sampler(made.quantized)))
    expected = draw(full, **options)
    with calibrated_steps_only():
        images = draw(quantized, **options)
    plain = draw(made.reference.pipeline)
    error, effect = ((images - expected).square().mean(), (plain - expected).square().mean())
    assert images.shape == expected.shape and 0 < float(error) < 0.25 * float(effect)


@pytest.mark.parametrize(("tokens", "bound"), [("static", 0.6), ("dynamic", 0.25)])
def test_an_ip_adapter_is_loaded_onto_the_quantized_unet(family: Make, tokens: Any, bound: float) -> None:
    """What it adds was not there in calibration: fitted ranges cut some of it off, grids of each token do
    not.
    """
    made = family("sd1")
    full, options = image_prompted(parts(made.reference))
    sampler = made.sampler(made.stock)
    recipe = replace(tfmq.scheme("rtn_w8a8"), calibration=Calibration(samples=2, steps=STEPS, batch_size=2))
    tfmq.quantize(sampler, replace(recipe, activations=replace(recipe.activations, tokens=tokens)))
    quantized, _ = image_prompted(parts(sampler))
    expected, images, plain = draw(full, **options), draw(quantized, **options), draw(made.reference.pipeline)
    error, effect = ((images - expected).square().mean(), (plain - expected).square().mean())
    assert 0 < float(error) < bound * float(effect)


def test_guidance_in_one_call_is_guidance_in_two(family: Make) -> None:
    made = family("sd1")
    denoiser, (inputs, expected) = made.in_memory.denoiser, made.calls[0]
    assert len(inputs) == 2
    with torch.no_grad(), calibrated_steps_only():
        together = denoiser(inputs)
        apart = torch.cat([denoiser(inputs.rows(row, row + 1)) for row in range(2)])
    # Not equal: a value at the edge of two codes may fall either way when another batch sums it in another
    # order.
    assert float((together - apart).square().mean()) < 0.2 * float((together - expected).square().mean())


@pytest.mark.parametrize(
    "scheduler",
    [diffusers.PNDMScheduler, diffusers.EulerDiscreteScheduler, diffusers.UniPCMultistepScheduler],
)
def test_another_scheduler_or_number_of_steps_is_served_and_warned_about(
    family: Make, scheduler: Any
) -> None:
    made = family("sd1")
    changed, full = made.sampler(made.quantized), made.sampler(made.stock)
    for sampler in (changed, full):
        sampler.pipeline.scheduler = scheduler.from_config(sampler.pipeline.scheduler.config)
    with pytest.warns(UserWarning, match="was not calibrated"):
        images = changed.run(range(1), steps=7, seed=0)
    expected = full.run(range(1), steps=7, seed=0)
    assert torch.isfinite(images).all() and 0 < float((images - expected).abs().mean()) < 0.1


def test_a_pipeline_that_draws_from_an_image_says_how_to_give_it_one(family: Make) -> None:
    """As the refiner of SDXL does."""
    made = family("sd1")
    pipeline, _ = image_to_image(parts(made.sampler(made.stock)))
    with pytest.raises(
        ValueError,
        match=(
            r"StableDiffusionImg2ImgPipeline could not be called without "
            r"an image .*PipelineSampler\(pipeline, options="
        ),
    ):
        tfmq.quantize(pipeline, "rtn_w8a8")
    recipe = replace(tfmq.scheme("rtn_w8a8"), calibration=Calibration(samples=1, steps=STEPS, batch_size=1))
    sampler = tfmq.PipelineSampler(pipeline, prompts=("a",), options={"image": picture()})
    expected = sampler.run(range(1), steps=STEPS, seed=0)
    tfmq.quantize(sampler, recipe)
    with calibrated_steps_only():
        images = sampler.run(range(1), steps=STEPS, seed=0)
    assert 0 < float((images - expected).abs().mean()) < 0.05
