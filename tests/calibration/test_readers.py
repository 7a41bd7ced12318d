from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tfmq.calibration.capture import capture
from tfmq.calibration.readers import find_readers
from tfmq.calibration.replay import Upstream
from tfmq.calibration.spool import Column
from tfmq.models.denoiser import Denoiser, Inputs
from tfmq.models.trace import trace
from tfmq.reconstruction.units import find_units


class Chain(nn.Module):
    """A skip over two units, one unit that writes into its input, and one whose output nobody reads."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.side, self.last = (nn.Linear(4, 4) for _ in range(5))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        first = self.a(x)
        self.side(x)
        hidden = self.c(torch.relu(self.b(first)))
        hidden += first
        return self.last(hidden)


UNITS = ["a", "side", "b", "c", "last"]


def test_readers_are_those_that_no_unit_stands_between() -> None:
    denoiser = Denoiser(Chain().requires_grad_(False), sample="x", timestep="t")
    found = find_readers(denoiser, UNITS, Inputs(torch.randn(3, 4), torch.arange(3)))
    assert found == {"a": {"b", "last"}, "b": {"c"}, "c": {"last"}, "side": set(), "last": set()}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in denoiser.module.modules())


class Ranked(nn.Module):
    """A unit with the order of its output beside it, which a later unit reads, and rows picked by another."""

    class Order(nn.Linear):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            y = super().forward(x)
            return y, y.argsort(dim=-1)

    class Picked(nn.Linear):
        def forward(self, x: Tensor, order: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x).gather(-1, order)

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = self.Order(4, 4), nn.Linear(4, 4), self.Picked(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        first, order = self.a(x)
        second = self.b(first)
        third = self.c(second, order)
        whole = torch.zeros_like(x)
        whole[:, :2] = x.gather(-1, second.argsort(dim=-1))[:, :2]
        return self.d(whole) + third


RANKED = ["a", "b", "c", "d"]


def test_integers_are_followed_too_and_what_is_written_into_a_part(tmp_path: Path) -> None:
    denoiser = Denoiser(Ranked().requires_grad_(False), sample="x", timestep="t")
    data = [Inputs(torch.randn(2, 4), torch.arange(2)) for _ in range(2)]
    readers = find_readers(denoiser, RANKED, data[0])
    assert readers == {"a": {"b", "c"}, "b": {"c", "d"}, "c": set(), "d": set()}
    upstream = Upstream(tmp_path / "outputs", readers=readers)
    for name in RANKED:
        module = denoiser.module.get_submodule(name)
        found = capture(denoiser, module, data, around=upstream.around("full"))
        expected = capture(denoiser, module, data)
        for one, other in zip(found.args, expected.args, strict=True):
            assert torch.equal(whole(one), whole(other))
        upstream.add(name, module)


def test_a_denoiser_that_leaves_torch_tells_nothing() -> None:
    class Refusing(Chain):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            hidden = self.a(x)
            return self.last(hidden.numpy() if hidden.requires_grad else hidden)  # type: ignore[arg-type]

    assert (
        find_readers(
            Denoiser(Refusing().requires_grad_(False), sample="x", timestep="t"),
            UNITS,
            Inputs(torch.randn(1, 4), torch.arange(1)),
        )
        == {}
    )


def files(directory: Path) -> set[str]:
    return {path.name.partition(".")[0] for path in directory.rglob("*.safetensors")}


def whole(column: Column) -> Tensor:
    return column[torch.arange(column.shape[0])]


def test_outputs_go_when_their_last_reader_is_kept(tmp_path: Path) -> None:
    denoiser = Denoiser(Chain().requires_grad_(False), sample="x", timestep="t")
    data = [Inputs(torch.randn(2, 4), torch.arange(2)) for _ in range(2)]
    readers = find_readers(denoiser, UNITS, data[0])
    upstream, held = Upstream(tmp_path / "outputs", readers=readers), []
    for name in UNITS:
        module = denoiser.module.get_submodule(name)
        capture(denoiser, module, data, around=upstream.around("full"))
        held.append(files(tmp_path))
        direct = capture(denoiser, module, data)
        again = capture(denoiser, module, data, around=upstream.around("full"))
        assert torch.equal(whole(again.args[0]), whole(direct.args[0])), (
            "also where the denoiser wrote into what was kept"
        )
        upstream.add(name, module)
    assert held == [set(), {"a"}, {"a", "side"}, {"a", "b"}, {"a", "b", "c"}]
    assert files(tmp_path) == {"a", "c"}, "a is read by the last unit, b by one that is kept"


@pytest.mark.parametrize("name", ["plain", "unet", "own_attention", "conditional", "dit", "sd3"])
def test_what_is_forgotten_is_missed_by_nobody(build: Callable[..., Any], tmp_path: Path, name: str) -> None:
    denoiser, example = build(name)
    units = find_units(denoiser.module, [layer.name for layer in trace(denoiser, example).layers])
    grown = example.resized(2)
    data = [
        Inputs(torch.randn_like(grown.sample), torch.tensor([5, 700]), grown.conditions) for _ in range(2)
    ]
    expected = [capture(denoiser, denoiser.module.get_submodule(unit.name), data) for unit in units]
    upstream, most = (
        Upstream(
            tmp_path / "outputs", readers=find_readers(denoiser, [unit.name for unit in units], example)
        ),
        0,
    )
    for unit, direct in zip(units, expected, strict=True):
        module = denoiser.module.get_submodule(unit.name)
        found = capture(denoiser, module, data, around=upstream.around("full"))
        assert all(
            torch.equal(whole(one), whole(other))
            for one, other in zip(found.outputs, direct.outputs, strict=True)
        )
        most = max(most, len(files(tmp_path)))
        upstream.add(unit.name, module)
    assert most < len(units) - 1, "some were forgotten on the way"


def test_what_is_read_after_all_comes_back(tmp_path: Path) -> None:
    denoiser = Denoiser(Chain().requires_grad_(False), sample="x", timestep="t")
    data = [Inputs(torch.randn(2, 4), torch.arange(2))]
    # As if the skip had not been seen.
    upstream = Upstream(tmp_path / "outputs", readers={"a": {"b"}, "side": set(), "b": {"c"}})
    for name in UNITS[:-1]:
        capture(denoiser, denoiser.module.get_submodule(name), data, around=upstream.around("full"))
        upstream.add(name, denoiser.module.get_submodule(name))
    direct = capture(denoiser, denoiser.module.last, data)
    leaked = capture(denoiser, denoiser.module.last, data, around=upstream.around("full"))
    assert bool(whole(leaked.outputs[0]).isnan().all()) and upstream.revive()
    again = capture(denoiser, denoiser.module.last, data, around=upstream.around("full"))
    assert torch.equal(whole(again.outputs[0]), whole(direct.outputs[0])) and not upstream.revive()
