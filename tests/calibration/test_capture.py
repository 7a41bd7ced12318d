from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tfmq.calibration.capture import UnitCalls, capture, capture_inputs
from tfmq.calibration.spool import Spool
from tfmq.models.denoiser import Denoiser, Inputs, output_tensors


def batches(example: Inputs, sizes: tuple[int, ...] = (3, 3, 2)) -> list[Inputs]:
    made = []
    for number, size in enumerate(sizes):
        grown = example.resized(size)
        made.append(
            Inputs(torch.randn_like(grown.sample), torch.arange(size) + 10 * number, grown.conditions)
        )
    return made


def whole(calls: UnitCalls) -> UnitCalls:
    return calls.rows(torch.arange(len(calls)))


@pytest.mark.parametrize(
    ("model", "unit"),
    [
        ("unet", "down_blocks.1.resnets.0"),
        ("unet", "mid_block.attentions.0"),
        ("conditional", "mid_block.attentions.0.transformer_blocks.0"),
        ("dit", "transformer_blocks.1"),
        ("sd3", "transformer_blocks.0"),
        ("plain", "stages.0"),
        ("plain", "exit"),
    ],
)
def test_stopping_early_captures_what_hooks_on_full_calls_see(
    build: Callable[..., Any], model: str, unit: str
) -> None:
    denoiser, example = build(model)
    module = denoiser.module.get_submodule(unit)
    data = batches(example)
    log: list[tuple[Any, Any, Any]] = []
    handle = module.register_forward_hook(
        lambda _, args, kwargs, out: log.append(
            (args, kwargs, [tensor.clone() for tensor in output_tensors(out)])
        ),
        with_kwargs=True,
    )
    with torch.no_grad():
        for inputs in data:
            denoiser(inputs)
    handle.remove()
    calls = whole(capture(denoiser, module, data))
    assert len(calls) == 8 and len(calls.outputs) == len(log[0][2])
    for position, value in enumerate(calls.outputs):
        assert torch.equal(value, torch.cat([outputs[position] for _, _, outputs in log]))
    assert calls.timestep.tolist() == [0, 1, 2, 10, 11, 12, 20, 21]
    for position, value in enumerate(calls.args):
        if isinstance(value, Tensor):
            assert torch.equal(value, torch.cat([args[position] for args, _, _ in log]))
    for name, value in calls.kwargs.items():
        if isinstance(value, Tensor):
            assert torch.equal(value, torch.cat([kwargs[name] for _, kwargs, _ in log]))
    with torch.no_grad():
        first = calls.rows(torch.arange(3))
        for one, other in zip(
            output_tensors(module(*first.args, **first.kwargs)), first.outputs, strict=True
        ):
            assert torch.equal(one, other)


def test_the_rest_of_the_model_does_not_run(build: Callable[..., Any]) -> None:
    denoiser, example = build("plain")
    denoiser.module.exit.register_forward_pre_hook(lambda *_: pytest.fail("ran beyond the unit"))
    capture(denoiser, denoiser.module.stages[0], batches(example))


class Sharing(nn.Module):
    """Passes its unit a folded batch, a row for each sample, a table without a batch axis, and plain
    values.
    """

    def __init__(self) -> None:
        super().__init__()
        self.unit = Unit()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.unit(
            x.flatten(0, 1),
            torch.ones(7),
            scale=2.0,
            extra={"rows": x.flatten(0, 1) + 1, "own": x[:, 0], "none": None},
            flag=len(x) == 2,
        )


class Unit(nn.Module):
    """Uses every argument."""

    def forward(self, x: Tensor, table: Tensor, *, scale: float, extra: dict[str, Any], flag: bool) -> Tensor:
        return x * scale + table.sum() + extra["rows"] + extra["own"].repeat_interleave(3, dim=0)


def test_folded_rows_stay_with_their_sample_and_shared_arguments_stay_whole() -> None:
    model = Sharing()
    data = [Inputs(torch.randn(size, 3, 4), torch.arange(size) + 1) for size in (2, 2, 1)]
    calls = capture(Denoiser(model), model.unit, data)
    assert len(calls) == 5 and calls.outputs[0].shape == (15, 4)
    assert calls.timestep.tolist() == [1, 2, 1, 2, 1]
    assert (
        calls.args[1].shape == (7,) and calls.kwargs["extra"]["none"] is None and calls.kwargs["scale"] == 2.0
    )
    picked = calls.rows(torch.tensor([4, 1]))
    assert picked.timestep.tolist() == [1, 2]
    assert torch.equal(picked.args[0], torch.cat([data[2].sample[0], data[0].sample[1]]))
    assert torch.equal(model.unit(*picked.args, **picked.kwargs), picked.outputs[0])


