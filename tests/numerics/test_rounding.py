import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tfmq.numerics.rounding import annealed_beta, rectified_sigmoid, rounding_logits, rounding_penalty


@given(st.floats(0.0, 1.0, exclude_max=True, width=32))
def test_logits_invert_the_rectified_sigmoid(fraction: float) -> None:
    value = torch.tensor(fraction)
    assert float(rectified_sigmoid(rounding_logits(value))) == pytest.approx(fraction, abs=1e-6)


def test_a_half_has_logit_zero_and_the_logit_grows_with_the_fraction() -> None:
    logits = rounding_logits(torch.tensor([0.1, 0.4, 0.5, 0.6, 0.9]))
    assert float(logits[2]) == pytest.approx(0.0, abs=1e-6)
    assert (logits.diff() > 0).all()


def test_the_rectified_sigmoid_is_the_papers() -> None:
    logits = np.linspace(-6, 6, 49)
    expected = np.clip(1.2 / (1 + np.exp(-logits)) - 0.1, 0, 1)
    np.testing.assert_allclose(rectified_sigmoid(torch.from_numpy(logits)).numpy(), expected, atol=1e-12)
    assert expected[0] == 0 and expected[-1] == 1, "hard values must be reachable"


@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=30), st.floats(2, 20))
def test_the_penalty_is_the_papers_and_zero_only_when_hard(soft: list[float], beta: float) -> None:
    value = np.array(soft)
    penalty = float(rounding_penalty(torch.tensor(soft, dtype=torch.float64), beta))
    assert penalty == pytest.approx(float((1 - np.abs(2 * value - 1) ** beta).sum()), abs=1e-9)
    if set(soft) <= {0.0, 1.0}:
        assert penalty == 0
    if any(0.001 < entry < 0.999 for entry in soft):
        assert penalty > 0


def test_beta_waits_for_the_warm_up_then_falls_linearly_between_its_ends() -> None:
    betas = [annealed_beta(i, 100, start=20.0, end=2.0, warmup=0.2) for i in range(101)]
    assert betas[:20] == [None] * 20
    assert betas[20] == 20.0 and betas[100] == pytest.approx(2.0)
    assert betas[60] == pytest.approx(11.0)
    steps = np.diff(np.array(betas[20:], dtype=float))
    np.testing.assert_allclose(steps, -18 / 80, atol=1e-9)


@pytest.mark.parametrize("iterations", [1, 2, 3])
def test_beta_stays_between_its_ends_in_the_shortest_runs(iterations: int) -> None:
    betas = [annealed_beta(i, iterations, start=20.0, end=2.0, warmup=0.2) for i in range(iterations)]
    assert all(beta is None or 2.0 <= beta <= 20.0 for beta in betas)
