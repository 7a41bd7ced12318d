"""The leaderboard at a size that a test can pay for: cells are measured, stay, go on after a kill, and make
the page.
"""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from tfmq.evaluation.adherence.judge import JUDGES
from tfmq.evaluation.sampling import SamplingError
from tfmq.progress import silent
from tfmq.storage.atomic import read_json
from tfmq.storage.prompts import brought
from tfmq.targets import named_directory

diffusers = pytest.importorskip("diffusers")
ROOT = Path(__file__).resolve().parents[2]
PROMPTS = ("a red seven", "a blue two on a white ground", "a green one", "a bold black nine")
OWN = {
    "leaderboard",
    "leaderboard_page",
    "contestants",
    "scoring",
    "methods",
    "loading",
    "reference",
    "scenes",
    "prompts",
    "tokens",
}


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the scripts of benchmarks/ and training/ be imported as they import each other."""
    before = set(sys.modules)
    for folder in ("training", "benchmarks"):
        monkeypatch.syspath_prepend(str(ROOT / folder))
    yield
    for name in OWN - before:
        sys.modules.pop(name, None)


@pytest.fixture
def board(scripts: None, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    import leaderboard
    import methods
    import scoring

    def quick(recipe: Any) -> Any:
        return replace(
            recipe,
            temporal=replace(recipe.temporal, learning=replace(recipe.temporal.learning, iterations=2)),
        )

    monkeypatch.setitem(methods.METHODS, "tfmq", quick)
    monkeypatch.setattr(methods, "SEEDS", (0, 1))
    for name, value in {"DRAWING": ("simulated",), "TIMED": ("torch",), "ROUNDS": 1, "SECONDS": 0.0}.items():
        monkeypatch.setattr(scoring, name, value)
    return leaderboard


class Brightness:
    """Reads whether an image is bright, and of prompts with a ground whether it is dark."""

    attributes = ("bright", "dark")

    def __call__(self, images: Tensor, prompts: list[str]) -> dict[str, list[bool | None]]:
        bright = [bool(image.mean() > 0.5) for image in images]
        return {
            "bright": list(bright),
            "dark": [not b if "ground" in p else None for b, p in zip(bright, prompts, strict=True)],
        }


@pytest.fixture
def painter(scripts: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the directory of a tiny text-to-image pipeline with a judge of its own, beside two files of
    prompts.
    """
    from tokens import LENGTH, build_tokenizer
    from transformers import CLIPTextConfig, CLIPTextModel

    monkeypatch.setitem(JUDGES, "brightness", Brightness)
    ids = build_tokenizer()
    text = {
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": LENGTH,
    }
    special = {
        "bos_token_id": ids.bos_token_id,
        "eos_token_id": ids.eos_token_id,
        "pad_token_id": ids.pad_token_id,
    }
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
    )
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=16,
        **kinds,
    )
    diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(CLIPTextConfig(vocab_size=len(ids), **text, **special)),
        tokenizer=ids,
        unet=unet,
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(tmp_path / "painter")
    (tmp_path / "painter" / "judge.json").write_text(json.dumps({"judge": "brightness"}))
    (tmp_path / "measured.txt").write_text("\n".join(PROMPTS))
    (tmp_path / "calibrated.txt").write_text("a white five\na purple six\n")
    return tmp_path / "painter"


@pytest.fixture
def start(board: ModuleType, tmp_path: Path, mine: str) -> Callable[..., dict[str, Any]]:
    """Return a function that runs the benchmark, on somebody's function that returns a sampler, and returns
    the cells by name.
    """

    def run(*more: str, out: str = "out", model: str = mine) -> dict[str, Any]:
        budget = [
            "--num-images",
            "4",
            "--batch-size",
            "2",
            "--samples",
            "2",
            "--steps",
            "2",
            "--iterations",
            "2",
            "--extractor",
            "pooled-pixels",
        ]
        chosen = ["--bits", "w4a8", "--methods", "rtn,tfmq"]
        options = board.arguments(["--output-dir", str(tmp_path / out), *budget, *chosen, *more])
        found = board.find(model, options)
        assert found is not None
        board.run(found, options, silent)
        return {path.stem: read_json(path) for path in sorted((tmp_path / out).glob("*.json"))}

    return run


def lasting(cell: dict[str, Any]) -> dict[str, Any]:
    """Return what of a cell is the same whenever it is measured."""
    return {name: value for name, value in cell.items() if name not in ("cpu_seconds", "step")}


