"""Tiny random pipelines of every family, by name, through diffusers' own classes; each is saved, opened,
quantized and loaded once a session.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import tfmq
from tfmq.artifact import holds_quantized
from tfmq.evaluation.inspection import Inspection, inspect
from tfmq.integrations.diffusers.opening import open_pipeline
from tfmq.integrations.diffusers.pipelines import PipelineSampler
from tfmq.integrations.diffusers.quiet import quiet
from tfmq.recipes import Calibration, Recipe

STEPS = 4
PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"
LETTERS = [chr(code) for code in range(ord("a"), ord("z") + 1)]
SMALL: dict[str, Any] = {"height": 16, "width": 16}
UNET: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
# One level of resolution, for families that differ from another in something else.
FLAT: dict[str, Any] = {
    "block_out_channels": (8,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
}
DIT: dict[str, Any] = {
    "in_channels": 4,
    "sample_size": 8,
    "patch_size": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
}
AUTOENCODER: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "block_out_channels": (4, 8),
    "norm_num_groups": 4,
    "sample_size": 16,
}


# What computes token by token has its own scheme.
TRANSFORMERS = ("dit", "pixart", "sd3", "sd3_without_t5", "flux", "wan")


def scheme_of(name: str) -> str:
    """Return the scheme of W8A8 for a family."""
    return "transformer_w8a8" if name in TRANSFORMERS else "w8a8"


def quick(name: str) -> Recipe:
    """Return W8A8 for a family with all stages and next to no learning."""
    recipe = tfmq.scheme(scheme_of(name))
    return replace(
        recipe,
        weights=replace(recipe.weights, ranges="min_max"),
        activations=replace(recipe.activations, ranges="min_max"),
        learning=replace(recipe.learning, iterations=1, batch_size=2),
        temporal=replace(recipe.temporal, learning=replace(recipe.temporal.learning, iterations=1)),
        calibration=Calibration(samples=1, steps=STEPS, interval=2, batch_size=1),
    )


@pytest.fixture(scope="session")
def recipe_of() -> Callable[[str], Recipe]:
    """Return `quick`."""
    return quick


class Parts:
    """Makes the components that pipelines share; files of tokenizers go to `directory`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def clip(self, *, projected: bool = False) -> tuple[Any, Any]:
        from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

        tokens = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
        (self.directory / "vocab.json").write_text(
            json.dumps({token: index for index, token in enumerate(tokens)})
        )
        (self.directory / "merges.txt").write_text("#version: 0.2\n")
        tokenizer = CLIPTokenizer(
            str(self.directory / "vocab.json"), str(self.directory / "merges.txt"), model_max_length=8
        )
        end = len(tokens) - 1
        ids = {"vocab_size": len(tokens), "bos_token_id": end - 1, "eos_token_id": end, "pad_token_id": end}
        size = {
            "hidden_size": 8,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 8,
        }
        kind = CLIPTextModelWithProjection if projected else CLIPTextModel
        return tokenizer, kind(CLIPTextConfig(**ids, **size, projection_dim=8)).eval()

    def t5(self, *, width: int = 8, multilingual: bool = False) -> tuple[Any, Any]:
        from tokenizers import Tokenizer, models, pre_tokenizers, processors
        from transformers import T5Config, T5EncoderModel, T5TokenizerFast, UMT5Config, UMT5EncoderModel

        pieces = [
            ("<pad>", 0.0),
            ("</s>", 0.0),
            ("<unk>", 0.0),
            ("\u2581", -1.0),
            *((letter, -2.0) for letter in LETTERS),
        ]
        size = {
            "vocab_size": len(pieces),
            "d_model": width,
            "d_kv": 4,
            "d_ff": 16,
            "num_layers": 1,
            "num_heads": 2,
        }
        encoder = UMT5EncoderModel(UMT5Config(**size)) if multilingual else T5EncoderModel(T5Config(**size))
        # Built here, because T5's class makes it from pieces in recent transformers alone.
        tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.post_processor = processors.TemplateProcessing(
            single="$A </s>", special_tokens=[("</s>", 1)]
        )
        return T5TokenizerFast(tokenizer_object=tokenizer, extra_ids=0), encoder.eval()

    def vae(self, **changes: Any) -> Any:
        return diffusers.AutoencoderKL(**AUTOENCODER, latent_channels=4, shift_factor=0.0, **changes)

    def stable_diffusion(
        self, scheduler: Any, kind: Any = diffusers.StableDiffusionPipeline, **changes: Any
    ) -> Any:
        tokenizer, encoder = self.clip()
        parts = {"vae": self.vae(), "text_encoder": encoder, "tokenizer": tokenizer, "scheduler": scheduler}
        return kind(
            **parts,
            unet=conditional(**changes),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


def conditional(**changes: Any) -> Any:
    kinds = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    options: dict[str, Any] = {
        "in_channels": 4,
        "out_channels": 4,
        "cross_attention_dim": 8,
        "attention_head_dim": 2,
    }
    return diffusers.UNet2DConditionModel(**(UNET | kinds | options | changes))


def unconditional(**changes: Any) -> Any:
    kinds = {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 8,
    }
    return diffusers.UNet2DModel(**(UNET | kinds | changes), in_channels=3, out_channels=3)


def ddpm(parts: Parts) -> Any:
    return diffusers.DDPMPipeline(unconditional(), diffusers.DDPMScheduler())


def ldm(parts: Parts) -> Any:
    first_stage = diffusers.VQModel(**AUTOENCODER, latent_channels=3, num_vq_embeddings=16)
    kinds = {"down_block_types": ("AttnDownBlock2D",), "up_block_types": ("UpBlock2D",)}
    return diffusers.LDMPipeline(
        first_stage, unconditional(**(FLAT | kinds)), diffusers.DDIMScheduler(clip_sample=False)
    )


def ldm_heads(parts: Parts) -> Any:
    kinds = {
        "down_block_types": ("AttnDownBlock2D",) * 2,
        "up_block_types": ("AttnUpBlock2D",) * 2,
        "num_attention_heads": 2,
    }
    resampling = {
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "resnet_time_scale_shift": "scale_shift",
        "attn_norm_num_groups": 4,
    }
    unet = tfmq.UNet2DHeadsModel(**UNET, **kinds, **resampling, in_channels=4, out_channels=4)
    return diffusers.LDMPipeline(parts.vae(), unet, diffusers.DDIMScheduler(clip_sample=False))


def sd1(parts: Parts) -> Any:
    return parts.stable_diffusion(diffusers.DDIMScheduler(clip_sample=False, steps_offset=1))


def sd2(parts: Parts) -> Any:
    scheduler = diffusers.DDIMScheduler(prediction_type="v_prediction", clip_sample=False, steps_offset=1)
    return parts.stable_diffusion(scheduler, **FLAT, use_linear_projection=True, attention_head_dim=(4,))


def turbo(parts: Parts) -> Any:
    return parts.stable_diffusion(
        diffusers.EulerDiscreteScheduler(timestep_spacing="trailing", steps_offset=1),
        **FLAT,
        use_linear_projection=True,
    )


def lcm(parts: Parts) -> Any:
    return parts.stable_diffusion(
        diffusers.LCMScheduler(), diffusers.LatentConsistencyModelPipeline, **FLAT, time_cond_proj_dim=16
    )


def sdxl(parts: Parts) -> Any:
    (tokenizer, encoder), (tokenizer_2, encoder_2) = parts.clip(), parts.clip(projected=True)
    added = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 32,
    }
    unet = conditional(
        **FLAT, **added, cross_attention_dim=16, transformer_layers_per_block=2, use_linear_projection=True
    )
    texts = {
        "text_encoder": encoder,
        "text_encoder_2": encoder_2,
        "tokenizer": tokenizer,
        "tokenizer_2": tokenizer_2,
    }
    return diffusers.StableDiffusionXLPipeline(
        vae=parts.vae(), **texts, unet=unet, scheduler=diffusers.EulerDiscreteScheduler()
    )


