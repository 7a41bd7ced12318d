import pytest
import torch

from tfmq.evaluation.adherence.shares import Share, encoded, share


def test_verdicts_keep_what_was_not_asked() -> None:
    found = encoded({"ink": [True, False, None, True]})["ink"]
    assert found.tolist() == [1, 0, -1, 1]
    assert share(found) == Share(2, 3)
    assert share(torch.tensor([-1, -1], dtype=torch.int8)) is None


@pytest.mark.parametrize(("held", "asked"), [(0, 10), (10, 10), (7, 10), (450, 500)])
def test_the_interval_is_scipys(held: int, asked: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    expected = stats.binomtest(held, asked).proportion_ci(method="wilson")
    assert Share(held, asked).interval == pytest.approx((expected.low, expected.high), abs=1e-6)
