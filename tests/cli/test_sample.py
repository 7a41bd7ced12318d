"""`tfmq sample`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tfmq.backends.execution import BACKENDS
from tfmq.errors import MissingExtraError

Run = Callable[..., Any]


def images(directory: Path) -> np.ndarray:
    with np.load(directory / "samples.npz") as stored:
        return stored["images"]


@pytest.mark.parametrize("grey", [False, True])
def test_files(tfmq: Run, model: Path, grey_model: Path, tmp_path: Path, grey: bool) -> None:
    result = tfmq(
        "sample",
        grey_model if grey else model,
        "--num-images",
        3,
        "--steps",
        2,
        "--seed",
        5,
        "--output-dir",
        tmp_path / "s",
    )
    assert result.status == 0 and str(tmp_path / "s") in result.out and "sampling" in result.err
    assert sorted(p.name for p in (tmp_path / "s").iterdir()) == [
        "00000.png",
        "00001.png",
        "00002.png",
        "grid.png",
        "samples.npz",
    ]
    drawn = images(tmp_path / "s")
    assert drawn.shape == (3, 8, 8, 1 if grey else 3) and drawn.dtype == np.uint8
    for index, image in enumerate(drawn):
        assert np.array_equal(
            np.asarray(Image.open(tmp_path / "s" / f"{index:05d}.png")).reshape(image.shape), image
        )


def test_images_are_the_pipeline_s_own(tfmq: Run, model: Path, tmp_path: Path) -> None:
    from diffusers import DDIMPipeline

    from tfmq.models.sampler import image_generator

    assert (
        tfmq(
            "sample", model, "--num-images", 2, "--steps", 3, "--seed", 9, "--output-dir", tmp_path / "s"
        ).status
        == 0
    )
    generators = [image_generator(9, index) for index in range(2)]
    pipeline = DDIMPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(batch_size=2, generator=generators, num_inference_steps=3, output_type="np").images
    assert np.array_equal(images(tmp_path / "s"), (expected * 255).round().astype(np.uint8))


def test_same_seed_same_files(tfmq: Run, quantized: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert tfmq("sample", quantized, "--num-images", 2, "--output-dir", tmp_path / name).status == 0
    assert (
        tfmq("sample", quantized, "--num-images", 2, "--seed", 1, "--output-dir", tmp_path / "c").status == 0
    )
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    assert not np.array_equal(images(tmp_path / "a"), images(tmp_path / "c"))


def test_a_quantized_model_runs_the_steps_it_was_calibrated_on(
    tfmq: Run, quantized: Path, tmp_path: Path
) -> None:
    result = tfmq("sample", quantized, "--num-images", 1, "--output-dir", tmp_path / "s", "--json")
    found = result.json
    assert found.pop("backend") in ("torch", "simulated")
    assert found == {
        "output_dir": str(tmp_path / "s"),
        "num_images": 1,
        "steps": 4,
        "seed": 0,
        "shape": [1, 8, 8, 3],
    }
    assert "warning" not in result.err


def test_steps_that_were_not_calibrated_warn_once(tfmq: Run, quantized: Path, tmp_path: Path) -> None:
    result = tfmq(
        "sample",
        quantized,
        "--num-images",
        3,
        "--batch-size",
        1,
        "--steps",
        3,
        "--output-dir",
        tmp_path / "s",
    )
    warned = [line for line in result.err.splitlines() if line.startswith("warning: ")]
    assert result.status == 0 and len(warned) == 1 and "not calibrated" in warned[0]


def test_prompts_without_effect_warn(tfmq: Run, model: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a cat\n")
    result = tfmq(
        "sample",
        model,
        "--num-images",
        1,
        "--steps",
        1,
        "--prompts",
        tmp_path / "p.txt",
        "--output-dir",
        tmp_path / "s",
    )
    assert result.status == 0 and "warning: prompts have no effect" in result.err


def test_a_smaller_run_leaves_no_image_of_a_larger_one(tfmq: Run, model: Path, tmp_path: Path) -> None:
    for count in (3, 1):
        assert (
            tfmq("sample", model, "--num-images", count, "--steps", 1, "--output-dir", tmp_path / "s").status
            == 0
        )
    assert sorted(p.name for p in (tmp_path / "s").iterdir()) == ["00000.png", "grid.png", "samples.npz"]


def test_a_full_disk(tfmq: Run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("numpy.savez_compressed", full)
    result = tfmq("sample", model, "--num-images", 1, "--steps", 1, "--output-dir", tmp_path / "s")
    assert (
        result.status == 1
        and result.err.splitlines()[-1].startswith("error: ")
        and "No space left" in result.err
    )
    assert list(tmp_path.iterdir()) == []


def test_a_named_backend_computes(tfmq: Run, quantized: Path, tmp_path: Path) -> None:
    drawn = {}
    for name, *more in (
        ("simulated",),
        ("reference",),
        ("simulated", "--weights", "packed"),
        ("reference", "--weights", "packed"),
    ):
        options = ("--backend", name, *more)
        result = tfmq(
            "sample", quantized, "--num-images", 2, *options, "--output-dir", tmp_path / "s", "--json"
        )
        assert result.status == 0 and result.json["backend"] == name
        drawn[options] = images(tmp_path / "s").astype(int)
    full, exact, *packed = drawn.values()
    assert np.array_equal(full, packed[0]) and np.array_equal(exact, packed[1]), (
        "how weights are kept changes no value"
    )
    # Ties of rounding fall otherwise in the other arithmetic, and a random network magnifies them: 30 dB, and
    # no pixel for pixel.
    assert np.square(full - exact).mean() <= 255**2 / 1000


def test_a_full_precision_model_has_no_backend(tfmq: Run, model: Path, tmp_path: Path) -> None:
    numbers = ("--num-images", 1, "--steps", 1, "--output-dir", tmp_path / "s")
    assert tfmq("sample", model, *numbers, "--json").json["backend"] is None
    result = tfmq("sample", model, *numbers, "--weights", "packed")
    assert result.status == 0 and "warning: --weights has no effect" in result.err
    result = tfmq(
        "sample", model, "--num-images", 1, "--backend", "simulated", "--output-dir", tmp_path / "t"
    )
    assert (
        result.status == 1
        and result.out == ""
        and "not quantized" in result.err
        and result.err.count("\n") == 1
    )
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize("error", [ValueError, MissingExtraError])
def test_a_backend_that_this_machine_cannot_run(
    tfmq: Run,
    quantized: Path,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: type[Exception],
) -> None:
    def missing() -> str:
        if error is MissingExtraError:
            raise MissingExtraError("this needs abacus; install it with: pip install 'tfmq[abacus]'")
        return "an abacus"

    monkeypatch.setattr(BACKENDS["torch"], "missing", missing)
    for verb, *more in (("sample",), ("compare", "--reference", model)):
        result = tfmq(verb, quantized, *more, "--backend", "torch", "--output-dir", tmp_path / "s")
        assert (
            result.status == 1 and result.out == "" and "abacus" in result.err and result.err.count("\n") == 1
        )
        assert not (tmp_path / "s").exists()
    assert (
        tfmq("sample", quantized, "--num-images", 1, "--output-dir", tmp_path / "s", "--json").json["backend"]
        != "torch"
    )