def dit(parts: Parts) -> Any:
    # The pipeline's guidance asks for class 1000, "no class".
    transformer = diffusers.DiTTransformer2DModel(
        **DIT, out_channels=8, num_layers=2, num_embeds_ada_norm=1000, norm_num_groups=4
    )
    return diffusers.DiTPipeline(
        transformer=transformer, vae=parts.vae(), scheduler=diffusers.DDIMScheduler()
    )


def pixart(parts: Parts) -> Any:
    tokenizer, encoder = parts.t5()
    size = {
        "out_channels": 8,
        "num_layers": 2,
        "cross_attention_dim": 16,
        "caption_channels": 8,
        "norm_num_groups": 4,
    }
    transformer = diffusers.PixArtTransformer2DModel(**DIT, **size, use_additional_conditions=False)
    scheduler = diffusers.DPMSolverMultistepScheduler()
    return diffusers.PixArtSigmaPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=parts.vae(),
        transformer=transformer,
        scheduler=scheduler,
    )


def sd3(parts: Parts, *, t5: bool = True) -> Any:
    names = ("", "_2", "_3")
    pairs = (
        parts.clip(projected=True),
        parts.clip(projected=True),
        parts.t5(width=32) if t5 else (None, None),
    )
    texts = {
        f"{kind}{name}": pair[index]
        for index, kind in enumerate(("tokenizer", "text_encoder"))
        for name, pair in zip(names, pairs, strict=True)
    }
    width = {"pooled_projection_dim": 16, "caption_projection_dim": 16, "joint_attention_dim": 32}
    transformer = diffusers.SD3Transformer2DModel(
        **DIT, **width, out_channels=4, num_layers=2, pos_embed_max_size=8
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer, scheduler=scheduler, vae=parts.vae(), **texts
    )


