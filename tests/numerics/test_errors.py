import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tfmq.numerics.errors import cosine, relative_error, sqnr_db


@given(st.integers(0, 2**31))
def test_measures_agree_with_float64_formulas(seed: int) -> None:
    rng = np.random.default_rng(seed)
    reference, value = rng.normal(size=(4, 9)), rng.normal(size=(4, 9))
    r, v = torch.from_numpy(reference), torch.from_numpy(value)
    norms = np.linalg.norm(reference, axis=1)
    np.testing.assert_allclose(
        relative_error(r, v).numpy(), np.linalg.norm(reference - value, axis=1) / norms
    )
    np.testing.assert_allclose(
        cosine(r, v).numpy(), (reference * value).sum(1) / norms / np.linalg.norm(value, axis=1), atol=1e-12
    )
    assert sqnr_db(r, v) == pytest.approx(
        10 * np.log10((reference**2).sum() / ((reference - value) ** 2).sum())
    )


def test_zeros_are_not_far_from_zeros() -> None:
    zeros = torch.zeros(2, 3)
    assert relative_error(zeros, zeros).tolist() == [0.0, 0.0]
    assert sqnr_db(zeros, zeros) == float("inf")


def test_opposite_vectors_have_cosine_minus_one_and_error_two() -> None:
    x = torch.tensor([[3.0, 4.0]])
    assert float(cosine(x, -x)) == pytest.approx(-1.0)
    assert float(relative_error(x, -x)) == pytest.approx(2.0)


def test_half_precision_tensors_do_not_overflow() -> None:
    reference = torch.full((1000,), 300.0, dtype=torch.float16)
    assert sqnr_db(reference, reference - 1) == pytest.approx(20 * np.log10(300))
