"""All verbs on pipelines of other kinds: text-to-image, and class-conditional transformers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

Run = Callable[..., Any]


def _autoencoder() -> torch.nn.Module:
    from diffusers import AutoencoderKL

    blocks = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (4, 8),
    }
    return AutoencoderKL(**blocks, latent_channels=4, norm_num_groups=4, sample_size=16)


def _tokenizer(directory: Path) -> Any:
    """Return a CLIP tokenizer that knows the letters."""
    from transformers import CLIPTokenizer

    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (directory / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (directory / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(directory / "vocab.json"), str(directory / "merges.txt"), model_max_length=8)


def save_text_to_image(directory: Path) -> None:
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    tokenizer = _tokenizer(directory.parent)
    size = {
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 8,
    }
    end = len(tokenizer) - 1
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), bos_token_id=end - 1, eos_token_id=end, pad_token_id=end, **size
        )
    )
    kinds = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("UpBlock2D",)}
    shape = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (8,),
        "layers_per_block": 1,
        "norm_num_groups": 4,
    }
    StableDiffusionPipeline(
        vae=_autoencoder(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(**shape, **kinds, cross_attention_dim=8, attention_head_dim=2),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(directory)


def save_clip(directory: Path) -> None:
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    size = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokenizer = _tokenizer(directory.parent)
    end = len(tokenizer) - 1
    text = {
        **size,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 8,
        "bos_token_id": end - 1,
        "eos_token_id": end,
        "pad_token_id": end,
    }
    # With these weights similarities lie above zero, where scores end.
    torch.manual_seed(5)
    model = CLIPModel(
        CLIPConfig(
            text_config=text, vision_config={**size, "image_size": 16, "patch_size": 8}, projection_dim=8
        )
    )
    model.save_pretrained(directory)
    pictures = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    CLIPProcessor(image_processor=pictures, tokenizer=tokenizer).save_pretrained(directory)


def save_class_conditional(directory: Path) -> None:
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    # The pipeline's guidance asks for class 1000, "no class".
    heads = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_layers": 2,
        "num_embeds_ada_norm": 1000,
        "norm_num_groups": 4,
    }
    transformer = DiTTransformer2DModel(in_channels=4, out_channels=8, sample_size=8, patch_size=2, **heads)
    DiTPipeline(transformer=transformer, vae=_autoencoder(), scheduler=DDIMScheduler()).save_pretrained(
        directory
    )


FAMILIES = {
    "UNet2DConditionModel": (save_text_to_image, {"timestep"}),
    "DiTTransformer2DModel": (save_class_conditional, {"timestep", "class_labels"}),
}


class Made(NamedTuple):
    """A family's model and its quantized twin on disk, and the prompts that it draws from, if any."""

    family: str
    model: Path
    quantized: Path
    prompts: tuple[object, ...]


@pytest.fixture(scope="module", params=FAMILIES)
def made(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    recipe: Path,
    printed: Callable[..., Any],
) -> Made:
    """Return a family's model quantized by the verb; tests only read it."""
    folder = tmp_path_factory.mktemp(request.param)
    FAMILIES[request.param][0](folder / "model")
    (folder / "p.txt").write_text("a cat\na dog\n")
    prompts = ("--prompts", folder / "p.txt") if request.param == "UNet2DConditionModel" else ()
    printed("quantize", folder / "model", "--recipe", recipe, *prompts, "--output-dir", folder / "q")
    return Made(request.param, folder / "model", folder / "q", prompts)


@pytest.mark.filterwarnings("default")
def test_every_verb(tfmq: Run, made: Made, tmp_path: Path) -> None:
    found = tfmq("inspect", made.model, "--json").json
    assert found["family"] == made.family
    depends_on = FAMILIES[made.family][1]
    assert {source for layer in found["temporal"] for source in layer["depends_on"]} == depends_on
    numbers = ("--num-images", 2, *made.prompts)
    command = ("compare", made.quantized, "--reference", made.model, *numbers)
    result = tfmq(*command, "--output-dir", tmp_path / "c", "--json")
    assert result.status == 0, result.err
    assert 5 < result.json["psnr_db"]["min"] < 100 and result.json["temporal"]["max_relative_error"] > 0
    assert {line.partition(":")[0] for line in result.err.splitlines()} == {"sampling", "note"}
    drawn = ("--backend", result.json["backend"], "--output-dir", tmp_path / "s")
    assert tfmq("sample", made.quantized, *numbers, *drawn).status == 0
    with (
        np.load(tmp_path / "s" / "samples.npz") as alone,
        np.load(tmp_path / "c" / "samples.npz") as compared,
    ):
        assert alone["images"].shape == (2, 16, 16, 3)
        assert np.array_equal(alone["images"], compared["quantized"])


