"""Rotation by regular Hadamard matrices, against the matrix itself and against another library's."""

import pytest
import torch

from tfmq.numerics.rotation import largest_group, rotate

# Published for order four (ConvRot, arXiv 2512.03673, equation 5): one negative entry a row.
REGULAR = torch.tensor([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], dtype=torch.float64) / 2


def matrix(size: int) -> torch.Tensor:
    found = torch.ones(1, 1, dtype=torch.float64)
    while len(found) < size:
        found = torch.kron(found, REGULAR)
    return found


@pytest.mark.parametrize("size", [4, 16, 64, 256, 1024, 4096])
def test_groups_are_multiplied_by_the_matrix(size: int) -> None:
    x, hadamard = torch.randn(3, 2, 3 * size, dtype=torch.float64), matrix(size)
    expected = (x.unflatten(-1, (3, size)) @ hadamard).flatten(-2)
    torch.testing.assert_close(rotate(x, size), expected)
    torch.testing.assert_close(rotate(rotate(x, size), size), x)
    # All rows have the same sum: what all channels share stays in all of them.
    torch.testing.assert_close(rotate(torch.ones(2, size), size), torch.ones(2, size))


@pytest.mark.parametrize("size", [16, 256])
def test_the_matrix_is_that_of_comfy_kitchen(size: int) -> None:
    library = pytest.importorskip("comfy_kitchen.backends.eager.convrot_w4a4")
    theirs = library._build_hadamard(size, device="cpu", dtype=torch.float64)
    torch.testing.assert_close(rotate(torch.eye(size, dtype=torch.float64), size), theirs)


def test_a_product_of_rotated_operands_is_the_same() -> None:
    x, weight = torch.randn(5, 128, dtype=torch.float64), torch.randn(7, 128, dtype=torch.float64)
    torch.testing.assert_close(rotate(x, 64) @ rotate(weight, 64).mT, x @ weight.mT)


@pytest.mark.parametrize(
    ("widths", "most", "size"),
    [
        ([1280], 256, 256),
        ([1280], 64, 64),
        ([320, 640], 256, 64),
        ([48], 256, 16),
        ([6], 256, 0),
        ([64], 0, 0),
    ],
)
def test_groups_are_as_large_as_all_segments_divide_into(widths: list[int], most: int, size: int) -> None:
    assert largest_group(widths, most) == size
