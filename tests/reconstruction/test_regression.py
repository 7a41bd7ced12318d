from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tfmq.nn.layer import CalibratedLayer
from tfmq.nn.operation import operation_of, weight_of
from tfmq.numerics.grids import IntegerFormat
from tfmq.numerics.operations import Operation
from tfmq.quantizers.weight import fit_grid
from tfmq.reconstruction.regression import Moments, Regression

MODULES: list[tuple[nn.Module, tuple[int, ...]]] = [
    (nn.Linear(6, 4), (3, 6)),
    (nn.Linear(6, 4), (3, 7, 6)),
    (nn.Conv1d(4, 6, 3, padding=1, groups=2), (3, 4, 9)),
    (nn.Conv2d(4, 6, 3, padding=1), (3, 4, 7, 5)),
    (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(2, 0), dilation=(1, 2)), (2, 4, 9, 8)),
    (nn.Conv2d(4, 8, 3, padding="same", dilation=2, groups=4), (2, 4, 6, 6)),
    (nn.Conv2d(4, 6, 2, padding="valid"), (2, 4, 6, 5)),
    (nn.Conv3d(2, 3, (1, 3, 2), padding=(0, 1, 1)), (2, 2, 3, 5, 4)),
    (nn.ConvTranspose1d(4, 6, 4, stride=2, padding=1, groups=2), (3, 4, 7)),
    (nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1), (2, 4, 5, 4)),
    (nn.ConvTranspose2d(4, 8, (3, 2), stride=(1, 3), dilation=(2, 1), groups=4), (2, 4, 4, 5)),
]


def operation(module: nn.Module) -> Operation:
    found = operation_of(module)
    assert found is not None
    return found


def layer(module: Any, *, bits: int = 4) -> CalibratedLayer:
    return CalibratedLayer(
        module, operation(module), fit_grid(weight_of(module).detach(), IntegerFormat(bits)), None
    )


@pytest.mark.parametrize(
    ("module", "shape"), MODULES, ids=lambda value: str(value) if isinstance(value, nn.Module) else ""
)
@torch.no_grad()
def test_the_gathered_inputs_are_what_the_outputs_are_made_of(module: Any, shape: tuple[int, ...]) -> None:
    x, op = torch.randn(shape), operation(module)
    output = module(x)
    places = torch.randperm(op.places(output))[:5]
    read = op.inputs_at(x, module.weight.shape[2:], places)
    weight = weight_of(module).flatten(1).unflatten(0, (len(read), -1))
    expected = op.outputs_at(output, places)
    torch.testing.assert_close((read @ weight.mT).transpose(0, 1).flatten(1) + module.bias, expected)


@pytest.mark.parametrize("groups", [1, 2])
@torch.no_grad()
def test_moments_are_those_of_inputs_and_of_what_the_weight_leaves(groups: int) -> None:
    module = nn.Conv2d(4, 6, 3, padding=1, groups=groups)
    x, target = torch.randn(6, 4, 5, 5), torch.randn(6, 6, 5, 5)
    calibrated = layer(module)
    regression = Regression({"c": calibrated}, torch.arange(6).split(4), most=1000, seed=0)

    def run_full(part: Tensor) -> None:
        # Full precision has another output than the weight makes of this input: errors of earlier layers.
        calibrated(x[part])

    handle = calibrated.register_forward_hook(
        lambda _, args, out: target[:4] if len(out) == 4 else target[4:]
    )
    regression.record_targets(run_full)
    handle.remove()
    moments = regression.moments(["c"], lambda part: calibrated(x[part]), widest=100)["c"]
    columns = torch.nn.functional.unfold(x, 3, padding=1).transpose(1, 2).flatten(0, 1).double()
    residual = (target - module(x)).flatten(2).transpose(1, 2).flatten(0, 1).double()
    assert moments.cross is not None
    for group in range(groups):
        read, left = columns.chunk(groups, dim=1)[group], residual.chunk(groups, dim=1)[group]
        expected = read.mT @ read / len(read), left.mT @ read / len(read), read.mean(dim=0), left.mean(dim=0)
        found = (
            moments.hessians[0][group],
            moments.cross[group],
            moments.inputs[group],
            moments.residuals[group],
        )
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    mean_square = moments.mean_square()
    moments.centre()
    moments.damp(mean_square)
    for group in range(groups):
        read = columns.chunk(groups, dim=1)[group]
        centred = moments.hessians[0][group] - float(read.square().mean()) * torch.eye(read.shape[1])
        torch.testing.assert_close(
            centred, torch.cov(read.mT, correction=0).reshape(centred.shape), rtol=1e-4, atol=1e-5
        )


