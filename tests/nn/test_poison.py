"""Which samples of an output a NaN among the inputs concerns."""

import pytest
import torch
from torch import Tensor

from tfmq.nn.poison import poisoned


def spoiled(output: Tensor) -> list[bool]:
    rows = output.isnan().flatten(1)
    assert torch.equal(rows.any(dim=1), rows.all(dim=1)), "a sample is NaN as a whole"
    return rows.all(dim=1).tolist()


def with_nan(*shape: int, row: int = 1) -> Tensor:
    x = torch.zeros(shape)
    x[(row, *[0] * (len(shape) - 1))] = torch.nan
    return x


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"sample": with_nan(4, 2, 3)}, [False, True, False, False]),
        ({"sample": torch.zeros(4, 2), "t": with_nan(4)}, [False, True, False, False]),
        ({"sample": torch.zeros(4, 2), "more": {"prompt": with_nan(2, 5, 3)}}, [False, False, True, True]),
        ({"sample": torch.zeros(4, 2), "shared": torch.tensor(torch.nan)}, [True] * 4),
        ({"sample": torch.zeros(4, 2), "table": with_nan(7, 3)}, [True] * 4),
        ({"sample": with_nan(4, 2), "t": with_nan(4, row=3)}, [False, True, False, True]),
        ({"sample": torch.full((4, 2), torch.inf), "mask": torch.full((4, 1), -torch.inf)}, [False] * 4),
        ({"t": torch.arange(4), "empty": torch.zeros(0, 3), "flag": True}, [False] * 4),
    ],
)
def test_rows(arguments: dict, expected: list[bool]) -> None:
    assert spoiled(poisoned(torch.ones(4, 3, 2), arguments)) == expected


def test_without_nan_the_output_is_the_same_object() -> None:
    output = (torch.ones(2, 2), None)
    assert poisoned(output, {"sample": torch.zeros(2, 2)}) is output


def test_every_floating_tensor_of_an_output_is_spoiled_and_nothing_else() -> None:
    counts = torch.ones(2, 2, dtype=torch.long)
    output = poisoned(
        {"sample": torch.ones(2, 3), "counts": counts, "none": None}, {"sample": with_nan(2, 3)}
    )
    assert (
        spoiled(output["sample"]) == [False, True]
        and torch.equal(output["counts"], counts)
        and output["none"] is None
    )


def test_gradients_of_the_other_samples_stay() -> None:
    x = torch.ones(2, 3, requires_grad=True)
    poisoned(x * 2, {"sample": with_nan(2, 3)})[0].sum().backward()
    assert x.grad is not None and torch.equal(x.grad, torch.tensor([[2.0] * 3, [0.0] * 3]))


def test_infinities_whose_sum_is_nan_concern_nobody() -> None:
    x = torch.zeros(2, 3)
    x[0, 0], x[1, 1] = torch.inf, -torch.inf
    assert spoiled(poisoned(torch.zeros(2, 3), {"sample": x})) == [False, False]
