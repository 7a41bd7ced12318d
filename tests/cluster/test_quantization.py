"""A quantized model does not depend on who made it."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import tfmq
from tfmq.cluster.crew import Cluster, connected
from tfmq.cluster.quantization import Helpers
from tfmq.recipes.recipe import Calibration, Recipe
from tfmq.reconstruction.solvers import UnitInputs
from tfmq.storage.errors import JobMismatchError


def quick(inputs: UnitInputs) -> Recipe:
    """Return a recipe with two batches of calibration that takes a second."""
    recipe = tfmq.scheme("w4a8")
    temporal = replace(recipe.temporal, learning=replace(recipe.temporal.learning, iterations=3))
    calibration = Calibration(samples=3, steps=3, interval=2, batch_size=2)
    return replace(recipe, rounding=replace(recipe.rounding, inputs=inputs), temporal=temporal, calibration=calibration)


def content(directory: Path) -> dict[str, bytes]:
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


class Counting:
    """Helpers that count what they were asked for."""

    def __init__(self, inner: Helpers) -> None:
        self.inner = inner
        self.asked: dict[str, int] = {"record": 0, "reconstruct": 0}

    def record(self, batches: Sequence[range]) -> Iterator[int]:
        self.asked["record"] += len(batches)
        return self.inner.record(batches)

    def reconstruct(self, units: Sequence[int]) -> Iterator[int]:
        self.asked["reconstruct"] += len(units)
        return self.inner.reconstruct(units)


@pytest.mark.parametrize("inputs", ["full", "quantized"])
def test_two_workers_make_the_same_bytes_as_none(ray: Any, model: Path, tmp_path: Path, inputs: UnitInputs) -> None:
    recipe = quick(inputs)
    tfmq.quantize(str(model), recipe, output_dir=tmp_path / "alone", seed=3)
    with connected(Cluster(workers=2)) as crew:
        helpers = Counting(Helpers(crew, str(model), recipe, tmp_path / "together", seed=3))
        found = tfmq.quantize(str(model), recipe, output_dir=tmp_path / "together", seed=3, helpers=helpers)
    assert content(tmp_path / "together") == content(tmp_path / "alone")
    assert helpers.asked == {"record": 2, "reconstruct": len(found.report["units"]) if inputs == "full" else 0}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "together"]


def test_a_worker_with_another_model_refuses(ray: Any, model: Path, tmp_path: Path) -> None:
    recipe = quick("full")
    with connected(Cluster()) as crew:
        helpers = Helpers(crew, "default", recipe, tmp_path / "m")
        with pytest.raises(JobMismatchError, match="model was"):
            tfmq.quantize(str(model), recipe, output_dir=tmp_path / "m", helpers=helpers)
    assert not content(tmp_path / "m")
