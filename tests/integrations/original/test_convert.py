"""Original checkpoints become pipelines that compute the same: state dicts of reference modules, written to
files and read back.
"""

import json
import os
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DModel
from diffusers.models.attention_processor import Attention
from safetensors.torch import save_file
from torch import Tensor, nn

import tfmq
from tfmq.evaluation.inspection import inspect
from tfmq.integrations.diffusers.original import ldm
from tfmq.integrations.diffusers.original.convert import import_checkpoint
from tfmq.integrations.diffusers.pipelines import PipelineSampler
from tfmq.recipes import Calibration, Recipe
from tfmq.targets import open_sampler

yaml = pytest.importorskip("yaml")
pytestmark = pytest.mark.filterwarnings("default")
Fill = Callable[[nn.Module], nn.Module]

DDIM: dict[str, Any] = {
    "data": {"image_size": 8},
    "model": {
        "in_channels": 3,
        "out_ch": 3,
        "ch": 32,
        "ch_mult": [1, 2],
        "num_res_blocks": 1,
        "attn_resolutions": [4],
        "ema": True,
    },
    "diffusion": {
        "beta_schedule": "linear",
        "beta_start": 0.0001,
        "beta_end": 0.02,
        "num_diffusion_timesteps": 1000,
    },
}
SIZES: dict[str, Any] = {
    "ch": 32,
    "ch_mult": [1, 2],
    "num_res_blocks": 1,
    "in_channels": 3,
    "out_ch": 3,
    "resolution": 16,
    "attn_resolutions": [],
}
VQ = {"embed_dim": 3, "n_embed": 16, "ddconfig": {**SIZES, "z_channels": 3, "double_z": False}}
KL = {"embed_dim": 4, "ddconfig": {**SIZES, "z_channels": 4, "double_z": True}}
PLAIN: dict[str, Any] = {
    "model_channels": 32,
    "channel_mult": [1, 2],
    "num_res_blocks": 1,
    "attention_resolutions": [1, 2],
    "num_head_channels": 16,
}
# Residual blocks that resample, behind levels with and without attention; a first stage that attends at its
# levels.
UPDOWN = {**PLAIN, "channel_mult": [1, 2, 2], "attention_resolutions": [2], "resblock_updown": True}
HEADS = {
    **UPDOWN,
    "attention_resolutions": [1, 2],
    "num_head_channels": -1,
    "num_heads": 2,
    "use_scale_shift_norm": True,
}
UNCONDITIONAL: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "vq": (PLAIN, VQ),
    "kl": ({**PLAIN, "use_scale_shift_norm": True}, KL),
    "resampling blocks, vq with attention": (
        UPDOWN,
        {**VQ, "ddconfig": {**VQ["ddconfig"], "attn_resolutions": [8]}},
    ),
    "resampling blocks everywhere, kl with attention": (
        {**UPDOWN, "attention_resolutions": [1, 2, 4], "use_scale_shift_norm": True, "num_res_blocks": 2},
        {**KL, "ddconfig": {**KL["ddconfig"], "attn_resolutions": [8, 16], "ch_mult": [1, 1, 2]}},
    ),
    "one number of heads at several widths": ({**PLAIN, "num_head_channels": -1, "num_heads": 2}, VQ),
    "the same, as in LSUN-Churches": (HEADS, KL),
}
CROSS: dict[str, Any] = {"use_spatial_transformer": True, "transformer_depth": 1, "context_dim": 8}


def latent(
    unet: dict[str, Any], first: dict[str, Any], *, condition: Any = "__is_unconditional__", **params: Any
) -> dict[str, Any]:
    """Return the configuration of a latent-diffusion model."""
    channels = first["ddconfig"]["z_channels"]
    shared = {
        "linear_start": 0.0015,
        "linear_end": 0.0195,
        "timesteps": 1000,
        "image_size": 8,
        "channels": channels,
    }
    networks = {
        "unet_config": {"params": {**unet, "in_channels": channels, "out_channels": channels}},
        "first_stage_config": {"params": first},
        "cond_stage_config": condition,
    }
    return {"model": {"params": shared | networks | params}}


def write(directory: Path, states: Any, config: dict[str, Any]) -> tuple[Path, Path]:
    torch.save(states, directory / "model.ckpt")
    (directory / "config.yaml").write_text(yaml.safe_dump(config))
    return directory / "model.ckpt", directory / "config.yaml"


