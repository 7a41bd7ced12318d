"""The gate on quality: every model of the project, quantized in this run by a short calibration, still draws
what full precision draws.

Thresholds are in `thresholds.json`. Changing one needs a row in docs/log.md, which says why.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tfmq
from tfmq.evaluation.adherence import scene_judge  # noqa: F401
from tfmq.evaluation.adherence.judge import JUDGES, brought_judge
from tfmq.evaluation.paired import paired_fidelity
from tfmq.evaluation.sampling import Images, draw_batch
from tfmq.evaluation.text import asked_of
from tfmq.recipes.recipe import Recipe
from tfmq.targets import named_directory, open_sampler

ROOT = Path(__file__).resolve().parents[2]
THRESHOLDS = json.loads((Path(__file__).parent / "thresholds.json").read_text(encoding="utf-8"))
# Noise that no calibration of the gate has seen.
IMAGES, SEED = 8, 4_711
# PSNR in dB of another picture. Under guidance a small error may turn one into another, which is counted: a
# mean would show little else.
OTHER = 15.0
PROMPTS = tuple(
    (ROOT / "benchmarks" / "prompts" / "scenes.txt").read_text(encoding="utf-8").splitlines()[:IMAGES]
)
CALIBRATION = tuple(
    (ROOT / "benchmarks" / "prompts" / "calibration.txt").read_text(encoding="utf-8").splitlines()[:IMAGES]
)


@dataclass(frozen=True)
class Drawing:
    """How a model draws here: fewer steps than a user takes, as each costs time. `quick` does without
    reconstruction at W8A8, where that costs the model little.
    """

    steps: int
    samples: int = 2
    quick: bool = True
    options: tuple[tuple[str, float], ...] = ()


DRAWN = {
    "default": Drawing(8, quick=False),
    "text": Drawing(8, options=(("guidance_scale", 3.0),)),
    "text-turbo": Drawing(4, samples=4, options=(("guidance_scale", 1.0),)),
    "dit": Drawing(8, options=(("guidance_scale", 2.0),)),
}


def short(scheme: str, drawing: Drawing) -> Recipe:
    """Return a scheme that is done in seconds."""
    recipe = tfmq.scheme("quick_w8a8" if scheme == "w8a8" and drawing.quick else scheme)
    calibration = replace(
        recipe.calibration,
        samples=drawing.samples,
        steps=drawing.steps,
        interval=1,
        batch_size=drawing.samples,
        judged=0.0,
    )
    return replace(recipe, calibration=calibration, rounding=replace(recipe.rounding, sweeps=1))


def opened(model: str, prompts: tuple[str, ...]) -> Any:
    return open_sampler(
        model, prompts=prompts if model.startswith("text") else (), options=dict(DRAWN[model].options)
    )


def drawn(sampler: Any, model: str) -> Images:
    return draw_batch(sampler, range(IMAGES), steps=DRAWN[model].steps, seed=SEED)


def adherence(sampler: Any, model: str, images: Images) -> float | None:
    """Return the share of attributes, over all images, that are as they were asked for; None where the model
    brings no judge.
    """
    directory = named_directory(model)
    name = brought_judge(directory) if directory else None
    if name is None:
        return None
    pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 255
    verdicts = JUDGES[name]()(pixels, asked_of(sampler, range(IMAGES)))
    asked = [verdict for values in verdicts.values() for verdict in values if verdict is not None]
    return sum(asked) / len(asked)


@pytest.fixture(scope="module")
def references() -> Iterator[dict[str, Images]]:
    return {}  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("model", "scheme"), [(model, scheme) for model, schemes in THRESHOLDS.items() for scheme in schemes]
)
def test_images_stay_what_they_were(references: dict[str, Images], model: str, scheme: str) -> None:
    limits, sampler = THRESHOLDS[model][scheme], opened(model, CALIBRATION)
    tfmq.quantize(sampler, short(scheme, DRAWN[model]), seed=0)
    if model not in references:
        references[model] = drawn(opened(model, PROMPTS), model)
    if model.startswith("text"):
        sampler.prompts = PROMPTS
    images = drawn(sampler, model)
    psnr = np.array(paired_fidelity(references[model], images).psnr_db)
    median, others, found = (
        float(np.median(psnr)),
        int((psnr < OTHER).sum()),
        adherence(sampler, model, images),
    )
    print(f"{model} {scheme}: median {median:.2f} dB, {others} others, adherence {found}")
    assert median >= limits["psnr_db"]
    assert others <= limits["others"]
    if found is not None:
        assert found >= limits["adherence"]


def test_every_threshold_has_its_row_in_the_log() -> None:
    """A row: model, scheme, dB, others, adherence or a dash, and why. The last one of a model and a scheme
    holds.
    """
    logged = {}
    for line in (ROOT / "docs" / "log.md").read_text(encoding="utf-8").splitlines():
        row = r"\| ([\w-]+) \| (w\da\d) \| ([\d.]+) dB \| (\d+) \| ([\d.]+|-) \| (.+) \|"
        if found := re.fullmatch(row, line):
            model, scheme, psnr, others, share, reason = found.groups()
            assert reason.strip()
            asked = {} if share == "-" else {"adherence": float(share)}
            logged[model, scheme] = {"psnr_db": float(psnr), "others": int(others), **asked}
    assert logged == {
        (model, scheme): limits for model, schemes in THRESHOLDS.items() for scheme, limits in schemes.items()
    }
    assert THRESHOLDS.keys() == {model for model in DRAWN if named_directory(model) is not None}
