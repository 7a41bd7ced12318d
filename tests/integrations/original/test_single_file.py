"""Published single files: what is read is what was written, by diffusers' own tables."""

import importlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any
from warnings import catch_warnings

import published
import pytest
import torch
from torch import Tensor, nn

import tfmq
from tfmq.integrations.diffusers.original import families, sizes
from tfmq.integrations.diffusers.original import single_file as opening
from tfmq.integrations.diffusers.original.rows import from_original, to_original
from tfmq.integrations.diffusers.original.single_file import open_single_file
from tfmq.integrations.diffusers.original.tables import TABLES
from tfmq.storage.atomic import read_tensors, write_tensors
from tfmq.storage.comfy import Int8Layer, encoded
from tfmq.storage.errors import CheckpointError, ForeignFileError
from tfmq.targets import open_sampler

Run = Callable[..., Any]
theirs = importlib.import_module("diffusers.loaders.single_file_utils")
CROSS, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"
UP, PLAIN_UP = "CrossAttnUpBlock2D", "UpBlock2D"
# The configurations that the authors published, as far as they are not diffusers' defaults.
SD1 = {
    "sample_size": 64,
    "cross_attention_dim": 768,
    "down_block_types": (CROSS, CROSS, CROSS, PLAIN),
    "up_block_types": (PLAIN_UP, UP, UP, UP),
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "attention_head_dim": 8,
    "in_channels": 4,
    "out_channels": 4,
    "transformer_layers_per_block": 1,
    "use_linear_projection": False,
}
SD2 = SD1 | {
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}
SDXL = SD2 | {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": (PLAIN, CROSS, CROSS),
    "up_block_types": (UP, UP, PLAIN_UP),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "transformer_layers_per_block": (1, 2, 10),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SD3 = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
    "dual_attention_layers": (),
    "qk_norm": None,
}
SD35 = SD3 | {
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}
FLUX = {
    "patch_size": 1,
    "in_channels": 64,
    "out_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "axes_dims_rope": (16, 56, 56),
}
VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
}
UNET, MMDIT, RECTIFIED = "UNet2DConditionModel", "SD3Transformer2DModel", "FluxTransformer2DModel"
# Class, configuration, how it is read, tensors in the published file, and parameters where they were stated.
PUBLISHED = {
    "sd1": (UNET, SD1, sizes.unet, 686, 859_520_964),
    "sd2": (UNET, SD2, sizes.unet, 686, 865_910_724),
    "sdxl": (UNET, SDXL, sizes.unet, 1680, 2_567_463_684),
    "sd3": (MMDIT, SD3, sizes.sd3, None, None),
    "sd35": (MMDIT, SD35, sizes.sd3, None, None),
    "flux": (RECTIFIED, FLUX, sizes.flux, 780, 11_901_408_320),
}
CONVERTERS = {
    MMDIT: lambda tensors, config: theirs.convert_sd3_transformer_checkpoint_to_diffusers(tensors),
    RECTIFIED: lambda tensors, config: theirs.convert_flux_transformer_checkpoint_to_diffusers(tensors),
    UNET: theirs.convert_ldm_unet_checkpoint,
}


def skeleton(kind: str, config: dict[str, Any]) -> Any:
    with torch.device("meta"):
        return getattr(published.diffusers, kind)(**config)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_configuration_is_read_off_the_published_shapes(name: str) -> None:
    kind, config, read, tensors, parameters = PUBLISHED[name]
    model = skeleton(kind, config)
    original = published.denoiser_names(model)
    assert len(original) == (tensors or len(original))
    assert sum(p.numel() for p in model.parameters()) == (
        parameters or sum(map(torch.numel, model.parameters()))
    )
    assert read({name: tensor.shape for name, tensor in original.items()}) == config


@pytest.mark.parametrize("name", PUBLISHED)
def test_tables_are_those_of_diffusers(name: str) -> None:
    """Every tensor has rows of its own numbers, and one column, so that a file of full size costs nothing."""
    kind, config, *_ = PUBLISHED[name]
    model = skeleton(kind, config)
    generator = torch.Generator().manual_seed(1)
    own = {
        key: torch.randint(2**30, (len(tensor) if tensor.ndim else 1,), generator=generator)
        for key, tensor in model.state_dict().items()
    }
    table = TABLES[kind](model)
    original = to_original(own, table)
    again = from_original(original, table, {key: len(tensor) for key, tensor in own.items()})
    prefixed = {f"model.diffusion_model.{key}": tensor for key, tensor in original.items()}
    converted = CONVERTERS[kind](prefixed, model.config)
    for found in (converted, again):
        assert found.keys() == own.keys()
        assert all(torch.equal(found[key], own[key]) for key in own)