def flux(parts: Parts) -> Any:
    (tokenizer, encoder), (tokenizer_2, encoder_2) = parts.clip(), parts.t5()
    heads = {
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "axes_dims_rope": (2, 2, 4),
        "guidance_embeds": True,
    }
    width = {"in_channels": 16, "patch_size": 1, "joint_attention_dim": 8, "pooled_projection_dim": 8}
    transformer = diffusers.FluxTransformer2DModel(**heads, **width, num_layers=1, num_single_layers=1)
    texts = {
        "text_encoder": encoder,
        "text_encoder_2": encoder_2,
        "tokenizer": tokenizer,
        "tokenizer_2": tokenizer_2,
    }
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    return diffusers.FluxPipeline(scheduler=scheduler, vae=parts.vae(), transformer=transformer, **texts)


def video_unet(parts: Parts) -> Any:
    tokenizer, encoder = parts.clip()
    kinds = {
        "down_block_types": ("CrossAttnDownBlock3D",),
        "up_block_types": ("CrossAttnUpBlock3D",),
        "block_out_channels": (8,),
    }
    unet = diffusers.UNet3DConditionModel(
        **(UNET | kinds), in_channels=4, out_channels=4, cross_attention_dim=8, attention_head_dim=4
    )
    parts_ = {"vae": parts.vae(), "text_encoder": encoder, "tokenizer": tokenizer}
    return diffusers.TextToVideoSDPipeline(**parts_, unet=unet, scheduler=diffusers.DDIMScheduler())


def animatediff(parts: Parts) -> Any:
    tokenizer, encoder = parts.clip()
    kinds = {
        "down_block_types": ("CrossAttnDownBlockMotion",),
        "up_block_types": ("CrossAttnUpBlockMotion",),
        "block_out_channels": (8,),
    }
    heads = {"num_attention_heads": 2, "motion_num_attention_heads": 2, "motion_max_seq_length": 4}
    parts_ = {"vae": parts.vae(), "text_encoder": encoder, "tokenizer": tokenizer, "motion_adapter": None}
    unet = diffusers.UNetMotionModel(**(UNET | kinds), cross_attention_dim=8, **heads)
    return diffusers.AnimateDiffPipeline(
        **parts_, unet=unet, scheduler=diffusers.DDIMScheduler(clip_sample=False, steps_offset=1)
    )


def wan(parts: Parts) -> Any:
    tokenizer, encoder = parts.t5(multilingual=True)
    stages = {
        "base_dim": 3,
        "z_dim": 16,
        "dim_mult": [1, 1, 1, 1],
        "num_res_blocks": 1,
        "temperal_downsample": [False, True, True],
    }
    heads = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "num_layers": 1,
        "ffn_dim": 16,
        "freq_dim": 16,
        "text_dim": 8,
    }
    transformer = diffusers.WanTransformer3DModel(
        **heads, in_channels=16, out_channels=16, rope_max_seq_len=32
    )
    parts_ = {"vae": diffusers.AutoencoderKLWan(**stages), "text_encoder": encoder, "tokenizer": tokenizer}
    return diffusers.WanPipeline(
        **parts_,
        transformer=transformer,
        scheduler=diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    )


