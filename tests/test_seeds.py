"""Every test draws the same numbers, whatever ran before it and whichever file was imported before its
own.
"""

import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

Draws = tuple[float, float, float]


def draws() -> Draws:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


AT_IMPORT = draws()
EXAMPLES: set[float] = set()


@pytest.fixture(scope="module")
def shared() -> Draws:
    return draws()


@pytest.mark.parametrize("turn", [0, 1])
def test_a_file_its_fixtures_and_each_test_begin_with_the_seed(shared: Draws, turn: int) -> None:
    assert draws() == shared == AT_IMPORT


@given(st.integers())
def test_each_example_of_hypothesis_begins_with_the_seed(number: int) -> None:
    EXAMPLES.add(float(torch.rand(())))
    assert len(EXAMPLES) == 1 and AT_IMPORT[2] in EXAMPLES
