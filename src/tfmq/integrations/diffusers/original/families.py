"""The published layouts of whole models in one file: how each is recognised, and what its parts are."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Size, Tensor

from tfmq.integrations.diffusers.original import sizes

Tensors = Mapping[str, Tensor]
Prediction = Literal["epsilon", "v_prediction"]
Style = Literal["clip", "open_clip", "t5"]
# Where a denoiser stands in a file: below the name of its part, or alone.
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "")
UNET, SD3, FLUX = (
    "input_blocks.0.0.weight",
    "joint_blocks.0.x_block.attn.qkv.weight",
    "double_blocks.0.img_attn.qkv.weight",
)
ADDED, DEEP = "label_emb.0.0.weight", "output_blocks.11.1.transformer_blocks.0.norm1.bias"
# Files that are recognised to be refused by name, each by the beginning of one of its keys.
OTHERS = {
    "control_model.": "a ControlNet",
    "edm_": "a model of EDM's noise schedule, such as Playground 2.5",
    "model.diffusion_model.label_emb.weight": "the x4 upscaler",
    "model.diffusion_model.double_stream_modulation_img.": "FLUX.2",
    "double_stream_modulation_img.": "FLUX.2",
    "model.diffusion_model.distilled_guidance_layer.": "Chroma",
    "distilled_guidance_layer.": "Chroma",
    "down_blocks.": "one component in diffusers' own layout: pass the directory of its pipeline",
    "transformer_blocks.": "one component in diffusers' own layout: pass the directory of its pipeline",
}
# What names of tensors contain in the files of adapters, whatever they begin with: LoRA, LoHa, LoKr.
ADAPTERS = ("lora_", "lora.", "hada_w", "lokr_w")
NOISE: Mapping[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}


@dataclass(frozen=True)
class Encoder:
    """A text encoder: its name in the pipeline and where it stands in the file.

    `padded` is what its tokenizer fills texts up with, where that is not the end of a text.
    """

    name: str
    prefixes: tuple[str, ...]
    style: Style
    projected: bool = False
    activation: str = "quick_gelu"
    padded: str | None = None

    @property
    def tokenizer(self) -> str:
        """The name of its tokenizer in the pipeline."""
        return self.name.replace("text_encoder", "tokenizer")


@dataclass(frozen=True, kw_only=True)
class Family:
    """A published layout.

    Attributes:
        title: what messages call it.
        published: a pipeline of this family, for messages.
        denoiser: class of the denoiser in diffusers, whose name in the pipeline is `component`.
        configuration: what shapes of the denoiser, without their prefix, say of it.
        sample_size: side of the denoiser's samples, which no tensor tells.
        pipelines: class of the pipeline by the number of input channels.
        latents: factors of the autoencoder's latents.
        encoders: the text encoders.
        scheduler: class and fields of the scheduler, by the names of all tensors and what is predicted.
        shown: the fields of these that names of tensors tell of; a scheduler that has others gives way.
        optional: encoders that the pipeline may go without.
    """

    title: str
    published: str
    denoiser: str
    component: str
    configuration: Callable[[sizes.Shapes], dict[str, Any]]
    sample_size: int | None
    pipelines: Mapping[int, str]
    latents: Mapping[str, Any]
    encoders: tuple[Encoder, ...]
    scheduler: Callable[[Tensors, Prediction], tuple[str, dict[str, Any]]]
    optional: tuple[str, ...] = ()
    shown: Callable[[Tensors], dict[str, Any]] = lambda names: {}


def _pndm(names: Tensors, prediction: Prediction) -> tuple[str, dict[str, Any]]:
    return "PNDMScheduler", {
        **NOISE,
        "skip_prk_steps": True,
        "set_alpha_to_one": False,
        "prediction_type": prediction,
    }


def _ddim(names: Tensors, prediction: Prediction) -> tuple[str, dict[str, Any]]:
    return "DDIMScheduler", {
        **NOISE,
        "clip_sample": False,
        "set_alpha_to_one": False,
        "prediction_type": prediction,
    }


def _euler(names: Tensors, prediction: Prediction) -> tuple[str, dict[str, Any]]:
    zero = {"rescale_betas_zero_snr": True} if "ztsnr" in names else {}
    return "EulerDiscreteScheduler", {
        **NOISE,
        "timestep_spacing": "leading",
        "prediction_type": prediction,
        **zero,
    }


def _euler_marks(names: Tensors) -> dict[str, Any]:
    predicted = {"prediction_type": "v_prediction"} if "v_pred" in names else {}
    return predicted | ({"rescale_betas_zero_snr": True} if "ztsnr" in names else {})


def _flow(names: Tensors, prediction: Prediction) -> tuple[str, dict[str, Any]]:
    return "FlowMatchEulerDiscreteScheduler", {"shift": 3.0}


def _flux_mark(names: Tensors) -> dict[str, Any]:
    # The model that is distilled for few steps has no embedding of a guidance scale.
    return {"use_dynamic_shifting": any("guidance_in." in name for name in names)}


def _flux_flow(names: Tensors, prediction: Prediction) -> tuple[str, dict[str, Any]]:
    mark = _flux_mark(names)
    return "FlowMatchEulerDiscreteScheduler", {
        "shift": 3.0 if mark["use_dynamic_shifting"] else 1.0,
        **mark,
        "base_shift": 0.5,
        "max_shift": 1.15,
        "base_image_seq_len": 256,
        "max_image_seq_len": 4096,
    }


def _modern(part: str) -> tuple[str, ...]:
    return (f"text_encoders.{part}.transformer.",)


_STABLE = {4: "StableDiffusionPipeline", 9: "StableDiffusionInpaintPipeline"}
SD1 = Family(
    title="Stable Diffusion 1.x",
    published="stable-diffusion-v1-5/stable-diffusion-v1-5",
    denoiser="UNet2DConditionModel",
    component="unet",
    configuration=sizes.unet,
    sample_size=64,
    pipelines=_STABLE,
    latents={"scaling_factor": 0.18215, "sample_size": 512},
    encoders=(Encoder("text_encoder", ("cond_stage_model.transformer.",), "clip"),),
    scheduler=_pndm,
)
SD2 = Family(
    title="Stable Diffusion 2.x",
    published="stabilityai/stable-diffusion-2-1",
    denoiser="UNet2DConditionModel",
    component="unet",
    configuration=sizes.unet,
    sample_size=96,
    pipelines=_STABLE,
    latents={"scaling_factor": 0.18215, "sample_size": 768},
    encoders=(Encoder("text_encoder", ("cond_stage_model.model.",), "open_clip", padded="!"),),
    scheduler=_ddim,
)
SDXL = Family(
    title="SDXL",
    published="stabilityai/stable-diffusion-xl-base-1.0",
    denoiser="UNet2DConditionModel",
    component="unet",
    configuration=sizes.unet,
    sample_size=128,
    pipelines={4: "StableDiffusionXLPipeline", 9: "StableDiffusionXLInpaintPipeline"},
    latents={"scaling_factor": 0.13025, "sample_size": 1024},
    encoders=(
        Encoder("text_encoder", ("conditioner.embedders.0.transformer.",), "clip"),
        Encoder(
            "text_encoder_2", ("conditioner.embedders.1.model.",), "open_clip", projected=True, padded="!"
        ),
    ),
    scheduler=_euler,
    shown=_euler_marks,
)
STABLE_3 = Family(
    title="Stable Diffusion 3",
    published="stabilityai/stable-diffusion-3-medium-diffusers",
    denoiser="SD3Transformer2DModel",
    component="transformer",
    configuration=sizes.sd3,
    sample_size=128,
    pipelines={16: "StableDiffusion3Pipeline"},
    latents={"scaling_factor": 1.5305, "shift_factor": 0.0609, "sample_size": 1024},
    encoders=(
        Encoder("text_encoder", _modern("clip_l"), "clip", projected=True),
        Encoder("text_encoder_2", _modern("clip_g"), "clip", projected=True, activation="gelu", padded="!"),
        Encoder("text_encoder_3", _modern("t5xxl"), "t5"),
    ),
    scheduler=_flow,
    optional=("text_encoder_3", "tokenizer_3"),
)
FLUX_1 = Family(
    title="FLUX.1",
    published="black-forest-labs/FLUX.1-schnell",
    denoiser="FluxTransformer2DModel",
    component="transformer",
    configuration=sizes.flux,
    sample_size=None,
    pipelines={64: "FluxPipeline", 384: "FluxFillPipeline"},
    latents={"scaling_factor": 0.3611, "shift_factor": 0.1159, "sample_size": 1024},
    encoders=(
        Encoder("text_encoder", _modern("clip_l"), "clip"),
        Encoder("text_encoder_2", _modern("t5xxl"), "t5"),
    ),
    scheduler=_flux_flow,
    shown=_flux_mark,
)


def denoiser_prefix(tensors: Tensors) -> str:
    """Return where the denoiser of a published layout stands.

    Raises:
        ValueError: the file is of no layout that is read here; names it where it is known.
    """
    places = [prefix for prefix in PREFIXES if any(f"{prefix}{key}" in tensors for key in (UNET, SD3, FLUX))]
    if not places and any(part in name for name in tensors for part in ADAPTERS):
        raise ValueError("it is a LoRA: pass the model, and load the LoRA into its pipeline")
    for start, title in OTHERS.items():
        if any(name.startswith(start) for name in tensors):
            raise ValueError(f"it is {title}")
    if places:
        return places[0]
    known = ", ".join(family.title for family in (SD1, SD2, SDXL, STABLE_3, FLUX_1))
    raise ValueError(f"its keys are those of no layout that is known here: {known}")


def _unet_family(shapes: Mapping[str, Size], names: Tensors) -> Family:
    """Return which of the three published UNets it is."""
    if ADDED in shapes:
        refiner = "conditioner.embedders.0.model.text_projection" in names
        if refiner or sizes.shape_of(shapes, ADDED, 2)[1] == 2560:
            raise ValueError("it is the SDXL refiner, which draws no image of its own")
        return SDXL
    if any(name.startswith("cond_stage_model.") for name in names):
        return SD2 if any(name.startswith("cond_stage_model.model.") for name in names) else SD1
    return SD2 if len(shapes.get("middle_block.1.proj_in.weight", ())) == 2 else SD1


def family_of(shapes: Mapping[str, Size], names: Tensors) -> Family:
    """Return the family of a denoiser with these `shapes`, without their prefix, in a file of all these
    tensors.

    Raises:
        ValueError: it is one that is not read here; names it.
    """
    if SD3 in shapes:
        return STABLE_3
    return FLUX_1 if FLUX in shapes else _unet_family(shapes, names)


def prediction_of(family: Family, denoiser: Tensors, names: Tensors) -> Prediction:
    """Return what a UNet predicts, as far as its file shows.

    SDXL files are marked. Stable Diffusion 2 files are not: those of v-prediction are told by the spread of
    one bias, as ComfyUI does; those with nine input channels predict the noise.
    """
    if family is SDXL:
        return "v_prediction" if "v_pred" in names else "epsilon"
    bias = denoiser.get(DEEP)
    if family is not SD2 or bias is None or denoiser[UNET].shape[1] != 4:
        return "epsilon"
    return "v_prediction" if float(torch.std(bias.float(), unbiased=False)) > 0.09 else "epsilon"
