"""`einsum` as a matrix product, against torch's own."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tfmq.nn.contraction import contraction

SIZES = dict(zip("abcdefgh", (2, 3, 4, 5, 2, 3, 1, 6), strict=True))


def tensors(left: str, right: str) -> tuple[Tensor, Tensor]:
    """Return operands in float64: sums of many terms in another order then agree far within the tolerance of
    a comparison.
    """
    first, second = (
        torch.randn([SIZES[letter] for letter in letters], dtype=torch.float64) for letters in (left, right)
    )
    return first, second


def product(left: Tensor, right: Tensor) -> Tensor:
    assert left.ndim == right.ndim and left.shape[-1] == right.shape[-2]
    return left @ right


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_any_contraction_is_the_einsum(data: st.DataObject) -> None:
    letters = data.draw(st.permutations("abcdefgh"))
    cuts = sorted(data.draw(st.lists(st.integers(1, 7), min_size=3, max_size=3)))
    summed, batch, rows, columns = (
        letters[start:end] for start, end in zip((0, *cuts), (*cuts, 8), strict=True)
    )
    left, right, out = (
        "".join(data.draw(st.permutations(parts)))
        for parts in (summed + batch + rows, summed + batch + columns, batch + rows + columns)
    )
    equation = data.draw(st.sampled_from([f"{left},{right}->{out}", f" {left}, {right} -> {out}"]))
    operands = tensors(left, right)
    found = contraction((equation, *operands))
    assert found is not None
    torch.testing.assert_close(found.multiply(*operands, product), torch.einsum(equation, *operands))


@pytest.mark.parametrize(
    ("equation", "left", "right"),
    [
        ("...id,...jd->...ij", (2, 3, 5, 4), (2, 3, 6, 4)),
        ("b...d,bd...->b...", (2, 3, 4), (2, 4, 3)),
        ("...d,de->...e", (2, 3, 4), (4, 5)),
        ("dcb,bca", (2, 3, 4), (4, 3, 5)),
        ("...ab,...bc", (2, 3, 4), (2, 4, 5)),
        ("bhid,bhjd->bhij", (2, 1, 5, 4), (2, 3, 6, 4)),
    ],
)
def test_ellipses_implied_results_and_broadcast_batches(
    equation: str, left: tuple[int, ...], right: tuple[int, ...]
) -> None:
    operands = torch.randn(left, dtype=torch.float64), torch.randn(right, dtype=torch.float64)
    found = contraction((equation, *operands))
    assert found is not None
    torch.testing.assert_close(found.multiply(*operands, product), torch.einsum(equation, *operands))


@pytest.mark.parametrize(
    ("equation", "shapes"),
    [
        ("i,j->ij", [(3,), (4,)]),
        ("bd,bd->bd", [(2, 3), (2, 3)]),
        ("ii,ij->j", [(3, 3), (3, 4)]),
        ("abc,cd->d", [(2, 3, 4), (4, 5)]),
        ("bid,bjd->bij", [(2, 3, 4), (2, 3, 1)]),
        ("bid->bdi", [(2, 3, 4)]),
        ("ab,bc,cd->ad", [(2, 3), (3, 4), (4, 5)]),
    ],
)
def test_what_is_no_product_of_two_operands(equation: str, shapes: list[tuple[int, ...]]) -> None:
    operands = [torch.randn(shape) for shape in shapes]
    torch.einsum(equation, *operands)
    assert contraction((equation, *operands)) is None and contraction((equation, operands)) is None


def test_integers_are_no_activations() -> None:
    ones = torch.ones(2, 2, dtype=torch.int64)
    assert contraction(("ab,bc->ac", ones, ones)) is None
