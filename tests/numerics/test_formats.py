import dataclasses

import pytest

from tfmq.numerics.formats import IntegerFormat


@pytest.mark.parametrize(("bits", "levels", "middle"), [(2, 4, 2), (4, 16, 8), (8, 256, 128)])
def test_a_grid_has_two_to_the_bits_levels_and_a_middle(bits: int, levels: int, middle: int) -> None:
    assert (IntegerFormat(bits).levels, IntegerFormat(bits).middle) == (levels, middle)


@pytest.mark.parametrize("bits", [-1, 0, 1, 9, 16, 32])
def test_bits_outside_the_range_are_refused_by_value(bits: int) -> None:
    with pytest.raises(ValueError, match=rf"2\.\.8, got {bits}\b"):
        IntegerFormat(bits)


def test_formats_are_values() -> None:
    assert IntegerFormat(4) == IntegerFormat(4, symmetric=False) != IntegerFormat(4, symmetric=True)
    with pytest.raises(dataclasses.FrozenInstanceError):
        IntegerFormat(4).bits = 8  # type: ignore[misc]