@pytest.mark.filterwarnings("default")
def test_prompts_reach_the_model(tfmq: Run, tmp_path: Path) -> None:
    save_text_to_image(tmp_path / "model")
    drawn = {}
    for name, text in (("a", "a cat\n"), ("b", "quiz\n"), ("c", "a cat\na dog\n")):
        (tmp_path / f"{name}.txt").write_text(text)
        numbers = ("--num-images", 2, "--steps", 2, "--prompts", tmp_path / f"{name}.txt")
        assert tfmq("sample", tmp_path / "model", *numbers, "--output-dir", tmp_path / name).status == 0
        with np.load(tmp_path / name / "samples.npz") as stored:
            drawn[name] = stored["images"].astype(int)
    assert not np.array_equal(drawn["a"], drawn["b"])
    assert np.array_equal(drawn["a"][0], drawn["c"][0]) and not np.array_equal(drawn["a"][1], drawn["c"][1])


@pytest.mark.filterwarnings("default")
def test_evaluate_every_family(tfmq: Run, made: Made, tmp_path: Path) -> None:
    """Guidance calls the denoiser with each sample twice; images are compared with their own text."""
    pytest.importorskip("torchmetrics")
    save_clip(tmp_path / "clip")
    numbers = ("--num-images", 3, "--batch-size", 2, *made.prompts, "--json")
    command = ("evaluate", made.quantized, "--reference", made.model, *numbers)
    result = tfmq(*command, "--metrics", "clip,trajectory", "--clip", tmp_path / "clip")
    if not made.prompts:
        assert result.status == 1 and "does not draw from text" in result.err
        result = tfmq(*command, "--metrics", "psnr,trajectory")
    assert result.status == 0, result.err
    errors = result.json["paired"]["trajectory"]["mean"]
    assert errors[0] == 0 < errors[-1] < 1 and len(errors) == 4
    if made.prompts:
        check_clip(result.json["rows"], tfmq, made, tmp_path)


def check_clip(rows: list[dict[str, Any]], tfmq: Run, made: Made, folder: Path) -> None:
    """The scores are `100 cos` of the images that `tfmq sample` draws and their own prompts, computed by
    transformers alone.
    """
    from transformers import CLIPModel, CLIPProcessor

    model, processor = (
        CLIPModel.from_pretrained(folder / "clip").eval(),
        CLIPProcessor.from_pretrained(folder / "clip"),
    )
    for row, source in zip(rows, (made.model, made.quantized), strict=True):
        drawn = ("--num-images", 3, "--batch-size", 2, "--steps", 4, *made.prompts)
        assert tfmq("sample", source, *drawn, "--output-dir", folder / "s").status == 0
        with np.load(folder / "s" / "samples.npz") as stored:
            images = list(torch.from_numpy(stored["images"]).permute(0, 3, 1, 2))
        inputs = processor(text=["a cat", "a dog", "a cat"], images=images, return_tensors="pt", padding=True)
        with torch.no_grad():
            similarity = model(**inputs).logits_per_image.diagonal() / model.logit_scale.exp()
        assert row["metric"] == "clip" and row["value"] > 0
        assert row["value"] == pytest.approx(100 * float(similarity.mean()), rel=1e-4)


def test_without_clip_it_says_how_to_get_it(tmp_path: Path) -> None:
    from tfmq.integrations.clip import open_clip
    from tfmq.storage.errors import ForeignFileError, MissingFileError

    with pytest.raises(MissingFileError, match="hf download nobody/clip"):
        open_clip("nobody/clip")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ForeignFileError, match="empty holds no CLIP model"):
        open_clip(str(tmp_path / "empty"))


def test_clip_weights_in_a_file_of_torchs_are_read_as_tensors_alone(tmp_path: Path) -> None:
    """The CLIP of the papers' tables is published without safetensors."""
    from safetensors.torch import load_file

    from tfmq.integrations.clip import open_clip
    from tfmq.storage.errors import ForeignFileError

    save_clip(tmp_path / "clip")
    (safe,) = (tmp_path / "clip").glob("*.safetensors")
    before = open_clip(str(tmp_path / "clip"))[0].state_dict()
    torch.save(load_file(safe), tmp_path / "clip" / "pytorch_model.bin")
    safe.unlink()
    after = open_clip(str(tmp_path / "clip"))[0].state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    torch.save({"weight": Path("x")}, tmp_path / "clip" / "pytorch_model.bin")
    with pytest.raises(ForeignFileError, match="clip holds no CLIP model"):
        open_clip(str(tmp_path / "clip"))
