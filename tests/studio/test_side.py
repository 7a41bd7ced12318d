"""A model in a process of its own draws what it draws here, and its end is no end of the page."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tfmq.evaluation.sampling import draw
from tfmq.studio.side import Side, SideError, Wish
from tfmq.targets import open_sampler


@pytest.fixture
def side() -> Iterator[Side]:
    made = Side(backend="simulated")
    yield made
    made.close()


def test_the_image_is_the_first_of_the_seed(side: Side, quantized: Path) -> None:
    drawn = side.draw(str(quantized), Wish(seed=3, steps=3))
    assert np.array_equal(drawn.image, draw(open_sampler(str(quantized)), 1, steps=3, seed=3, batch_size=1)[0])
    assert drawn.backend == "simulated" and drawn.seconds > 0 and 0 < drawn.memory_bytes < 2**32
    assert drawn.warnings == ()
    for _ in range(2):
        (warning,) = side.draw(str(quantized), Wish(steps=2)).warnings
        assert "was not calibrated" in warning
    with pytest.raises(ValueError, match="steps"):
        side.draw(str(quantized), Wish(steps=0))
    # Another model, another process; the first one's is gone.
    first = side.process_ids()
    with pytest.raises(ValueError, match="does not exist"):
        side.draw("/no/such/model", Wish())
    assert not set(first) & set(side.process_ids())


def test_a_process_that_dies_is_named_and_replaced(side: Side, original: Path) -> None:
    drawn = side.draw(str(original), Wish(steps=2))
    assert drawn.backend is None
    (process,) = side.process_ids()
    os.kill(process, signal.SIGKILL)
    with pytest.raises(SideError, match="out of memory"):
        side.draw(str(original), Wish(steps=2))
    assert np.array_equal(side.draw(str(original), Wish(steps=2)).image, drawn.image)