def prefixed(module: nn.Module, prefix: str) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in module.state_dict().items()}


def averaged(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return UNet weights as the average that training kept of them: names without dots below `model_ema`."""
    counters = {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(1)}
    return {
        "model_ema." + name.removeprefix("model.").replace(".", ""): tensor
        for name, tensor in tensors.items()
    } | counters


def close(left: Tensor, right: Tensor) -> None:
    torch.testing.assert_close(left, right, atol=1e-5, rtol=1e-5)


NOISE, TIMESTEPS = torch.linspace(-2, 2, 2 * 4 * 64).sin().reshape(2, 4, 8, 8), torch.tensor([3, 700])


@pytest.mark.parametrize("layout", ["training", "training without average", "bare"])
def test_ddim(original: SimpleNamespace, randomized: Fill, tmp_path: Path, layout: str) -> None:
    sizes = {key: DDIM["model"][key] for key in ("ch", "ch_mult", "num_res_blocks", "attn_resolutions")}
    reference, other = (randomized(original.Ddim(**sizes, size=8)) for _ in range(2))
    own, wrong = prefixed(reference, "module."), prefixed(other, "module.")
    states: dict[str, Any] = {
        "training": [wrong, {"step": 1}, 7, 100, reference.state_dict()],
        "training without average": [own, {"step": 1}, 7, 100, other.state_dict()],
        "bare": reference.state_dict(),
    }
    config = {**DDIM, "model": {**DDIM["model"], "ema": layout == "training"}}
    pipeline = import_checkpoint(*write(tmp_path, states[layout], config))
    x = NOISE[:, :3]
    with torch.no_grad():
        close(pipeline.unet(x, TIMESTEPS).sample, reference(x, TIMESTEPS))
        assert not torch.allclose(reference(x, TIMESTEPS), other(x, TIMESTEPS), atol=1e-2)


@pytest.mark.parametrize("averages", [False, True])
@pytest.mark.parametrize(("unet", "first"), UNCONDITIONAL.values(), ids=UNCONDITIONAL)
def test_unconditional_latent_diffusion(
    original: SimpleNamespace,
    randomized: Fill,
    tmp_path: Path,
    unet: dict[str, Any],
    first: dict[str, Any],
    averages: bool,
) -> None:
    config = latent(unet, first, scale_factor=0.5)
    params = config["model"]["params"]["unet_config"]["params"]
    reference, other, stage = (
        randomized(original.Openai(params)),
        randomized(original.Openai(params)),
        randomized(original.FirstStage(first)),
    )
    trained = prefixed(other if averages else reference, "model.diffusion_model.")
    loss = {"first_stage_model.loss.logvar": torch.zeros(1), "betas": torch.zeros(1000)}
    tensors = trained | prefixed(stage, "first_stage_model.") | loss
    if averages:
        tensors |= averaged(prefixed(reference, "model.diffusion_model."))
    pipeline = import_checkpoint(*write(tmp_path, {"state_dict": tensors, "global_step": 5}, config))
    assert type(pipeline).__name__ == "LDMPipeline" and pipeline.vqvae.config.scaling_factor == 0.5
    x, image = NOISE[:, : params["in_channels"]], torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        close(pipeline.unet(x, TIMESTEPS).sample, reference(x, TIMESTEPS))
        close(pipeline.vqvae.decode(x).sample, stage.decode(x))
        encoded = pipeline.vqvae.encode(image)
        close(encoded.latents if "n_embed" in first else encoded.latent_dist.parameters, stage.encode(image))


@pytest.fixture(scope="module")
def class_conditional(
    original: SimpleNamespace, randomized: Fill, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, nn.Module, nn.Module]:
    """Return the imported class-conditional pipeline, its reference UNet and its embedding of classes."""
    condition = {
        "target": "ldm.modules.encoders.modules.ClassEmbedder",
        "params": {"embed_dim": 8, "n_classes": 11, "key": "class_label"},
    }
    config = latent({**PLAIN, **CROSS}, VQ, condition=condition)
    reference = randomized(original.Openai(config["model"]["params"]["unet_config"]["params"]))
    embedding, stage = randomized(nn.Embedding(11, 8)), randomized(original.FirstStage(VQ))
    tensors = prefixed(reference, "model.diffusion_model.") | prefixed(stage, "first_stage_model.")
    tensors |= prefixed(embedding, "cond_stage_model.embedding.")
    files = write(tmp_path_factory.mktemp("checkpoint"), {"state_dict": tensors}, config)
    return import_checkpoint(*files), reference, embedding


def rtn_w8a8(**options: Any) -> Recipe:
    """Return the recipe at its quickest."""
    recipe = tfmq.scheme("rtn_w8a8")
    return replace(
        recipe,
        weights=replace(recipe.weights, ranges="min_max"),
        activations=replace(recipe.activations, ranges="min_max"),
        calibration=Calibration(samples=1, steps=2, interval=1, batch_size=1, **options),
    )


@pytest.fixture(scope="module")
def class_folder(
    class_conditional: tuple[Any, nn.Module, nn.Module], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Return a folder with `stock`, the imported class-conditional pipeline, and `q`, the same at W8A8."""
    folder = tmp_path_factory.mktemp("class_conditional")
    class_conditional[0].save_pretrained(folder / "stock")
    tfmq.quantize(folder / "stock", rtn_w8a8(guidance_scale=2.0), output_dir=folder / "q")
    return folder


def test_class_conditional_latent_diffusion(class_conditional: tuple[Any, nn.Module, nn.Module]) -> None:
    pipeline, reference, embedding = class_conditional
    labels, x = torch.tensor([2, 10]), NOISE[:, :3]
    with torch.no_grad():
        tokens = pipeline.class_embedder(labels)
        close(tokens, embedding(labels)[:, None])
        close(
            pipeline.unet(x, TIMESTEPS, encoder_hidden_states=tokens).sample, reference(x, TIMESTEPS, tokens)
        )
    pipeline.set_progress_bar_config(disable=True)
    draw = {"class_labels": [2], "num_inference_steps": 2, "output_type": "np"}
    guided, plain = (
        pipeline(**draw, guidance_scale=scale, generator=torch.Generator().manual_seed(0)).images
        for scale in (3.0, 1.0)
    )
    assert guided.shape == (1, 16, 16, 3) and abs(guided - plain).max() > 1e-4


def test_an_imported_pipeline_goes_through_the_whole_of_tfmq(class_folder: Path) -> None:
    sampler, full = (
        open_sampler(class_folder / "q"),
        open_sampler(class_folder / "stock", options={"guidance_scale": 2.0}),
    )
    assert type(sampler.pipeline).__name__ == "LatentClassPipeline" and sampler.options == {
        "guidance_scale": 2.0
    }
    images, expected = (each.run(range(2), steps=2, seed=0) for each in (sampler, full))
    others = full.run(range(2, 4), steps=2, seed=0)
    assert 0 < float((images - expected).abs().mean()) < 0.5 * float((others - expected).abs().mean())


# Opens one directory where nothing but tfmq's and diffusers' front doors has been imported, in either order.
OPENINGS = (
    "import tfmq; from diffusers import DiffusionPipeline as kind",
    "from diffusers import DiffusionPipeline as kind; import tfmq",
)
OPEN = """
import os
pipeline = kind.from_pretrained(os.path.join(folder, name))
assert type(pipeline) is tfmq.LatentClassPipeline and type(pipeline.class_embedder) is tfmq.ClassEmbedder
from tfmq.nn.swap import is_quantized
assert is_quantized(pipeline.unet) == (name == "q")
pipeline.save_pretrained(os.path.join(folder, f"{name} again {order}"))
"""


def test_from_pretrained_opens_class_conditional_pipelines_after_import_tfmq(
    class_folder: Path, elsewhere: Any
) -> None:
    scripts = {
        f"{name} again {order}": f"name, order = {name!r}, {order}\n{imports}\n{OPEN}"
        for order, imports in enumerate(OPENINGS)
        for name in ("stock", "q")
    }
    elsewhere(list(scripts.values()), class_folder)
    assert {path.name for path in class_folder.iterdir()} == {"stock", "q", *scripts}


@pytest.mark.parametrize("said", [None, True, False])
def test_the_average_is_taken_unless_the_configuration_says_otherwise(
    original: SimpleNamespace, randomized: Fill, said: bool | None
) -> None:
    config = latent(PLAIN, VQ, **({} if said is None else {"use_ema": said}))
    params = config["model"]["params"]["unet_config"]["params"]
    trained, other = (
        prefixed(randomized(original.Openai(params)), "model.diffusion_model.") for _ in range(2)
    )
    tensors = trained | averaged(other)
    chosen = ldm.choose_weights(tensors, config)
    expected = trained if said is False else other
    assert chosen.keys() == trained.keys() and all(
        torch.equal(chosen[name], expected[name]) for name in trained
    )
    assert ldm.choose_weights(trained, config).keys() == trained.keys()
    if said is not False:
        del tensors[
            next(name for name in tensors if name.startswith("model_ema.") and name.endswith("outbias"))
        ]
        with pytest.raises(
            ValueError, match=r"averaged weights in the checkpoint lack model\.diffusion_model\..*bias"
        ):
            ldm.choose_weights(tensors, config)


def import_heads(original: SimpleNamespace, randomized: Fill, directory: Path) -> tuple[Any, nn.Module]:
    """Return the imported pipeline of a model with one number of heads at several widths, and its reference
    UNet.
    """
    config = latent(HEADS, KL, scale_factor=0.5)
    reference, stage = (
        randomized(original.Openai(config["model"]["params"]["unet_config"]["params"])),
        randomized(original.FirstStage(KL)),
    )
    tensors = prefixed(reference, "model.diffusion_model.") | prefixed(stage, "first_stage_model.")
    return import_checkpoint(*write(directory, {"state_dict": tensors}, config)), reference


def test_one_number_of_heads_goes_through_the_whole_of_tfmq(
    original: SimpleNamespace, randomized: Fill, tmp_path: Path
) -> None:
    pipeline, reference = import_heads(original, randomized, tmp_path)
    assert type(pipeline.unet) is tfmq.UNet2DHeadsModel
    pipeline.save_pretrained(tmp_path / "stock")
    stored = DiffusionPipeline.from_pretrained(tmp_path / "stock")
    with torch.no_grad():
        close(stored.unet(NOISE, TIMESTEPS).sample, reference(NOISE, TIMESTEPS))
    tfmq.quantize(tmp_path / "stock", rtn_w8a8(), output_dir=tmp_path / "q")
    quantized, full = (
        PipelineSampler(DiffusionPipeline.from_pretrained(tmp_path / "q")),
        open_sampler(tmp_path / "stock"),
    )
    found, before = inspect(quantized, directory=tmp_path / "q"), inspect(full)
    assert found.family == before.family == "UNet2DHeadsModel" and found.parameters == before.parameters
    images, expected = (each.run(range(2), steps=2, seed=0) for each in (quantized, full))
    others = full.run(range(2, 4), steps=2, seed=0)
    assert 0 < float((images - expected).abs().mean()) < 0.5 * float((others - expected).abs().mean())
    executed = PipelineSampler(tfmq.load(tmp_path / "q"))
    assert float((executed.run(range(2), steps=2, seed=0) - images).abs().mean()) < 0.5 * float(
        (images - expected).abs().mean()
    )


# The published configuration of LDM-8 for LSUN-Churches.
CHURCHES: dict[str, Any] = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 192,
    "attention_resolutions": [1, 2, 4, 8],
    "num_res_blocks": 2,
    "channel_mult": [1, 2, 2, 4, 4],
    "num_heads": 8,
    "use_scale_shift_norm": True,
    "resblock_updown": True,
}
KL_F8: dict[str, Any] = {
    "embed_dim": 4,
    "ddconfig": {
        **SIZES,
        "ch": 128,
        "ch_mult": [1, 2, 4, 4],
        "num_res_blocks": 2,
        "resolution": 256,
        "z_channels": 4,
        "double_z": True,
    },
}


