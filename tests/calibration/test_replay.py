from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tfmq.calibration.capture import UnitCalls, capture
from tfmq.calibration.readers import called_once, find_readers
from tfmq.calibration.replay import Upstream
from tfmq.models.denoiser import Denoiser, Inputs
from tfmq.models.trace import trace
from tfmq.reconstruction.units import find_units


def batches(example: Inputs, *, count: int = 3) -> list[Inputs]:
    grown = example.resized(2)
    return [
        Inputs(torch.randn_like(grown.sample), torch.tensor([5, 700]), grown.conditions) for _ in range(count)
    ]


def equal(one: UnitCalls, other: UnitCalls) -> bool:
    """Whether two sets of calls are the same, row by row."""
    rows = [calls.rows(torch.arange(len(calls))) for calls in (one, other)]
    leaves = [tree_leaves((calls.args, calls.kwargs, calls.timestep, calls.outputs)) for calls in rows]
    return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(*leaves, strict=True))


def counted(module: nn.Module, names: list[str]) -> dict[str, int]:
    """Count the calls of what is inside of units: a unit that is replayed runs none of it."""
    counts = dict.fromkeys(names, 0)
    for name in names:
        # The last one: DiT's own forward calls a part of its first block.
        inner = [
            child
            for child in module.get_submodule(name).modules()
            if isinstance(child, nn.Linear | nn.Conv2d)
        ][-1]
        inner.register_forward_hook(lambda *_, name=name: counts.update({name: counts[name] + 1}))
    return counts


@pytest.mark.parametrize("name", ["plain", "unet", "own_attention", "dit", "sd3"])
@pytest.mark.parametrize("network", ["full", "quantized"])
def test_calls_are_the_same_and_each_unit_runs_once_a_batch(
    build: Callable[..., Any], tmp_path: Path, name: str, network: Any
) -> None:
    denoiser, example = build(name)
    order = [layer.name for layer in trace(denoiser, example).layers]
    units, data, upstream = (
        find_units(denoiser.module, order),
        batches(example),
        Upstream(tmp_path / "outputs"),
    )
    composite = [unit.name for unit in units if list(denoiser.module.get_submodule(unit.name).children())]
    expected = [capture(denoiser, denoiser.module.get_submodule(unit.name), data) for unit in units]
    counts = counted(denoiser.module, composite)
    for unit, direct in zip(units, expected, strict=True):
        module = denoiser.module.get_submodule(unit.name)
        assert equal(capture(denoiser, module, data, around=upstream.around(network)), direct)
        upstream.add(unit.name, module)
    # Once as the unit itself, and once more as the last one before the next.
    assert composite and all(count <= 2 * len(data) for count in counts.values())
    assert all("forward" not in vars(denoiser.module.get_submodule(unit.name)) for unit in units)


def test_units_that_are_not_kept_run(build: Callable[..., Any], tmp_path: Path) -> None:
    denoiser, example = build("plain")
    data, upstream = batches(example), Upstream(tmp_path / "outputs", most_bytes=0)
    stages, last = denoiser.module.stages, denoiser.module.exit
    for number, stage in enumerate(stages):
        upstream.add(f"stages.{number}", stage)
    direct = capture(denoiser, last, data)
    for _ in range(2):
        assert equal(capture(denoiser, last, data, around=upstream.around("full")), direct)
    assert list((tmp_path / "outputs").rglob("*.safetensors")) == []


class Twice(nn.Module):
    """Calls one unit two times, and one that returns a pair."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.pair, self.last = nn.Linear(4, 4), Pair(), nn.Linear(4, 4)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        first, second = self.pair(self.shared(self.shared(x)))
        return self.last(first - second["other"])


class Pair(nn.Module):
    """Returns a structure."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Any]]:
        return x, {"other": self.layer(x), "note": None}


def test_structures_come_back_and_what_runs_twice_runs(tmp_path: Path) -> None:
    module = Twice()
    denoiser, upstream = Denoiser(module, sample="x", timestep="t"), Upstream(tmp_path / "outputs")
    data = [Inputs(torch.randn(2, 4), torch.tensor([1, 2]), {}) for _ in range(2)]
    upstream.add("shared", module.shared)
    upstream.add("pair", module.pair)
    direct = capture(denoiser, module.last, data)
    for _ in range(3):
        assert equal(capture(denoiser, module.last, data, around=upstream.around("full")), direct)
    assert len(list((tmp_path / "outputs").rglob("*.safetensors"))) == len(data)


def test_what_an_earlier_job_left_is_no_ones(tmp_path: Path) -> None:
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / "000000.safetensors").write_text("old")
    Upstream(tmp_path / "outputs")
    assert list((tmp_path / "outputs").iterdir()) == []


@pytest.mark.parametrize("name", ["plain", "unet", "dit", "sd3"])
def test_a_unit_whose_outputs_are_kept_at_once_runs_once_a_batch(
    build: Callable[..., Any], tmp_path: Path, name: str
) -> None:
    denoiser, example = build(name)
    names = [
        unit.name
        for unit in find_units(denoiser.module, [layer.name for layer in trace(denoiser, example).layers])
    ]
    data, once = batches(example), called_once(denoiser, names, example)
    readers = find_readers(denoiser, names, example)
    upstream = Upstream(tmp_path / "outputs", readers=readers, once=once)
    composite = [unit for unit in names if list(denoiser.module.get_submodule(unit).children())]
    expected = [capture(denoiser, denoiser.module.get_submodule(unit), data) for unit in names]
    counts = counted(denoiser.module, composite)
    for unit, direct in zip(names, expected, strict=True):
        module = denoiser.module.get_submodule(unit)
        assert equal(
            capture(
                denoiser, module, data, around=upstream.around("full"), keep=upstream.keeper("full", unit)
            ),
            direct,
        )
        upstream.add(unit, module)
    assert composite and set(composite) <= once and all(count == len(data) for count in counts.values())


def test_outputs_of_a_unit_that_changed_are_discarded(build: Callable[..., Any], tmp_path: Path) -> None:
    denoiser, example = build("plain")
    data, upstream = batches(example), Upstream(tmp_path / "outputs", once={"stages.0"})
    first, last = denoiser.module.stages[0], denoiser.module.exit
    capture(denoiser, first, data, keep=upstream.keeper("full", "stages.0"))
    with torch.no_grad():
        next(first.parameters()).add_(1.0)
    upstream.discard("full", "stages.0")
    upstream.add("stages.0", first)
    assert equal(capture(denoiser, last, data, around=upstream.around("full")), capture(denoiser, last, data))


def test_what_runs_twice_is_not_kept_at_once(tmp_path: Path) -> None:
    denoiser = Denoiser(Twice(), sample="x", timestep="t")
    once = called_once(
        denoiser, ["shared", "pair", "last"], Inputs(torch.randn(2, 4), torch.tensor([1, 2]), {})
    )
    upstream = Upstream(tmp_path / "outputs", once=once)
    assert once == {"pair", "last"} and upstream.keeper("full", "shared") is None
    assert (
        upstream.keeper("full", "pair") is not None
        and Upstream(None, once=once).keeper("full", "pair") is None
    )
