import pytest
import torch
from torch import Tensor, nn

from tfmq.nn.layer import CalibratedLayer
from tfmq.nn.operation import operation_of
from tfmq.numerics.grids import IntegerFormat
from tfmq.quantizers.weight import fit_grid
from tfmq.reconstruction.tuning import (
    Loss,
    NoRoomError,
    Place,
    Tunable,
    Tuning,
    descend,
    output_sizes,
    place_of,
    rate,
    saved_bytes,
)


def layer(source: nn.Module, *, bits: int = 8) -> CalibratedLayer:
    operation = operation_of(source)
    assert operation is not None
    grid = fit_grid(operation.rows(source.weight.detach()), IntegerFormat(bits, symmetric=False))  # type: ignore[operator, union-attr]
    made = CalibratedLayer(source, operation, grid, None)
    made.choose(weights="quantized", inputs=None)
    return made


class Problem:
    """Two layers whose scales and biases are off by planted amounts, and what they should put out."""

    def __init__(self) -> None:
        first, last = nn.Linear(8, 16), nn.Conv1d(16, 4, 1, bias=False)
        self.layers = {"first": layer(first), "last": layer(last)}
        self.x = torch.randn(64, 8)
        with torch.no_grad():
            self.expected = self.run()
            self.factors = {
                name: 1 + 0.1 * torch.rand_like(one.grid.scale) for name, one in self.layers.items()
            }
            self.scales = {name: one.grid.scale.clone() for name, one in self.layers.items()}
            for name, one in self.layers.items():
                one.grid.scale.mul_(self.factors[name])
            assert self.layers["first"].correction is not None
            self.layers["first"].correction += 0.1

    def run(self) -> Tensor:
        hidden = self.layers["first"](self.x).tanh()
        found: Tensor = self.layers["last"](hidden[:, :, None])[:, :, 0]
        return found

    def tunable(self) -> Tunable:
        return Tunable(self.layers, output_sizes(self.layers, self.run))

    def loss(self) -> Tensor:
        return (self.run() - self.expected).square().mean()

    def parts(self) -> list[Loss]:
        return [self.loss]


def went(problem: Problem, place: Place, count: int, *, total: int) -> Place:
    config = Tuning(iterations=total, scale_rate=1e-2, bias_rate=1e-2)
    return descend(
        problem.tunable(), place, config, [problem.parts] * count, total=total, advance=lambda: None
    )


def test_planted_scales_and_biases_are_found() -> None:
    problem = Problem()
    before, tunable = float(problem.loss()), problem.tunable()
    place = went(problem, tunable.start(), 400, total=400)
    tunable.move(place)
    assert float(problem.loss()) < 1e-3 * before and place.done == 400
    last = problem.layers["last"]
    assert last.correction is None
    # Nothing could stand in for a scale of the last layer.
    assert torch.allclose(last.grid.scale, problem.scales["last"], rtol=0.02)
    assert len(place.shifts) == 16


def test_codes_stay_and_a_move_for_a_while_is_undone() -> None:
    problem = Problem()
    tunable = problem.tunable()
    before = {name: (one.grid, one.correction, one.codes.clone()) for name, one in problem.layers.items()}
    place = went(problem, tunable.start(), 3, total=3)
    with torch.no_grad(), tunable.moved(place.scales, place.shifts):
        changed = problem.loss()
        assert problem.layers["first"].grid is not before["first"][0]
    for name, one in problem.layers.items():
        assert one.grid is before[name][0] and one.correction is before[name][1]
        assert torch.equal(one.codes, before[name][2])
    tunable.move(place)
    assert torch.equal(problem.loss(), changed)


def test_going_on_from_a_kept_place_is_going_on() -> None:
    whole = went(problem := Problem(), problem.tunable().start(), 12, total=12)
    half = went(problem, problem.tunable().start(), 5, total=12)
    rest = went(problem, place_of({name: one.clone() for name, one in half.tensors().items()}), 7, total=12)
    assert all(torch.equal(one, rest.tensors()[name]) for name, one in whole.tensors().items())


def test_parts_of_a_step_add_up() -> None:
    problem = Problem()

    def halves() -> list[Loss]:
        return [lambda: 0.25 * problem.loss(), lambda: 0.75 * problem.loss()]

    start, config = problem.tunable().start(), Tuning(iterations=1)
    found = [
        descend(problem.tunable(), start, config, [parts], total=1, advance=lambda: None)
        for parts in (problem.parts, halves)
    ]
    for one, other in zip(*(place.tensors().values() for place in found), strict=True):
        assert torch.allclose(one.double(), other.double(), rtol=1e-4, atol=1e-9)


def test_what_a_gradient_keeps_is_counted_once() -> None:
    x, w = torch.randn(32, 8), torch.randn(8, 4, requires_grad=True)

    def run() -> None:
        y = x @ w
        (y.sin() + y.cos()).sum().backward()

    # The product keeps x, and sine and cosine the same y.
    assert saved_bytes(run) == 4 * (x.numel() + 32 * 4)
    with pytest.raises(NoRoomError, match="keeps more than the 0 MiB"):
        saved_bytes(run, most=4 * x.numel())


def test_sizes_are_root_mean_squares_and_zero_where_nothing_ran() -> None:
    layers = {"used": nn.Linear(3, 2), "idle": nn.Linear(3, 2)}
    x = torch.randn(5, 3)
    found = output_sizes(layers, lambda: layers["used"](x))
    expected = layers["used"](x).detach().double().square().mean().sqrt()
    assert found == {"used": pytest.approx(float(expected)), "idle": 0.0}


def test_the_rate_rises_and_falls() -> None:
    rates = [rate(number, 80) for number in range(80)]
    top = rates.index(max(rates))
    assert 0 < top < 10 and rates[:top] == sorted(rates[:top]) and rates[top:] == sorted(rates[top:])[::-1]


@pytest.mark.parametrize(
    "wrong", [{"iterations": -1}, {"batch_size": 0}, {"scale_rate": -1.0}, {"bias_rate": float("inf")}]
)
def test_impossible_values_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="tuning"):
        Tuning(**wrong)  # type: ignore[arg-type]