def test_autoencoders_are_read_off_their_shapes() -> None:
    model = skeleton("AutoencoderKL", VAE)
    assert sum(p.numel() for p in model.parameters()) == 83_653_863
    shapes = {
        name.replace(".up.0.", ".up.x.").replace(".up.x.", ".up.0."): tensor.shape
        for name, tensor in published.vae_names(model).items()
    }
    assert sizes.autoencoder(shapes) == VAE


CASES: dict[str, tuple[Callable[..., Any], dict[str, Any], str]] = {
    "sd1": (published.stable_diffusion, {}, "StableDiffusionPipeline"),
    "sd1 inpainting": (published.stable_diffusion, {"channels": 9}, "StableDiffusionInpaintPipeline"),
    "sd2": (published.stable_diffusion, {"second": True}, "StableDiffusionPipeline"),
    "sdxl": (published.sdxl, {}, "StableDiffusionXLPipeline"),
    "sdxl inpainting": (published.sdxl, {"channels": 9}, "StableDiffusionXLInpaintPipeline"),
    "sd3": (published.sd3, {}, "StableDiffusion3Pipeline"),
    "flux": (published.flux, {}, "FluxPipeline"),
    "flux, all in one": (published.flux, {"prefix": "model.diffusion_model."}, "FluxPipeline"),
}


def write(path: Path, tensors: dict[str, Tensor], dtype: torch.dtype) -> Path:
    cast = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
    write_tensors(path, cast)
    return path