@torch.no_grad()
def test_positions_are_drawn_from_the_seed_and_bounded() -> None:
    module, x = nn.Conv2d(2, 3, 1), torch.randn(4, 2, 8, 8)

    def hessian(seed: int, most: int) -> Tensor:
        calibrated = layer(module)
        regression = Regression({"c": calibrated}, [torch.arange(4)], most=most, seed=seed)
        regression.record_targets(lambda part: calibrated(x[part]))
        assert regression.targets["c"].shape == (4 * most, 3)
        return regression.moments(["c"], lambda part: calibrated(x[part]), widest=100)["c"].hessians[0]

    assert torch.equal(hessian(1, 5), hessian(1, 5)) and not torch.equal(hessian(1, 5), hessian(2, 5))
    torch.testing.assert_close(hessian(1, 64), hessian(2, 64))


@torch.no_grad()
def test_a_wide_layer_keeps_the_blocks_of_its_parts_alone() -> None:
    x, module = torch.randn(6, 4, 5, 5), nn.Conv2d(4, 6, 3, padding=1)

    def found(widest: int) -> Moments:
        calibrated = layer(module)
        regression = Regression({"c": calibrated}, torch.arange(6).split(4), most=9, seed=0)
        regression.record_targets(lambda part: calibrated(x[part]))
        return regression.moments(["c"], lambda part: calibrated(x[part]), widest=widest)["c"]

    whole, parted = found(36), found(16)
    assert [tuple(block.shape) for block in parted.hessians] == [
        (1, 16, 16),
        (1, 16, 16),
        (1, 4, 4),
    ] and parted.cross is None
    for columns, block in parted.parts():
        torch.testing.assert_close(block, whole.hessians[0][:, columns, columns])
    torch.testing.assert_close(parted.mean_square(), whole.mean_square())
    for moments in (whole, parted):
        moments.centre()
    for columns, block in parted.parts():
        torch.testing.assert_close(block, whole.hessians[0][:, columns, columns])


class Projections(nn.Module):
    """Two projections of the same input, one of their product, and one of the input again that runs last."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.out, self.past = (layer(nn.Linear(4, 4)) for _ in range(4))
        self.runs: list[str] = []
        for name in ("left", "right", "out", "past"):
            getattr(self, name).register_forward_hook(lambda *_, name=name: self.runs.append(name))

    def forward(self, x: Tensor) -> Tensor:
        """Return their sum."""
        product: Tensor = self.out(self.left(x) * self.right(x)) + self.past(x)
        return product

    @property
    def layers(self) -> dict[str, CalibratedLayer]:
        """The layers by name, in execution order."""
        return {name: getattr(self, name) for name in ("left", "right", "out", "past")}


@torch.no_grad()
def test_layers_that_read_nothing_of_each_other_are_gathered_together() -> None:
    unit, x = Projections(), torch.randn(8, 3, 4)
    parts = list(torch.arange(8).split(4))

    def gathered(passes: list[list[str]] | None) -> tuple[list[list[str]], dict[str, Moments], list[str]]:
        regression = Regression(unit.layers, parts, most=5, seed=0)
        regression.record_targets(lambda part: unit(x[part]))
        passes = passes or regression.passes_of(lambda part: unit(x[part]), widest=100)
        unit.runs.clear()
        found: dict[str, Moments] = {}
        for names in passes:
            found |= regression.moments(names, lambda part: unit(x[part]), widest=100)
        return passes, found, list(unit.runs)

    passes, together, runs = gathered(None)
    assert passes == [["left", "right", "past"], ["out"]]
    # The first pass runs the whole unit; the second ends at the layer it is for.
    assert runs == [*unit.layers] * len(parts) + ["left", "right", "out"] * len(parts)
    _, apart, _ = gathered([[name] for name in unit.layers])
    for name in unit.layers:
        assert torch.equal(together[name].hessians[0], apart[name].hessians[0])
        assert torch.equal(together[name].residuals, apart[name].residuals)


@torch.no_grad()
def test_layers_are_gathered_apart_where_their_moments_take_too_much() -> None:
    x, layers = torch.randn(4, 3, 4), {str(number): layer(nn.Linear(4, 4)) for number in range(4)}
    regression = Regression(layers, [torch.arange(4)], most=5, seed=0)
    passes = regression.passes_of(lambda part: [one(x[part]) for one in layers.values()], widest=100)
    assert passes == [["0", "1", "2"], ["3"]]