def test_every_tensor_of_the_published_churches_model_has_its_place(original: SimpleNamespace) -> None:
    config = latent(CHURCHES, KL_F8)
    with torch.device("meta"):
        reference, stage = original.Openai(CHURCHES), original.FirstStage(KL_F8)
        unet = ldm.unconditional_unet(prefixed(reference, "model.diffusion_model."), config)
        autoencoder = ldm.first_stage(prefixed(stage, "first_stage_model."), config)
    assert type(unet) is tfmq.UNet2DHeadsModel and unet.config.num_attention_heads == 8
    widths = {
        (module.to_q.out_features, module.heads) for module in unet.modules() if isinstance(module, Attention)
    }
    assert widths == {(192, 8), (384, 8), (768, 8)}
    for made, wanted in ((unet, reference), (autoencoder, stage)):
        assert sum(parameter.numel() for parameter in made.parameters()) == sum(
            parameter.numel() for parameter in wanted.parameters()
        )


@pytest.mark.parametrize(
    "change", [{}, {"num_head_channels": -1, "num_heads": 2, "attention_resolutions": [2]}]
)
def test_heads_of_one_width_need_no_model_of_our_own(
    original: SimpleNamespace, change: dict[str, Any]
) -> None:
    config = latent({**PLAIN, **change}, VQ)
    with torch.device("meta"):
        reference = original.Openai(config["model"]["params"]["unet_config"]["params"])
        assert (
            type(ldm.unconditional_unet(prefixed(reference, "model.diffusion_model."), config)) is UNet2DModel
        )


