import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tfmq.nn.layer import CalibratedLayer
from tfmq.numerics.grids import IntegerFormat
from tfmq.numerics.operations import Linear
from tfmq.numerics.rounding import annealed_beta, rounding_penalty
from tfmq.quantizers.weight import fit_grid
from tfmq.reconstruction.learning import CHECKS, PATIENCE, Learning, adaptive_rounding, learn_rounding

QUICK = Learning(iterations=300, learning_rate=1e-2, batch_size=32)


def calibrated(*, bits: int = 3, seed: int = 0) -> CalibratedLayer:
    torch.manual_seed(seed)
    source = nn.Linear(16, 8, bias=False)
    layer = CalibratedLayer(source, Linear(), fit_grid(source.weight.detach(), IntegerFormat(bits)), None)
    layer.weight_precision = "quantized"
    return layer


def correlated(rows: int = 256) -> Tensor:
    """Inputs that vary mostly along one direction, where nearest rounding errors add up."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, 1, generator=generator) * (
        1 + torch.rand(16, generator=generator)
    ) + 0.1 * torch.randn(rows, 16, generator=generator)


def output_error(layer: CalibratedLayer, x: Tensor) -> Tensor:
    return (layer(x) - x @ layer.weight.T).square().sum(dim=1).mean()


def learn(layers: dict[str, CalibratedLayer], loss: Any, config: Learning = QUICK, *, seed: int = 0) -> int:
    count = 0

    def advance(amount: int = 1) -> None:
        nonlocal count
        count += amount

    learn_rounding(layers, loss, config, seed=seed, advance=advance)
    return count


def test_learned_rounding_beats_nearest_on_correlated_inputs() -> None:
    layer, x = calibrated(), correlated()
    nearest, before = layer.codes.clone(), float(output_error(layer, x))
    assert (
        learn({"a": layer}, lambda g: output_error(layer, x[torch.randint(256, (32,), generator=g)])) == 300
    )
    assert float(output_error(layer, x)) < 0.5 * before
    assert (
        int((layer.codes != nearest).sum()) > 0 and int((layer.codes.int() - nearest.int()).abs().max()) == 1
    )
    assert layer.rounding is None


def test_the_same_seed_gives_the_same_codes_and_another_other_draws() -> None:
    x, found = correlated(), []
    for seed in (0, 0, 1):
        layer = calibrated()
        draws: list[list[int]] = []

        def loss(
            g: torch.Generator, layer: CalibratedLayer = layer, draws: list[list[int]] = draws
        ) -> Tensor:
            draws.append(torch.randint(256, (8,), generator=g).tolist())
            return output_error(layer, x[draws[-1]])

        learn({"a": layer}, loss, Learning(iterations=20, learning_rate=1e-2), seed=seed)
        found.append((layer.codes.clone(), draws))
    assert torch.equal(found[0][0], found[1][0]) and found[0][1] == found[1][1]
    # Four draws measure before and four after; those between are learned on.
    learned, measured = [draws[4:-4] for _, draws in found], [draws[:4] for _, draws in found]
    assert learned[0] != learned[2] and measured[0] != measured[2] and learned[0][:4] != measured[0]
    assert found[0][1][-4:] == measured[0], "before and after are measured on the same draws"


def test_codes_that_would_get_worse_are_kept_as_they_came() -> None:
    layer, x = calibrated(), correlated()
    layer.codes.copy_((layer.codes.int() + 1).clamp(max=7))
    came = layer.codes.clone()

    def loss(g: torch.Generator) -> Tensor:
        # What is measured is best at the codes that came; what is learned leads away from them.
        return (
            -output_error(layer, x)
            if torch.is_grad_enabled()
            else (layer.quantized_weight() - layer.grid.decode(came.float())).square().sum()
        )

    learn({"a": layer}, loss, Learning(iterations=30, learning_rate=0.1))
    assert torch.equal(layer.codes, came)


def test_a_loss_that_is_no_number_keeps_the_codes() -> None:
    layer = calibrated()
    came = layer.codes.clone()
    learn(
        {"a": layer},
        lambda g: layer.quantized_weight().sum() * math.nan,
        Learning(iterations=3, learning_rate=0.1),
    )
    assert torch.equal(layer.codes, came)


def test_no_iterations_and_no_layers_leave_everything_alone() -> None:
    layer = calibrated()
    came = layer.codes.clone()

    def loss(g: torch.Generator) -> Tensor:
        raise AssertionError("the loss was computed")

    assert learn({"a": layer}, loss, Learning(iterations=0)) == 0
    assert learn({}, loss) == 0
    assert torch.equal(layer.codes, came)


def test_several_layers_are_learned_together() -> None:
    first, second = (
        calibrated(bits=4),
        CalibratedLayer(nn.Linear(8, 4), Linear(), fit_grid(torch.randn(4, 8), IntegerFormat(3)), None),
    )
    second.weight_precision = "quantized"
    x = correlated()

    def loss(g: torch.Generator) -> Tensor:
        target = nn.functional.linear(x @ first.weight.T, second.weight, second.bias)
        return (second(first(x)) - target).square().sum(dim=1).mean()

    before = float(loss(torch.Generator()))
    learn({"a": first, "b": second}, loss)
    assert float(loss(torch.Generator())) < before


def test_a_failing_loss_takes_the_roundings_away_and_keeps_the_codes() -> None:
    layer = calibrated()
    came = layer.codes.clone()
    with pytest.raises(KeyError), adaptive_rounding({"a": layer}) as roundings:
        roundings[0].logits.data.neg_()
        raise KeyError
    assert layer.rounding is None and torch.equal(layer.codes, came)


@pytest.mark.parametrize(
    "wrong",
    [
        *({"iterations": -1}, {"batch_size": 0}, {"warmup": 1.0}, {"warmup": -0.1}, {"held_out": 1.0}),
        *({"learning_rate": value} for value in (0.0, math.nan, math.inf)),
        *({"penalty": value} for value in (-1.0, math.nan, math.inf)),
        *({"beta_start": math.nan}, {"beta_end": 0.0}, {"beta_end": math.inf}),
    ],
)
def test_impossible_hyper_parameters_are_refused_by_value(wrong: dict[str, float]) -> None:
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=rf"{name}.*{value}"):
        Learning(**wrong)  # type: ignore[arg-type]


def test_one_iteration_works() -> None:
    layer, x = calibrated(), correlated()
    assert learn({"a": layer}, lambda g: output_error(layer, x), Learning(iterations=1)) == 1


def test_it_ends_where_held_out_samples_gain_nothing_and_keeps_the_best_codes() -> None:
    layer, x = calibrated(), correlated()
    judged: list[tuple[float, Tensor]] = []

    def judge() -> float:
        assert layer.rounding is None, "it is judged by the codes, not by what is between them"
        # Better up to the third check, never again.
        judged.append((abs(len(judged) - 2.0), layer.codes.clone()))
        return judged[-1][0]

    advances: list[int] = []
    config = Learning(iterations=400, learning_rate=3e-3, held_out=0.5)
    taken = learn_rounding(
        {"a": layer},
        lambda g: output_error(layer, x),
        config,
        seed=0,
        advance=lambda n=1: advances.append(n),
        judge=judge,
    )
    first, every = 80, 400 // CHECKS
    assert taken == first + (3 + PATIENCE) * every and sum(advances) == 400 and len(judged) == 3 + PATIENCE
    assert torch.equal(layer.codes, judged[2][1]) and layer.rounding is None
    assert not torch.equal(judged[0][1], judged[-1][1]), "the codes moved between checks"


def test_without_an_end_in_sight_all_steps_are_taken() -> None:
    layer, x = calibrated(), correlated()
    falling = iter(range(1000, 0, -1))
    config = Learning(iterations=40, learning_rate=1e-2, held_out=0.5)
    taken = learn_rounding(
        {"a": layer},
        lambda g: output_error(layer, x),
        config,
        seed=0,
        advance=lambda n=1: None,
        judge=lambda: float(next(falling)),
    )
    assert taken == 40


def test_layers_that_learn_together_learn_what_plain_parameters_would() -> None:
    """One tensor for all logits changes no number: the same steps of Adam on a tensor for each layer end in
    the same codes and logits.
    """
    config = Learning(iterations=60, learning_rate=5e-2, warmup=0.2)
    pairs = [{"a": calibrated(seed=1), "b": calibrated(seed=2, bits=4)} for _ in range(2)]
    x = correlated()

    def loss(layers: dict[str, CalibratedLayer], generator: torch.Generator) -> Tensor:
        batch = x[torch.randint(256, (32,), generator=generator)]
        return output_error(layers["a"], batch) + 2 * output_error(layers["b"], batch)

    learn_rounding(pairs[0], lambda g: loss(pairs[0], g), config, seed=0, advance=lambda amount=1: None)
    generator = torch.Generator().manual_seed(1)
    with adaptive_rounding(pairs[1]) as roundings:
        optimizer = torch.optim.Adam([rounding.logits for rounding in roundings], lr=config.learning_rate)
        for iteration in range(config.iterations):
            optimizer.zero_grad()
            total = loss(pairs[1], generator)
            beta = annealed_beta(
                iteration,
                config.iterations,
                start=config.beta_start,
                end=config.beta_end,
                warmup=config.warmup,
            )
            if beta is not None:
                total = total + config.penalty * sum(
                    rounding_penalty(rounding.soft(), beta) for rounding in roundings
                )
            total.backward()
            optimizer.step()
    nearest = {"a": calibrated(seed=1), "b": calibrated(seed=2, bits=4)}
    for name, layer in pairs[0].items():
        assert torch.equal(layer.codes, pairs[1][name].codes) and not torch.equal(
            layer.codes, nearest[name].codes
        )