def test_a_unit_that_is_never_called_is_an_error(build: Callable[..., Any]) -> None:
    denoiser, example = build("plain")
    with pytest.raises(ValueError, match="never called"):
        capture(denoiser, nn.Linear(1, 1), batches(example))


def test_hooks_go_when_the_model_fails(build: Callable[..., Any]) -> None:
    denoiser, _ = build("plain")
    unit = denoiser.module.exit
    with pytest.raises(RuntimeError):
        capture(denoiser, unit, [Inputs(torch.zeros(1, 99, 8, 8), torch.tensor([1]))])
    assert not unit._forward_hooks


@pytest.mark.parametrize(
    ("model", "unit"),
    [("unet", "mid_block.attentions.0"), ("sd3", "transformer_blocks.0"), ("plain", "exit")],
)
def test_calls_in_files_are_the_same_rows(
    build: Callable[..., Any], tmp_path: Path, model: str, unit: str
) -> None:
    denoiser, example = build(model)
    module, data = denoiser.module.get_submodule(unit), batches(example)
    held, filed = (capture(denoiser, module, data, spool=spool) for spool in (None, Spool(tmp_path, 0)))
    for index in (torch.tensor([7, 0, 1, 1]), torch.arange(8)):
        leaves = [
            tree_leaves((calls.rows(index).args, calls.rows(index).kwargs, calls.rows(index).outputs))
            for calls in (held, filed)
        ]
        for one, other in zip(*leaves, strict=True):
            assert (
                (torch.equal(one, other) and one.stride() == other.stride())
                if isinstance(one, Tensor)
                else one == other
            )


def test_folded_rows_come_from_files_too(tmp_path: Path) -> None:
    model = Sharing()
    data = [Inputs(torch.randn(size, 3, 4), torch.arange(size) + 1) for size in (2, 2, 1)]
    held, filed = (
        capture(Denoiser(model), model.unit, data, spool=spool).rows(torch.tensor([4, 1]))
        for spool in (None, Spool(tmp_path, 0))
    )
    for one, other in zip(
        tree_leaves((held.args, held.kwargs)), tree_leaves((filed.args, filed.kwargs)), strict=True
    ):
        assert torch.equal(one, other) if isinstance(one, Tensor) else one == other


@pytest.mark.parametrize(
    ("model", "unit"),
    [("unet", "mid_block.attentions.0"), ("sd3", "transformer_blocks.0"), ("plain", "exit")],
)
def test_inputs_alone_are_the_same_and_the_unit_does_not_run(
    build: Callable[..., Any], model: str, unit: str
) -> None:
    denoiser, example = build(model)
    module, data = denoiser.module.get_submodule(unit), batches(example)
    expected = whole(capture(denoiser, module, data))
    module.forward = lambda *_, **__: pytest.fail("the unit ran")
    alone = capture_inputs(denoiser, module, data, frames=1)
    found = whole(replace(alone, outputs=expected.outputs))
    leaves = [tree_leaves((calls.args, calls.kwargs, calls.timestep)) for calls in (found, expected)]
    assert alone.outputs == () and all(
        torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(*leaves, strict=True)
    )


def test_inputs_alone_know_the_rows_of_their_frames() -> None:
    model = Sharing()
    data = [Inputs(torch.randn(size, 3, 4), torch.arange(size) + 1) for size in (2, 2, 1)]
    both = capture(Denoiser(model), model.unit, data)
    alone = replace(capture_inputs(Denoiser(model), model.unit, data, frames=3), outputs=both.outputs)
    for one, other in zip(
        tree_leaves((whole(both).args, whole(both).kwargs)),
        tree_leaves((whole(alone).args, whole(alone).kwargs)),
        strict=True,
    ):
        assert torch.equal(one, other) if isinstance(one, Tensor) else one == other