def test_cells_are_measured_and_go_on_after_a_kill(
    start: Callable[..., dict[str, Any]], board: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def dying(*_: Any, **__: Any) -> Any:
        raise Killed

    made: list[str] = []
    quantize = board.Contestant.quantize

    def counted(self: Any, recipe: Any, **options: Any) -> Any:
        made.append(options["folder"].name)
        return quantize(self, recipe, **options)

    monkeypatch.setattr(board.Contestant, "quantize", counted)
    out = tmp_path / "out"
    first = start("--only", "rtn-0")
    assert list(first) == ["tiny-full-precision", "tiny-w4a8-rtn-0"]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        # After quantizing, before the cell is written.
        patch.setattr(board.Scorer, "fidelity", dying)
        start()
    assert made == ["tiny-w4a8-rtn-0", "tiny-w4a8-tfmq-0"] and not (out / "tiny-w4a8-tfmq-0.json").exists()
    with monkeypatch.context() as patch, pytest.raises(Killed):
        # Before the quantized model is saved: its job lies there.
        patch.setattr("tfmq.api.save", dying)
        start("--only", "rtn-1")
    assert (out / "artifacts" / "tiny-w4a8-rtn-1.job").exists() and not (
        out / "artifacts" / "tiny-w4a8-rtn-1.json"
    ).exists()
    every = start()
    assert made[2:] == ["tiny-w4a8-rtn-1", "tiny-w4a8-rtn-1", "tiny-w4a8-tfmq-1"], (
        "what was quantized is measured, what was not is quantized anew"
    )
    assert not list((out / "artifacts").glob("*.job"))
    assert set(every) == {
        "tiny-full-precision",
        *(f"tiny-w4a8-{method}-{seed}" for method in ("rtn", "tfmq") for seed in (0, 1)),
    }
    assert {name: every[name] for name in first} == first, "finished cells stay"
    whole = start("--only", "tfmq-0", out="again")
    assert lasting(whole["tiny-w4a8-tfmq-0"]) == lasting(every["tiny-w4a8-tfmq-0"])

    cell = every["tiny-w4a8-tfmq-0"]
    assert (
        len(cell["psnr_db"]) == len(cell["ssim"]) == 4
        and cell["frechet"]["name"] == "fd[pooled-pixels]"
        and cell["frechet"]["value"] >= 0
    )
    assert cell["adherence"] == {} and cell["settings"]["prompts"] is None and cell["drawn_by"] == "simulated"
    assert (
        cell["bytes"]["disk"] > 0
        and cell["cpu_seconds"] > 0
        and cell["temporal"]["max"] >= cell["temporal"]["mean"] > 0
    )
    assert (
        cell["step"]["backend"] == "torch"
        and cell["step"]["ms_per_step"] > 0
        and every["tiny-w4a8-tfmq-1"]["step"] is None
    )
    assert "psnr_db" not in every["tiny-full-precision"]

    text = board.page([every[name] for name in sorted(every)])
    (row,) = [line for line in text.splitlines() if line.startswith("| tfmq | 2 (± ")]
    head = next(line for line in text.splitlines() if line.startswith("| method |"))
    assert (
        "### tiny, W4A8" in text
        and "| full precision |" in text
        and row.count("|") == head.count("|") == 14
        and "fd[pooled-pixels]" in text
    )


def test_a_pipeline_is_calibrated_on_other_prompts_than_it_is_judged_on(
    start: Callable[..., dict[str, Any]], painter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import contestants

    seen: list[tuple[str, ...]] = []
    quantize = contestants.tfmq.quantize
    monkeypatch.setattr(
        contestants.tfmq,
        "quantize",
        lambda *args, **options: seen.append(options["prompts"]) or quantize(*args, **options),
    )
    files = [
        "--prompts",
        str(painter.parent / "measured.txt"),
        "--calibration-prompts",
        str(painter.parent / "calibrated.txt"),
    ]
    found = start("--only", "rtn-0", "--guidance", "2", *files, model=f"brush={painter}")
    cell = found["brush-w4a8-rtn-0"]
    assert seen == [("a white five", "a purple six")] and cell["settings"]["prompts"] is not None
    assert cell["adherence"]["bright"][1] == 4 and cell["adherence"]["dark"][1] == 1
    assert (
        found["brush-full-precision"]["adherence"].keys() == {"bright", "dark"} and cell["bytes"]["disk"] > 0
    )
    config = read_json(painter.parent / "out" / "artifacts" / "brush-w4a8-rtn-0" / "unet" / "config.json")
    calibration = config["quantization_config"]["provenance"]["recipe"]["calibration"]
    assert (
        calibration["guidance_scale"],
        calibration["steps"],
        calibration["samples"],
        calibration["interval"],
    ) == (2.0, 2, 2, 1)


def test_other_settings_are_refused(start: Callable[..., dict[str, Any]]) -> None:
    start("--only", "none")
    with pytest.raises(
        SystemExit, match=r"tiny-full-precision\.json has other settings \(num_images 4, now 6\)"
    ):
        start("--only", "none", "--num-images", "6")


def test_a_model_that_draws_nothing_is_a_row(
    start: Callable[..., dict[str, Any]], board: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    start("--only", "none")

    def broken(*_: Any) -> Any:
        raise SamplingError("image 3 holds NaN or infinite values")

    monkeypatch.setattr(board.Reference, "draw", broken)
    found = start("--only", "rtn-0")
    assert found["tiny-w4a8-rtn-0"]["failed"].startswith("image 3")
    assert "| rtn | 1 | failed: image 3 holds NaN or infinite values |" in board.page(list(found.values()))


def test_a_loaded_timing_is_taken_again(start: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    start("--only", "rtn-0")
    path = tmp_path / "out" / "tiny-w4a8-rtn-0.json"
    loaded = {**read_json(path), "step": {"backend": "torch", "ms_per_step": 1e6, "clean": False}}
    path.write_text(json.dumps(loaded))
    again = start("--only", "rtn-0", "--time")["tiny-w4a8-rtn-0"]
    assert again["step"]["ms_per_step"] < 1e6 and {**again, "step": None} == {**loaded, "step": None}


def test_a_named_model_may_be_absent_and_nothing_else(
    board: ModuleType, painter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import contestants

    options = board.arguments(["--steps", "3"])
    monkeypatch.setattr(contestants, "named_directory", lambda name: None)
    monkeypatch.chdir(painter.parent)
    assert board.find("text", options) is None
    with pytest.raises(ValueError, match=r"txet is neither a model's name \(default, text"):
        board.find("txet", options)
    with pytest.raises(ValueError, match=r"painter draws from prompts.*--calibration-prompts"):
        board.find(str(painter), options)


def test_the_models_of_the_project_are_run_as_they_were_trained(
    board: ModuleType, painter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import contestants

    monkeypatch.setattr(contestants, "named_directory", lambda name: painter)
    (painter / "judge.json").write_text(json.dumps({"judge": "scenes"}))
    text = board.find("text", board.arguments([]))
    assert (text.name, text.running.steps, text.running.guidance, text.judge) == (
        "painter",
        20,
        3.0,
        "scenes",
    )
    assert len(text.prompts) == 500 and not set(text.prompts) & set(text.calibration_prompts)


def test_every_row_has_a_recipe_and_the_headline_comes_first(board: ModuleType) -> None:
    import methods

    found = list(methods.cells(["a", "b"]))
    assert len({cell.name for cell in found}) == len(found) and {
        cell.model for cell in found[: len(found) // 2]
    } == {"a"}
    assert [cell.name for cell in found[:2]] == ["a-w4a8-rtn-0", "a-w4a8-brecq-0"] and found[
        len(found) // 2 - 1
    ].seed == 1
    assert {(cell.bits, cell.method) for cell in found} == {
        (bits, method)
        for bits in methods.BITS
        for method in methods.METHODS
        if bits in methods.TRIED.get(method, methods.BITS) and method not in methods.OF_DEFAULT
    }
    own = [cell for cell in methods.cells(["default"]) if cell.method in methods.OF_DEFAULT]
    assert [(cell.method, cell.bits) for cell in own] == [(name, "w4a8") for name in methods.OF_DEFAULT[::-1]]
    recipes = {(cell.bits, cell.method): cell.recipe() for cell in found}
    assert len({recipe.name for recipe in recipes.values()}) == len(recipes)
    for (bits, _), recipe in recipes.items():
        width, depth = bits.removeprefix("w").split("a")
        assert recipe.weights.bits == int(width) and recipe.activations.bits == (
            None if depth == "32" else int(depth)
        )
    plain, searched = recipes["w4a8", "min-max"], recipes["w4a8", "rtn"]
    assert (plain.weights.ranges, plain.activations.ranges, plain.rounding.solver) == (
        "min_max",
        "min_max",
        "nearest",
    )
    assert replace(plain, name="", weights=searched.weights, activations=searched.activations) == replace(
        searched, name=""
    )


def cell(method: str, psnr: list[float], held: int, *, seed: int = 0, bits: str = "w4a8") -> dict[str, Any]:
    return {
        **{
            "model": "text",
            "bits": bits,
            "method": method,
            "seed": seed,
            "machine": "M",
            "versions": {"torch": "2"},
            "commit": {"rtn": None, "tfmq": "abc1234"}.get(method),
        },
        "settings": {
            "num_images": 2,
            "steps": 20,
            "guidance": 3.0,
            "samples": 32,
            "iterations": None,
            "weights": "abc",
        },
        **{
            "psnr_db": psnr,
            "ssim": [0.9] * len(psnr),
            "frechet": {"name": "fd[x]", "value": 0.5},
            "adherence": {"identity": [held, 500]},
        },
        **{
            "temporal": {"mean": 0.1, "max": 0.2, "mismatches": 3},
            "bytes": {"disk": 1e6, "fp32": 8e6},
            "cpu_seconds": 12.0,
        },
        "step": {"backend": "openvino", "ms_per_step": 1.5, "clean": False},
    }


def test_the_page_sorts_rows_and_says_what_misses_a_bar(board: ModuleType) -> None:
    import leaderboard_page

    full = {**cell("full-precision", [], 450), "bits": None}
    rows = [
        cell("rtn", [20.0, 22.0], 400),
        cell("tfmq", [30.0, 34.0], 446),
        cell("tfmq", [32.0, 36.0], 440, seed=1),
        cell("tfmq", [40, 42], 430, bits="w8a8"),
    ]
    text = board.page([full, *rows])
    high, low = text.split("### text, W4A8")
    lines = [line for line in low.splitlines() if line.startswith("| ")][2:5]
    assert [line.split(" | ")[0] for line in lines] == [
        "| full precision",
        "| tfmq",
        "| rtn",
    ] and "| tfmq | 1 |" in high
    # Means over seeds are 31 and 35: 33, deviation 2 sqrt 2, over sqrt 2.
    assert (
        "| 2 (± 1.00) | 1.00 | 0.125 | 33.00 ± 3.92 |  | 30.00 |" in lines[1]
        and "1.50 openvino *" in lines[1]
    )
    # Images of `rtn` are 11 and 13 dB below those means.
    assert "| 21.00 ± 1.96 | -12.00 ± 1.96 | 20.00 |" in lines[2]
    assert "88.6 (85.5 to 91.1) | +1.4 |" in lines[1] and "90.0 (87.1 to 92.3)" in lines[0]
    assert (
        "`tfmq` at W4A8 loses at most 1.4 points of digits, colours and place: the bar of 1 is missed."
        in high
    )
    assert "`tfmq` at W8A8 is below the interval of full precision in identity." in high
    near = [full, cell("tfmq", [40.0, 42.0], 448), cell("tfmq", [40.0, 42.0], 440, bits="w8a8")]
    assert "place: the bar of 1 is met." in board.page(near) and "is within the interval" in board.page(near)
    assert leaderboard_page.mean_interval([1.0])[1] == float("inf")
    assert "No cell" in board.page([])
    assert "* measured on M; torch 2; at `abc1234`\n" in high
    assert "* measured on M; torch 2\n" in board.page([full])
    elsewhere = board.page([full, *rows[:3], {**rows[3], "machine": "N"}])
    assert (
        "* (a) measured on M; torch 2; at `abc1234`\n* (b) measured on N; torch 2; at `abc1234`\n"
        in elsewhere
    )
    assert "| 1.50 openvino (a) * |" in elsewhere and "| 1.50 openvino (b) * |" in elsewhere


def test_the_committed_page_is_that_of_the_committed_cells(board: ModuleType) -> None:
    assert board.page(board.read_cells(board.RESULTS)) == board.PAGE.read_text(encoding="utf-8"), (
        "run benchmarks/leaderboard.py --write-docs"
    )


def test_the_committed_prompts_are_those_of_the_script(scripts: None) -> None:
    import prompts

    found = {name: prompts.captions(count, held=held, seed=seed) for name, count, held, seed in prompts.FILES}
    for name, captions in found.items():
        assert (ROOT / "benchmarks" / "prompts" / name).read_text(encoding="utf-8").splitlines() == captions
    assert len(set(found["scenes.txt"])) == 500 and not set(found["scenes.txt"]) & set(
        found["calibration.txt"]
    )
    for name, guidance in (("text", 3.0), ("text-turbo", 1.0)):
        if directory := named_directory(name):
            own = brought(directory)
            assert own.prompts == tuple(found["calibration.txt"])
            assert own.options == {"guidance_scale": guidance}
    assert torch.initial_seed() == 0, "the global generator is left alone"