# How each is built, and the arguments of its call that keep it tiny.
BUILDERS: dict[str, tuple[Callable[[Parts], Any], dict[str, Any]]] = {
    "ddpm": (ddpm, {}),
    "ldm": (ldm, {}),
    "ldm_heads": (ldm_heads, {}),
    "sd1": (sd1, {}),
    "sd2": (sd2, {}),
    "turbo": (turbo, {"guidance_scale": 0.0}),
    "lcm": (lcm, {}),
    "sdxl": (sdxl, {}),
    "dit": (dit, {}),
    "pixart": (pixart, {**SMALL, "use_resolution_binning": False, "clean_caption": False}),
    "sd3": (sd3, {}),
    "sd3_without_t5": (lambda parts: sd3(parts, t5=False), {}),
    "flux": (flux, SMALL),
    "video_unet": (video_unet, {**SMALL, "num_frames": 2}),
    "animatediff": (animatediff, {**SMALL, "num_frames": 2}),
    "wan": (wan, {"height": 16, "width": 16, "num_frames": 1}),
}


@dataclass(frozen=True)
class Family:
    """A pipeline before and after: where both are stored, the scheme between, what was seen of it, and
    samplers of both.
    """

    stock: Path
    quantized: Path
    scheme: str
    inspection: Inspection
    pipeline: str
    reference: PipelineSampler
    in_memory: PipelineSampler
    calls: tuple[tuple[Any, Tensor], ...]

    def sampler(self, directory: Path) -> PipelineSampler:
        """Open `directory` with diffusers alone and return a sampler with the family's options; what is
        quantized is simulated, as in memory.
        """
        absent = {
            name: None for name, component in self.reference.pipeline.components.items() if component is None
        }
        with quiet():
            pipeline = diffusers.DiffusionPipeline.from_pretrained(directory, **absent)
        if holds_quantized(directory):
            tfmq.execute(pipeline, "simulated")
        return PipelineSampler(pipeline, prompts=("a",), options=self.reference.options)


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Family]:
    """Return a function that gives the family of a name, made when it is first asked for."""
    made: dict[str, Family] = {}

    def make(name: str) -> Family:
        if name not in made:
            made[name] = _make(name, tmp_path_factory.mktemp(name))
        return made[name]

    return make


def _make(name: str, directory: Path) -> Family:
    build, options = BUILDERS[name]
    stock, quantized = directory / "stock", directory / "quantized"
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(0)
        build(Parts(directory)).save_pretrained(stock)
        reference, sampler = (
            PipelineSampler(open_pipeline(stock), prompts=("a",), options=options) for _ in range(2)
        )
        inspection = inspect(reference)
        tfmq.quantize(sampler, quick(name), output_dir=quantized)
        calls = []
        handle = reference.denoiser.module.register_forward_pre_hook(
            lambda _, args, kwargs: calls.append(reference.denoiser.bind(args, kwargs)), with_kwargs=True
        )
        reference.run(range(1), steps=STEPS, seed=0)
        handle.remove()
        with torch.no_grad():
            outputs = tuple((inputs, reference.denoiser(inputs)) for inputs in calls)
    return Family(
        stock,
        quantized,
        scheme_of(name),
        inspection,
        type(reference.pipeline).__name__,
        reference,
        sampler,
        outputs,
    )


@pytest.fixture(scope="session")
def documented() -> Callable[[str, list[str]], None]:
    """Return a function that holds a generated section of docs/models.md against its lines; with
    TFMQ_WRITE_DOCS=1 it writes them there.
    """

    def check(section: str, lines: list[str]) -> None:
        begin, end = f"<!-- {section}: generated by tests/families -->\n", f"<!-- end of {section} -->\n"
        text = PAGE.read_text(encoding="utf-8")
        before, after = text.partition(begin), text.partition(end)
        assert before[1] and after[1], f"docs/models.md has no section {section}"
        wanted = before[0] + begin + "\n".join(lines) + "\n" + end + after[2]
        if os.environ.get("TFMQ_WRITE_DOCS") == "1":
            PAGE.write_text(wanted, encoding="utf-8")
        assert PAGE.read_text(encoding="utf-8") == wanted, (
            "docs/models.md is out of date: run tests/families with TFMQ_WRITE_DOCS=1"
        )

    return check
