"""A quantized model does not depend on who made it."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import tfmq
from tfmq.api import job_of
from tfmq.calibration.spool import Spool
from tfmq.cluster.crew import Cluster, connected
from tfmq.cluster.quantization import Order, WorkerHelpers, _make
from tfmq.jobs.units import unit_file
from tfmq.recipes.recipe import Calibration, Recipe
from tfmq.reconstruction import resources
from tfmq.reconstruction.resources import UNLIMITED, Resources
from tfmq.reconstruction.solvers import UnitInputs
from tfmq.storage.atomic import read_tensors
from tfmq.storage.errors import JobMismatchError


def quick(inputs: UnitInputs) -> Recipe:
    """Return a recipe with two batches of calibration that takes a second."""
    recipe = tfmq.scheme("w4a8")
    temporal = replace(recipe.temporal, learning=replace(recipe.temporal.learning, iterations=3))
    calibration = Calibration(samples=3, steps=3, interval=2, batch_size=2)
    return replace(
        recipe, rounding=replace(recipe.rounding, inputs=inputs), temporal=temporal, calibration=calibration
    )


def content(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


class Counting:
    """WorkerHelpers that count what they were asked for."""

    def __init__(self, inner: WorkerHelpers) -> None:
        self.inner = inner
        self.asked: dict[str, int] = {"record": 0, "reconstruct": 0}

    def record(self, batches: Sequence[range]) -> Iterator[int]:
        self.asked["record"] += len(batches)
        return self.inner.record(batches)

    def reconstruct(self, units: Sequence[int]) -> Iterator[int]:
        self.asked["reconstruct"] += len(units)
        return self.inner.reconstruct(units)


@pytest.mark.parametrize("inputs", ["full", "quantized"])
def test_two_workers_make_the_same_bytes_as_none(
    ray: Any, model: Path, tmp_path: Path, inputs: UnitInputs
) -> None:
    recipe = quick(inputs)
    tfmq.quantize(str(model), recipe, output_dir=tmp_path / "alone", seed=3)
    with connected(Cluster(workers=2)) as crew:
        helpers = Counting(
            WorkerHelpers(
                crew, Order(target=str(model), recipe=recipe, output_dir=tmp_path / "together", seed=3)
            )
        )
        found = tfmq.quantize(str(model), recipe, output_dir=tmp_path / "together", seed=3, helpers=helpers)
    assert content(tmp_path / "together") == content(tmp_path / "alone")
    assert helpers.asked == {
        "record": 2,
        "reconstruct": len(found.report["units"]) if inputs == "full" else 0,
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "together"]


def test_a_worker_with_another_model_refuses(ray: Any, model: Path, tmp_path: Path) -> None:
    recipe = quick("full")
    with connected(Cluster()) as crew:
        helpers = WorkerHelpers(crew, Order(target="default", recipe=recipe, output_dir=tmp_path / "m"))
        with pytest.raises(JobMismatchError, match="model was"):
            tfmq.quantize(str(model), recipe, output_dir=tmp_path / "m", helpers=helpers)
    assert not content(tmp_path / "m")


def test_a_worker_keeps_to_the_limit_of_memory_itself(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, job, files = quick("full"), job_of(tmp_path / "m"), 0

    def stop(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("tfmq.jobs.units.paced", stop)
        tfmq.quantize(str(model), recipe, output_dir=tmp_path / "m")
    real = Spool.file

    def file(own: Spool) -> Any:
        nonlocal files
        files += 1
        return real(own)

    def codes(limits: Resources) -> dict[str, list[Any]]:
        _make(Order(target=str(model), recipe=recipe, output_dir=tmp_path / "m", resources=limits))(
            ("reconstruct", 0, None)
        )
        path = job / f"{unit_file(0)}.safetensors"
        found = {name: tensor.tolist() for name, tensor in read_tensors(path)[0].items() if name != "report"}
        path.unlink()
        return found

    monkeypatch.setattr(Spool, "file", file)
    free = codes(UNLIMITED)
    assert not files
    # So little that all calls of a unit go to files.
    monkeypatch.setattr(resources, "CAPTURED", 1e-9)
    assert codes(Resources(max_memory=2**28)) == free and files