def call(name: str, model: nn.Module, seed: int) -> Tensor:
    """Return what a part computes, in float32."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    t = torch.tensor([500.0])
    if "text" in name:
        return model(torch.arange(8)[None])[0]
    if name == "vae":
        latent = model.config["latent_channels"]
        return torch.cat(
            [
                model.decode(noise(1, latent, 4, 4))[0].flatten(),
                model.encode(noise(1, 3, 8, 8)).latent_dist.mean.flatten(),
            ]
        )
    if name == "unet":
        config = model.config
        added = (
            {"text_embeds": noise(1, 64), "time_ids": noise(1, 6)} if config["addition_embed_type"] else None
        )
        sample = noise(1, config["in_channels"], 8, 8)
        return model(sample, t, noise(1, 8, config["cross_attention_dim"]), added_cond_kwargs=added)[0]
    if "pos_embed_max_size" in model.config:
        return model(noise(1, 16, 8, 8), noise(1, 8, 64), noise(1, 128), t)[0]
    return model(
        noise(1, 4, 64), noise(1, 8, 64), noise(1, 64), t / 1000, torch.zeros(4, 3), torch.zeros(8, 3), t
    )[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_parts_compute_what_the_stock_models_compute(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    make, arguments, kind = CASES[case]
    parts, tensors = make(tmp_path, **arguments)
    path = write(tmp_path / "model.safetensors", tensors, dtype)
    base = None
    if case.startswith("flux"):
        base = published.flux_base(tmp_path, parts)
    if case == "sd3":
        with pytest.raises(ValueError, match=r"holds no tokenizer_3: .*--base"):
            open_single_file(path, tokenizer=str(tmp_path / "tokenizer"))
        path = write(path, {key: t for key, t in tensors.items() if ".t5xxl." not in key}, dtype)
        del parts["text_encoder_3"]
    pipeline = open_single_file(path, base=base, tokenizer=str(tmp_path / "tokenizer"))
    assert type(pipeline).__name__ == kind
    with torch.no_grad():
        for name, part in parts.items():
            found = getattr(pipeline, name)
            assert {tensor.dtype for tensor in found.state_dict().values()} == {dtype}
            expected = call(name, part.to(dtype).float(), 9)
            assert torch.equal(call(name, found.float(), 9), expected) and expected.std() > 0


def test_a_scheduler_comes_from_the_base_or_from_the_file(tmp_path: Path) -> None:
    parts, tensors = published.flux(tmp_path)
    path, base = write(tmp_path / "flux.safetensors", tensors, torch.bfloat16), None
    with pytest.raises(
        ValueError, match=r"flux.safetensors: the file holds no text_encoder, .*vae: .*--base"
    ):
        open_single_file(path)
    base = published.flux_base(tmp_path, parts)
    assert open_single_file(path, base=base).scheduler.config["shift"] == 2.5
    distilled = {name: tensor for name, tensor in tensors.items() if "guidance_in." not in name}
    few = write(tmp_path / "few.safetensors", distilled, torch.bfloat16)
    config = open_single_file(few, base=base).scheduler.config
    assert config["shift"] == 1.0 and not config["use_dynamic_shifting"], "the base is of the other model"
    _, stable = published.stable_diffusion(tmp_path)
    path = write(tmp_path / "sd.safetensors", stable, torch.float16)
    with pytest.raises(ValueError, match=r"base is no Stable Diffusion 1.x pipeline"):
        open_single_file(path, base=base)
    _, marked = published.sdxl(tmp_path)
    marked |= {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    path = write(tmp_path / "xl.safetensors", marked, torch.float16)
    config = open_single_file(path, tokenizer=str(tmp_path / "tokenizer")).scheduler.config
    assert config["prediction_type"] == "v_prediction" and config["rescale_betas_zero_snr"]
    plain = open_single_file(path, tokenizer=str(tmp_path / "tokenizer"), prediction="epsilon")
    assert plain.scheduler.config["prediction_type"] == "epsilon"


def test_an_older_spelling_of_the_encoder_is_read(tmp_path: Path) -> None:
    """Before there was a projection beside it, the text model had no name of its own."""
    _, tensors = published.stable_diffusion(tmp_path)
    older = {name.replace("transformer.text_model.", "transformer."): t for name, t in tensors.items()}
    assert older.keys() != tensors.keys()
    tokens = str(tmp_path / "tokenizer")
    states = [
        open_single_file(
            write(tmp_path / f"{name}.safetensors", held, torch.float16), tokenizer=tokens
        ).text_encoder.state_dict()
        for name, held in (("new", tensors), ("old", older))
    ]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


UNNEEDED = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


def stable_base(folder: Path, parts: dict[str, Any], kind: str, **scheduler: Any) -> Path:
    """Write a pipeline of Stable Diffusion, and return its directory."""
    tokens = published.tokenizer(folder / "tokenizer")
    xl = kind == "StableDiffusionXLPipeline"
    parts = parts | {"tokenizer": tokens} | ({"tokenizer_2": tokens} if xl else UNNEEDED)
    made = getattr(published.diffusers, kind)(
        **parts,
        scheduler=published.diffusers.EulerDiscreteScheduler(beta_end=0.013, steps_offset=1, **scheduler),
    )
    made.save_pretrained(folder / "base")
    return folder / "base"


def test_what_the_file_or_the_caller_says_is_predicted_counts_before_the_base(tmp_path: Path) -> None:
    parts, marked = published.sdxl(tmp_path)
    base = stable_base(tmp_path, parts, "StableDiffusionXLPipeline")
    path = write(tmp_path / "plain.safetensors", marked, torch.float16)
    assert open_single_file(path, base=base).scheduler.config["beta_end"] == 0.013
    marked |= {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    path = write(tmp_path / "xl.safetensors", marked, torch.float16)
    config = open_single_file(path, base=base).scheduler.config
    assert config["prediction_type"] == "v_prediction" and config["rescale_betas_zero_snr"]
    config = open_single_file(path, base=base, prediction="epsilon").scheduler.config
    assert config["prediction_type"] == "epsilon"


def test_a_base_of_another_family_is_refused(tmp_path: Path) -> None:
    """Three families have a denoiser of the same class."""
    (tmp_path / "xl").mkdir()
    others, xl = published.sdxl(tmp_path / "xl")
    parts, tensors = published.stable_diffusion(tmp_path)
    path = write(tmp_path / "sd.safetensors", tensors, torch.float16)
    base = stable_base(tmp_path / "xl", others, "StableDiffusionXLPipeline")
    with pytest.raises(ValueError, match=r"no Stable Diffusion 1.x pipeline: it has a text_encoder_2"):
        open_single_file(path, base=base)
    wide = parts | {"unet": published.unet(cross_attention_dim=128, **published.ENDS)}
    base = stable_base(tmp_path, wide, "StableDiffusionPipeline")
    with pytest.raises(ValueError, match=r"its denoiser reads texts of width 128, the file's of width 64"):
        open_single_file(path, base=base)
    path = write(tmp_path / "xl.safetensors", xl, torch.float16)
    with pytest.raises(ValueError, match=r"no SDXL pipeline: it has no text_encoder_2"):
        open_single_file(path, base=base)


def test_a_base_that_predicts_something_else_than_the_file_seems_to_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts, tensors = published.stable_diffusion(tmp_path, second=True)
    base = stable_base(tmp_path, parts, "StableDiffusionPipeline", prediction_type="v_prediction")
    monkeypatch.setattr(families, "DEEP", "input_blocks.1.0.in_layers.2.bias")
    tensors = tensors | {f"model.diffusion_model.{families.DEEP}": torch.zeros(64)}
    path = write(tmp_path / "sd2.safetensors", tensors, torch.float16)
    with pytest.warns(UserWarning, match="looks like one that predicts epsilon, .* for v_prediction"):
        pipeline = open_single_file(path, base=base)
    assert pipeline.scheduler.config["prediction_type"] == "v_prediction"
    pipeline = open_single_file(path, base=base, prediction="epsilon")
    assert pipeline.scheduler.config["prediction_type"] == "epsilon"


def test_a_directory_is_no_name_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, tensors = published.stable_diffusion(tmp_path)
    path = write(tmp_path / "sd.safetensors", tensors, torch.float16)
    monkeypatch.chdir(tmp_path)
    for name in ("tokenizer", "./tokenizer", "../" + tmp_path.name + "/tokenizer"):
        assert len(open_single_file(path, tokenizer=name).tokenizer) > 10
    with pytest.raises(ValueError, match=r"there is no tokenizer in \./none"):
        open_single_file(path, tokenizer="./none")


@pytest.mark.parametrize("kind", ["floats", "blocks"])
def test_what_shapes_do_not_say_comes_from_the_base(kind: str, tmp_path: Path) -> None:
    """Fewer heads, and groups of other sizes, than published models of these widths have."""
    parts, _ = published.stable_diffusion(tmp_path)
    sizes = {"block_out_channels": (32, 64), "attention_head_dim": 2, "norm_num_groups": 16}
    parts["unet"] = published.unet(cross_attention_dim=64, **sizes, **published.ENDS)
    scheduler = published.diffusers.DDIMScheduler(steps_offset=1, clip_sample=False)
    pipeline = published.diffusers.StableDiffusionPipeline(
        **parts, **UNNEEDED, tokenizer=published.tokenizer(tmp_path / "tokenizer"), scheduler=scheduler
    )
    pipeline.save_pretrained(tmp_path / "base")
    tensors = published.below("model.diffusion_model.", published.denoiser_names(parts["unet"]))
    if kind == "blocks":
        layer = "model.diffusion_model.time_embed.2"
        quantized = Int8Layer(torch.ones(128, 128, dtype=torch.int8), torch.full((128, 1), 0.01))
        tensors |= {f"{layer}{suffix}": tensor for suffix, tensor in encoded(quantized).items()}
        parts["unet"].time_embedding.linear_2.weight.data.fill_(0.01)
    path = write(tmp_path / "model.safetensors", tensors, torch.float32)
    found = open_single_file(path, base=tmp_path / "base").unet
    if kind == "blocks":
        tfmq.execute(found, "float")
    assert found.config["sample_size"] == 8
    with torch.no_grad():
        expected = call("unet", parts["unet"], 9)
        assert torch.allclose(call("unet", found, 9), expected, rtol=1e-5, atol=1e-5)
        # The base of another size has no say.
        wider = published.unet(
            cross_attention_dim=64, **sizes | {"block_out_channels": (32, 96)}, **published.ENDS
        )
        wider.save_pretrained(tmp_path / "base" / "unet")
        other = open_single_file(path, base=tmp_path / "base").unet
        assert other.config["attention_head_dim"] == 8 and other.config["sample_size"] == 64
    (tmp_path / "base" / "unet" / "config.json").write_text('{"block_out_channels": "wide"}')
    with pytest.raises(ValueError, match="the unet of the base has an impossible configuration"):
        open_single_file(path, base=tmp_path / "base")


REFUSED = {
    "lora_unet_down.weight": "a LoRA",
    "transformer.transformer_blocks.0.attn.to_q.lora_A.weight": "a LoRA",
    "unet.down_blocks.0.attentions.0.proj_in.lora.down.weight": "a LoRA",
    "down_blocks.0.attentions.0.proj_in.hada_w1_a": "a LoRA",
    "control_model.input_blocks.0.0.weight": "a ControlNet",
    "edm_mean": "EDM",
    "model.diffusion_model.distilled_guidance_layer.in_proj.weight": "Chroma",
    "down_blocks.0.resnets.0.conv1.weight": "diffusers' own layout",
    "unheard.of": "no layout that is known here: Stable Diffusion 1.x, .*FLUX.1",
}


@pytest.mark.parametrize("key", REFUSED)
def test_other_layouts_are_refused_by_name(key: str, tmp_path: Path) -> None:
    path = write(tmp_path / "other.safetensors", {key: torch.zeros(2, 2)}, torch.float16)
    with pytest.raises(ValueError, match=rf"other\.safetensors: .*{REFUSED[key]}"):
        open_single_file(path)


def test_what_does_not_fit_is_refused_by_name(tmp_path: Path) -> None:
    _, tensors = published.stable_diffusion(tmp_path)
    place, tokens = tmp_path / "model.safetensors", str(tmp_path / "tokenizer")
    prefix = "model.diffusion_model."
    extra = {**tensors, f"{prefix}middle_block.9.weight": torch.zeros(1)}
    cases: list[tuple[dict[str, Tensor], str]] = [
        (extra, r"1 tensors have no place in Stable Diffusion 1\.x: middle_block\.9"),
        (
            {k: t for k, t in tensors.items() if "time_embed.0.bias" not in k},
            r"missing: time_embedding.linear_1.bias",
        ),
        (tensors | {f"{prefix}out.2.weight": torch.zeros(4)}, r"out\.2\.weight is \[4\]; it needs 4 axes"),
        (tensors | {f"{prefix}out.0.weight": torch.zeros(7)}, r"of another shape: conv_norm_out\.weight"),
        (
            {k: t for k, t in tensors.items() if "encoder.mid.attn_1.q" not in k},
            r"missing: encoder.mid_block",
        ),
        (tensors | {f"{prefix}label_emb.0.0.weight": torch.zeros(4, 2560)}, "the SDXL refiner"),
    ]
    for changed, message in cases:
        with pytest.raises(ValueError, match=message):
            open_single_file(write(place, changed, torch.float16), tokenizer=tokens)
    with pytest.raises(ValueError, match=r"there is no tokenizer in .*nowhere.*--tokenizer"):
        open_single_file(write(place, tensors, torch.float16), tokenizer=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"model\.ckpt is no \.safetensors or \.gguf file"):
        open_single_file(place.rename(tmp_path / "model.ckpt"))
    with pytest.warns(UserWarning, match=r"1 of its tensors not used, such as unheard"):
        open_single_file(
            write(place, {**tensors, "unheard.of": torch.zeros(1)}, torch.float16), tokenizer=tokens
        )
    (tmp_path / "zip.safetensors").write_bytes(b"PK\x03\x04" + bytes(200))
    with pytest.raises(ForeignFileError, match="not a safetensors file"):
        open_single_file(tmp_path / "zip.safetensors")
    with pytest.raises(CheckpointError, match="does not exist"):
        open_single_file(tmp_path / "absent.safetensors")


def test_parts_of_several_precisions_become_float32(tmp_path: Path) -> None:
    _, tensors = published.stable_diffusion(tmp_path)
    mixed = {name: t.half() if not name.startswith("first_stage") else t for name, t in tensors.items()}
    path = tmp_path / "model.safetensors"
    write_tensors(path, mixed)
    pipeline = open_single_file(path, tokenizer=str(tmp_path / "tokenizer"))
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        assert part.dtype == torch.float32
    assert torch.equal(
        pipeline.unet.conv_in.bias.half(), mixed["model.diffusion_model.input_blocks.0.0.bias"]
    )


def test_verbs_take_a_single_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tfmq.cli.commands import run

    # Samples of a family's own size take minutes here.
    monkeypatch.setattr(families, "SD1", replace(families.SD1, sample_size=8))
    _, tensors = published.stable_diffusion(tmp_path)
    path = write(tmp_path / "model.safetensors", tensors, torch.float16)
    arguments = ["import", str(path), "--tokenizer", str(tmp_path / "tokenizer")]
    assert run([*arguments, "--output-dir", str(tmp_path / "stock")]) == 0
    for written in (tmp_path / "stock").glob("*/*.safetensors"):
        assert {t.dtype for t in read_tensors(written)[0].values()} <= {torch.float16, torch.int64}
    stored = published.diffusers.DiffusionPipeline.from_pretrained(str(tmp_path / "stock"))
    monkeypatch.setattr(opening, "CLIP", str(tmp_path / "tokenizer"))
    sampler = open_sampler(path, prompts=("a b",))
    assert sampler.denoiser.module.dtype == torch.float32
    for name, tensor in sampler.denoiser.module.state_dict().items():
        assert torch.equal(tensor, stored.unet.state_dict()[name])
    quick = ["--scheme", "rtn_w8a8", "--steps", "2", "--calib-size", "1", "--components", "denoiser"]
    assert run(["quantize", str(path), *quick, "--output-dir", str(tmp_path / "low")]) == 0
    assert tfmq.load(tmp_path / "low", backend="reference").unet.tfmq_steps is not None


def lied(tensors: dict[str, Tensor], chance: Random) -> dict[str, Tensor]:
    """Return a file in which one to three tensors are something else, elsewhere or gone."""
    found = dict(tensors)
    for name in chance.sample(sorted(found), chance.randint(1, 3)):
        tensor = found.pop(name)
        other = chance.choice(sorted(tensors))
        kind = chance.randrange(8)
        if kind == 0:
            found[name] = torch.zeros(())
        elif kind == 1:
            found[name] = tensor[None]
        elif kind == 2:
            found[name] = tensor[:0]
        elif kind == 3:
            found[name] = torch.zeros(chance.choice([(1,), (7, 3), (2, 2, 2), (3, 3, 3, 3), (1, 1, 1, 1, 1)]))
        elif kind == 4:
            found[name] = tensor.to(chance.choice([torch.int64, torch.bool, torch.uint8]))
        elif kind == 5:
            found[name.replace(".0.", f".{chance.choice([9, 77, 9999, 10**9])}.")] = tensor
        elif kind == 6:
            found[name], found[other] = tensors[other], tensor
    return found


@pytest.mark.parametrize("make", [published.stable_diffusion, published.sdxl, published.sd3, published.flux])
def test_files_that_lie_are_refused_by_name(make: Callable[..., Any], tmp_path: Path) -> None:
    """Whatever stands in a whole file: it is refused in one line that names it, or opens."""
    parts, tensors = make(
        tmp_path, **({"prefix": "model.diffusion_model."} if make is published.flux else {})
    )
    tensors = {name: t.half() if t.is_floating_point() else t for name, t in tensors.items()}
    base = published.flux_base(tmp_path, parts) if make is published.flux else None
    if make is published.sd3:
        tensors = {name: t for name, t in tensors.items() if ".t5xxl." not in name}
    path, tokens, chance = tmp_path / "lie.safetensors", str(tmp_path / "tokenizer"), Random(5)
    refused, cases = 0, 25
    for _ in range(cases):
        write_tensors(path, lied(tensors, chance))
        with catch_warnings(action="ignore"):
            try:
                open_single_file(path, tokenizer=tokens, base=base)
            except ValueError as error:
                assert str(path) in str(error)
                refused += 1
    assert refused > cases / 2


def test_sizes_that_no_model_has_are_refused_before_it_is_built(tmp_path: Path) -> None:
    block = "input_blocks.{}.1.transformer_blocks."
    names = {f"input_blocks.{index}.0.out_layers.3.weight": (8, 8, 3, 3) for index in range(200)}
    names |= {block.format(1) + f"{depth}.a": (1,) for depth in range(200)}
    with pytest.raises(ValueError, match="39999 blocks, and the checkpoint has 400 tensors"):
        sizes.unet({name: torch.Size(shape) for name, shape in names.items()})
    names = {f"encoder.down.{level}.block.0.conv1.weight": (8, 8, 3, 3) for level in range(100)}
    names |= {f"encoder.down.0.block.{index}.a": (1,) for index in range(100)}
    with pytest.raises(ValueError, match="10000 blocks"):
        sizes.autoencoder({name: torch.Size(shape) for name, shape in names.items()})
    shapes = {"x_embedder.proj.weight": (10**9, 1, 1, 1), "context_embedder.weight": (64, 64)}
    with pytest.raises(ValueError, match="pos_embed is 1 channels wide"):
        sizes.sd3(
            {name: torch.Size(shape) for name, shape in (shapes | {"pos_embed": (1, 10**9, 1)}).items()}
        )
    with pytest.raises(ValueError, match="no model has more than 256"):
        sizes.count([f"joint_blocks.{index}.a" for index in range(1000)], "joint_blocks.")
