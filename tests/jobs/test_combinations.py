"""Fields of a recipe in any combination: what a job leaves in memory, what it stores and what every backend
computes is one model.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import pytest
import torch

import tfmq
from tfmq.backends.backend import BACKENDS
from tfmq.backends.execution import execute
from tfmq.models.denoiser import Denoiser, Inputs
from tfmq.models.sampler import LoopSampler
from tfmq.numerics.equivalence import EQUALIZERS
from tfmq.numerics.errors import sqnr_db
from tfmq.numerics.estimators import ESTIMATORS
from tfmq.numerics.low_rank import SPLITTERS
from tfmq.recipes import Recipe
from tfmq.recipes.recipe import Branch, Calibration, Correction, Rescaling, Tuning

DRAWS = 2
MODELS = ("plain_rgb", "dit")
CALIBRATION = Calibration(samples=2, steps=2, interval=1, batch_size=2, judged=0.0)
Value = TypeVar("Value")


def some(draw: random.Random, values: Sequence[Value]) -> tuple[Value, ...]:
    """Return some of the values, in their order, none and all among the possibilities."""
    return tuple(value for value in values if draw.random() < 0.5)


def recipe_of(draw: random.Random) -> Recipe:
    """Return a recipe in which every field of the doors is drawn; 8-bit weights have no groups."""
    base = tfmq.scheme(draw.choice(("w4a8", "w8a8", "w4a4", "rtn_w4a8")))
    grouped = base.weights.bits == 4
    group, clusters = draw.choice(((0, 0), (8, 0), (0, 2), (0, 3)))
    return replace(
        base,
        name="drawn",
        calibration=CALIBRATION,
        weights=replace(
            base.weights,
            rank=draw.choice((0, 2)),
            group=draw.choice((0, 8)) if grouped else 0,
            groups=some(draw, (16,)) if grouped else (),
            grids=some(draw, ("e2m1", "balanced5")),
        ),
        activations=replace(
            base.activations,
            group=group,
            clusters=clusters,
            tokens=draw.choice(("static", "dynamic", "measured")),
            split=draw.choice((True, False, "direct")),
            zero_points=draw.choice(("per_step", "products", "shared")),
        ),
        rescaling=Rescaling(equalizers=some(draw, [*EQUALIZERS]), rotation=draw.choice((0, 4, 16))),
        branch=Branch(
            splitters=some(draw, [*SPLITTERS]), dtype=draw.choice(("float16", "int8", "int8_weight_only"))
        ),
        correction=Correction(estimators=some(draw, [*ESTIMATORS])),
        tuning=Tuning(iterations=draw.choice((0, 3)), batch_size=2),
    )


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*few values|.*saw only")
@pytest.mark.parametrize("number", range(DRAWS))
def test_a_drawn_recipe_is_one_model(
    sampler: Callable[..., LoopSampler], tmp_path: Path, number: int
) -> None:
    draw = random.Random(f"{random.random()} {number}")
    name, recipe = MODELS[number % len(MODELS)], recipe_of(draw)
    print(name, recipe)
    made = sampler(name)
    tfmq.quantize(made, recipe, output_dir=tmp_path / "q")
    example = made.example().resized(2)
    inputs = Inputs(
        torch.randn(example.sample.shape), made.denoiser.module.tfmq_steps.timesteps[:2], example.conditions
    )
    expected = made.denoiser(inputs)
    assert bool(expected.isfinite().all())
    opened = sampler(name).denoiser
    tfmq.load(tmp_path / "q", module=opened.module, backend="simulated")
    assert torch.equal(Denoiser(opened.module)(inputs), expected)
    # The compiled one takes seconds, so that each draw has another.
    for backend in ("reference", "operators", ("openvino", "torch")[number % 2]):
        if not BACKENDS[backend].missing():
            execute(made.denoiser.module, backend)
            assert sqnr_db(expected, made.denoiser(inputs)) > 30, backend