@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
def test_stable_diffusion(original: SimpleNamespace, randomized: Fill, tmp_path: Path, suffix: str) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    tokens = [*"abcdefgh", *(f"{letter}</w>" for letter in "abcdefgh"), "<|startoftext|>", "<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer(
        str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"), model_max_length=8
    ).save_pretrained(tmp_path / "tokenizer")
    size = {
        "hidden_size": 64,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 1,
        "max_position_embeddings": 8,
    }
    ids = {"bos_token_id": 16, "eos_token_id": 17, "pad_token_id": 17}
    text = randomized(CLIPTextModel(CLIPTextConfig(vocab_size=len(tokens), **size, **ids)))
    config = latent(
        {**PLAIN, **CROSS, "num_head_channels": -1, "num_heads": 4, "context_dim": 64},
        KL,
        condition={"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder"},
        scale_factor=0.18215,
    )
    reference = randomized(original.Openai(config["model"]["params"]["unet_config"]["params"]))
    stage = randomized(original.FirstStage(KL))
    encoder = {
        name if name.startswith("text_model.") else f"text_model.{name}": tensor
        for name, tensor in text.state_dict().items()
    }
    encoder["text_model.embeddings.position_ids"] = torch.arange(8)[None]
    tensors = prefixed(reference, "model.diffusion_model.") | prefixed(stage, "first_stage_model.")
    tensors |= {
        f"cond_stage_model.transformer.{name}": tensor.contiguous() for name, tensor in encoder.items()
    }
    _, config_file = write(tmp_path, {}, config)
    if suffix == "ckpt":
        torch.save({"state_dict": tensors, "global_step": 470_000}, tmp_path / "v1.ckpt")
    else:
        save_file(tensors, tmp_path / "v1.safetensors")
    pipeline = import_checkpoint(
        tmp_path / f"v1.{suffix}", config_file, tokenizer=str(tmp_path / "tokenizer")
    )
    numbers = torch.tensor([[16, 1, 2, 17, 17, 17, 17, 17]])
    with torch.no_grad():
        context = text(numbers).last_hidden_state
        close(pipeline.text_encoder(numbers).last_hidden_state, context)
        x, context = NOISE, context.expand(2, -1, -1)
        close(
            pipeline.unet(x, TIMESTEPS, encoder_hidden_states=context).sample,
            reference(x, TIMESTEPS, context),
        )
        close(pipeline.vae.decode(x).sample, stage.decode(x))
    pipeline.save_pretrained(tmp_path / "pipeline")
    images = open_sampler(tmp_path / "pipeline", prompts=("a b",)).run(range(1), steps=4, seed=0)
    assert images.shape == (1, 3, 16, 16) and torch.isfinite(images).all()


