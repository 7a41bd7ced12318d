"""Registers take a name once."""

import pytest

from tfmq.registers import register


def test_a_taken_name_is_refused_and_keeps_what_it_has() -> None:
    found = {"one": 1}
    register(found, "two", 2)
    with pytest.raises(ValueError, match="one is registered already; choose a name beside one, two"):
        register(found, "one", 3)
    assert found == {"one": 1, "two": 2}
