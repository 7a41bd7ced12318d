"""Inputs that are refused: status 1, one line, no files."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def _truncate(directory: Path) -> None:
    path = directory / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])


def _flip_a_bit(directory: Path) -> None:
    path = directory / WEIGHTS
    data = bytearray(path.read_bytes())
    data[-50] ^= 1
    path.write_bytes(data)


def _drop(directory: Path) -> None:
    (directory / WEIGHTS).unlink()


def _overwrite(directory: Path) -> None:
    (directory / WEIGHTS).write_text("not tensors")


def _other_version(directory: Path) -> None:
    path = directory / "unet" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["version"] = 99
    path.write_text(json.dumps(config))


def _edit(directory: Path) -> None:
    path = directory / "unet" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["structure"]["layers"][0]["bits"] = 3
    path.write_text(json.dumps(config))


def _no_json(directory: Path) -> None:
    (directory / "unet" / "config.json").write_text("{")


def _other_architecture(directory: Path) -> None:
    path = directory / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"norm_eps": 0.01}))


def _lost_manifest(directory: Path) -> None:
    path = directory / "unet" / "config.json"
    config = json.loads(path.read_text())
    del config["quantization_config"]
    path.write_text(json.dumps(config))


def _other_scheduler(directory: Path) -> None:
    path = directory / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"beta_end": 0.03}))


def _no_scheduler(directory: Path) -> None:
    (directory / "scheduler" / "scheduler_config.json").unlink()


def _no_index(directory: Path) -> None:
    (directory / "model_index.json").unlink()


DAMAGES = {
    "header|bytes": _truncate,
    "damaged": _flip_a_bit,
    "no .safetensors": _drop,
    "safetensors file|bytes": _overwrite,
    "version": _other_version,
    "changed": _edit,
    "JSON": _no_json,
    "norm_eps is 0.01, was 1e-05": _other_architecture,
    "tensors of unet, such as conv_in.weight": _lost_manifest,
    "scheduler_config.json is not the file": _other_scheduler,
    "scheduler_config.json is missing": _no_scheduler,
    "model_index.json is missing": _no_index,
}


@pytest.mark.parametrize("cause", DAMAGES)
@pytest.mark.parametrize("verb", ["sample", "inspect"])
def test_a_damaged_checkpoint(tfmq: Run, quantized: Path, tmp_path: Path, cause: str, verb: str) -> None:
    shutil.copytree(quantized, tmp_path / "q")
    DAMAGES[cause](tmp_path / "q")
    more = ("--num-images", 1, "--output-dir", tmp_path / "s") if verb == "sample" else ("--json",)
    result = tfmq(verb, tmp_path / "q", *more)
    assert result.status == 1 and result.out == ""
    assert result.err.startswith("error: ") and result.err.count("\n") == 1
    assert any(word in result.err for word in cause.split("|"))
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("verb", ["quantize", "sample", "inspect"])
def test_no_model(tfmq: Run, tmp_path: Path, verb: str) -> None:
    (tmp_path / "empty").mkdir()
    more = () if verb == "inspect" else ("--output-dir", tmp_path / "out")
    for source, cause in (("empty", "no model_index.json"), ("nowhere", "does not exist")):
        result = tfmq(verb, tmp_path / source, *more)
        assert result.status == 1 and result.out == "" and cause in result.err and result.err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_other_inputs(tfmq: Run, model: Path, quantized: Path, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "typo.yaml").write_text("name: x\nlerning: {}\n")
    (tmp_path / "bits.yaml").write_text("name: x\nweights: {bits: 9}\n")
    (tmp_path / "rule.yaml").write_text(
        recipe.read_text() + "rules: [{match: nothing.*, weight_bits: 8, activation_bits: 8}]\n"
    )
    (tmp_path / "file").write_text("")
    out = ("--output-dir", tmp_path / "out")
    for arguments, cause in (
        (("quantize", model, *out, "--recipe", tmp_path / "typo.yaml"), "lerning"),
        (("quantize", model, *out, "--recipe", tmp_path / "bits.yaml"), "9"),
        (("quantize", model, *out, "--recipe", tmp_path / "nowhere.yaml"), "nowhere.yaml"),
        (("quantize", model, *out, "--prompts", tmp_path / "file"), "no prompt"),
        (("quantize", quantized, *out, "--recipe", recipe), "quantized already"),
        (("quantize", model, "--output-dir", tmp_path / "file" / "q", "--recipe", recipe), "not a directory"),
        (("inspect", quantized / "unet"), "no pipeline"),
        (("quantize", model, *out, "--recipe", tmp_path / "rule.yaml"), "nothing.*"),
    ):
        result = tfmq(*arguments)
        assert (
            result.status == 1 and result.out == "" and cause in result.err and result.err.count("\n") == 1
        ), (arguments, result)


def test_a_component_that_is_no_denoiser(tfmq: Run, tmp_path: Path) -> None:
    result = tfmq("quantize", "default", "--output-dir", tmp_path / "q", "--component", "transformer")
    assert (
        result.status == 1
        and "has no denoiser transformer; it has unet" in result.err
        and not list(tmp_path.iterdir())
    )


def test_more_images_than_there_is_room_for(
    tfmq: Run, model: Path, quantized: Path, recipe: Path, tmp_path: Path
) -> None:
    """What they would take is said, and nothing of it is made first: neither a list of a billion batches nor
    a file.
    """
    images, out = ("--num-images", 10**15, "--num-pairs", 10**15), ("--output-dir", tmp_path / "o")
    local = ("--extractor", "pooled-pixels", "--metrics", "psnr")
    for arguments, causes in (
        (("sample", model, *out, *images[:2]), (" GB of memory, where ", "days", "--num-images")),
        (
            ("compare", quantized, "--reference", model, *out, *images[:2]),
            (" GB of memory, where ", "days", "--num-images"),
        ),
        (
            ("evaluate", quantized, "--reference", model, *out, *images, *local),
            (" GB of disk, where ", "--num-images"),
        ),
        (
            ("quantize", model, "--recipe", recipe, *out, "--calib-size", 10**15),
            (" GB of disk, where ", "days", "--calib-size"),
        ),
    ):
        result = tfmq(*arguments)
        assert (
            result.status == 1
            and result.out == ""
            and all(cause in result.err.splitlines()[-1] for cause in causes)
        ), (arguments, result)
        assert not (tmp_path / "o").exists() or not any((tmp_path / "o").iterdir())


def test_an_output_path_that_is_not_utf_8(
    tfmq: Run, model: Path, quantized: Path, recipe: Path, tmp_path: Path
) -> None:
    import os

    out = ("--output-dir", os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    for arguments in (
        ("sample", model, *out),
        ("quantize", model, "--recipe", recipe, *out),
        ("compare", quantized, "--reference", model, *out),
        ("evaluate", quantized, "--reference", model, *out, "--metrics", "psnr"),
        ("analyze", quantized, "--reference", model, *out),
        ("report", quantized, *out),
        ("export", quantized, "--to", "openvino", *out),
    ):
        result = tfmq(*arguments)
        assert result.status == 1 and result.out == "" and result.err.count("\n") == 1, (arguments, result)
        assert "\\xff' is not UTF-8 text" in result.err and not any(tmp_path.iterdir())