def test_the_verb_writes_a_pipeline_that_every_verb_opens(
    original: SimpleNamespace, randomized: Fill, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tfmq.cli.commands import run

    sizes = {key: DDIM["model"][key] for key in ("ch", "ch_mult", "num_res_blocks", "attn_resolutions")}
    reference = randomized(original.Ddim(**sizes, size=8))
    checkpoint, config = write(tmp_path, reference.state_dict(), DDIM)
    arguments = ["import", str(checkpoint), "--config", str(config), "--output-dir", str(tmp_path / "stock")]
    assert run([*arguments, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["pipeline"] == "DDIMPipeline" and printed["components"] == {
        "unet": "UNet2DModel",
        "scheduler": "DDIMScheduler",
    }
    assert run(arguments) == 1 and "already holds" in capsys.readouterr().err
    assert run(["inspect", str(tmp_path / "stock"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"] == sum(
        parameter.numel() for parameter in reference.parameters()
    )


class Command:
    """An object whose reading runs a command, unless the reader knows better."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def lightning(monkeypatch: pytest.MonkeyPatch) -> type:
    """Return a class that goes by the name of Lightning's callback, which can be imported while the test
    runs.
    """
    names = (
        "pytorch_lightning",
        "pytorch_lightning.callbacks",
        "pytorch_lightning.callbacks.model_checkpoint",
    )
    for name in names:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    kind = type("ModelCheckpoint", (), {"__module__": names[-1]})
    sys.modules[names[-1]].ModelCheckpoint = kind  # type: ignore[attr-defined]
    return kind


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_what_a_training_keeps_beside_the_weights_is_left_out(
    original: SimpleNamespace, randomized: Fill, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zipped: bool
) -> None:
    """The released Stable Diffusion v1 files are like that: the class of a callback is the key of its
    state.
    """
    described = latent(PLAIN, VQ)
    unet, stage = (
        randomized(original.Openai(described["model"]["params"]["unet_config"]["params"])),
        randomized(original.FirstStage(VQ)),
    )
    tensors = prefixed(unet, "model.diffusion_model.") | prefixed(stage, "first_stage_model.")
    states: dict[str, Any] = {"state_dict": tensors, "epoch": 3, "pytorch-lightning_version": "1.4.2"}
    checkpoint, config = write(tmp_path, states, described)
    expected = import_checkpoint(checkpoint, config).unet.state_dict()
    with monkeypatch.context() as patched:
        kind = lightning(patched)
        made = kind()
        made.best = torch.ones(1)  # type: ignore[attr-defined]
        beside = {"callbacks": {kind: {"monitor": "val/loss"}}, "hooks": [made]} if zipped else {}
        torch.save({**states, **beside}, checkpoint, _use_new_zipfile_serialization=zipped)
    found = import_checkpoint(checkpoint, config).unet.state_dict()
    assert found.keys() == expected.keys() and all(
        torch.equal(found[name], expected[name]) for name in expected
    )


@pytest.mark.parametrize("function", [os.system, eval], ids=["of the system", "of Python"])
def test_nothing_that_a_file_names_is_called(tmp_path: Path, function: Callable[..., Any]) -> None:
    sign = tmp_path / "called"
    text = f"touch {sign}" if function is os.system else f"__import__('pathlib').Path({str(sign)!r}).touch()"
    checkpoint, config = write(tmp_path, {"w": torch.zeros(1), "command": Command(function, text)}, DDIM)
    with pytest.raises(
        ValueError, match=r"model\.ckpt holds Python objects that could run code|missing: conv_in"
    ):
        import_checkpoint(checkpoint, config)
    assert not sign.exists()


def test_compressed_files_are_refused_before_they_are_read(tmp_path: Path) -> None:
    """A file of a megabyte could hold a gigabyte of zeros."""
    checkpoint, config = write(tmp_path, {"w": torch.zeros(1)}, DDIM)
    with zipfile.ZipFile(checkpoint) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(checkpoint, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    assert torch.load(checkpoint, weights_only=True)["w"].tolist() == [0]
    with pytest.raises(ValueError, match=r"model\.ckpt is compressed \('.*'\), which torch does not do"):
        import_checkpoint(checkpoint, config)


def test_what_does_not_fit_is_listed(original: SimpleNamespace, randomized: Fill, tmp_path: Path) -> None:
    sizes = {key: DDIM["model"][key] for key in ("ch", "ch_mult", "num_res_blocks", "attn_resolutions")}
    states = original.Ddim(**sizes, size=8).state_dict()
    states["conv_out.surplus"] = torch.zeros(1)
    del states["temb.dense.0.bias"]
    states["conv_in.weight"] = torch.zeros(5)
    with pytest.raises(ValueError, match="UNet2DModel") as caught:
        import_checkpoint(*write(tmp_path, states, DDIM))
    said = str(caught.value)
    assert (
        "missing: time_embedding.linear_1.bias" in said
        and "unknown: conv_out.surplus" in said
        and "another shape: conv_in.weight" in said
    )
    config = latent(PLAIN, VQ)
    unet, stage = original.Openai(config["model"]["params"]["unet_config"]["params"]), original.FirstStage(VQ)
    tensors = prefixed(unet, "model.diffusion_model.") | prefixed(stage, "first_stage_model.")
    tensors["model.diffusion_model.label_emb.weight"] = torch.zeros(3, 3)
    with pytest.raises(ValueError, match=r"not used: model\.diffusion_model\.label_emb\.weight$"):
        import_checkpoint(*write(tmp_path, tensors, config))


@pytest.mark.parametrize(
    ("states", "config", "message"),
    [
        (
            {"w": torch.zeros(1), "command": Command(os.system, "true")},
            DDIM,
            "model.ckpt holds Python objects that could run code",
        ),
        ({"epoch": 3}, DDIM, "model.ckpt holds a dict without named tensors"),
        ({"w": torch.zeros(1)}, {"model": {"ch": 3}}, "config.yaml describes neither a DDIM model"),
        ({"w": torch.zeros(1)}, {**DDIM, "data": {}}, "the configuration has no data.image_size"),
        ({"w": torch.zeros(1)}, latent(PLAIN, VQ), "does not fit the VQModel"),
    ],
)
def test_foreign_files_are_refused_by_name(
    tmp_path: Path, states: Any, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        import_checkpoint(*write(tmp_path, states, config))


@pytest.mark.parametrize(
    "values",
    [
        {"ch_mult": 3},
        {"ch_mult": "1,2"},
        {"ch_mult": []},
        {"ch": -8},
        {"attn_resolutions": 4},
        {"num_res_blocks": None},
    ],
)
def test_values_of_another_kind_are_one_error_that_names_the_configuration(
    tmp_path: Path, values: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=r"config\.yaml has a value of another kind than the originals have"):
        import_checkpoint(*write(tmp_path, {"w": torch.zeros(1)}, {**DDIM, "model": DDIM["model"] | values}))
    with pytest.raises(ValueError, match=r"config\.yaml describes neither"):
        import_checkpoint(*write(tmp_path, {"w": torch.zeros(1)}, {**DDIM, "model": list(values)}))


@pytest.mark.parametrize("name", ["model.ckpt", "config.yaml"])
@pytest.mark.parametrize("content", [None, b"", b"\x80\x02 garbage: [", b"PK\x03\x04cut"])
def test_damaged_and_missing_files_are_one_error_that_names_them(
    tmp_path: Path, name: str, content: bytes | None
) -> None:
    paths = write(tmp_path, {"w": torch.zeros(1)}, DDIM)
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=name):
        import_checkpoint(*paths)


CLASSES = {
    "target": "ldm.modules.encoders.modules.ClassEmbedder",
    "params": {"embed_dim": 8, "n_classes": 11},
}


def test_what_diffusers_cannot_compute_is_refused_by_the_option(
    original: SimpleNamespace, tmp_path: Path
) -> None:
    config = latent({**PLAIN, **CROSS, "resblock_updown": True}, VQ, condition=CLASSES)
    unet = original.Openai({**PLAIN, "in_channels": 3, "out_channels": 3})
    tensors = prefixed(unet, "model.diffusion_model.") | prefixed(
        original.FirstStage(VQ), "first_stage_model."
    )
    with pytest.raises(ValueError, match=r"resblock_updown: .* cannot be converted"):
        import_checkpoint(*write(tmp_path, tensors, config))


@pytest.mark.parametrize("change", [{"num_head_channels": -1, "num_heads": 3}, {"num_head_channels": 24}])
def test_heads_that_do_not_divide_an_attention_are_refused_by_the_option(
    original: SimpleNamespace, tmp_path: Path, change: dict[str, int]
) -> None:
    unet = original.Openai({**PLAIN, "in_channels": 3, "out_channels": 3})
    tensors = prefixed(unet, "model.diffusion_model.") | prefixed(
        original.FirstStage(VQ), "first_stage_model."
    )
    name, value = list(change.items())[-1]
    with pytest.raises(
        ValueError, match=f"{name}: {value} does not divide (32|64), the width of an attention"
    ):
        import_checkpoint(*write(tmp_path, tensors, latent({**PLAIN, **change}, VQ)))
