"""Batches of work: once each, in order, shared among shards."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tfmq.evaluation.stages import Shard, Stages
from tfmq.progress import silent
from tfmq.storage.journal import Journal


def numbers(indices: range) -> dict[str, Tensor]:
    return {"pool": torch.tensor([[float(index)] for index in indices])}


@pytest.fixture
def stages(tmp_path: Path) -> Callable[..., Stages]:
    def make(shard: Shard | None = None, *, resume: bool = True) -> Stages:
        return Stages(Journal(tmp_path / "job", {"job": 1}, resume=resume), 3, shard or Shard(), silent)

    return make


def test_results_are_in_the_order_of_the_images_and_computed_once(stages: Callable[..., Stages]) -> None:
    asked: list[range] = []

    def compute(indices: range) -> dict[str, Tensor]:
        asked.append(indices)
        return numbers(indices)

    stored = stages().run("full precision", 8, compute)
    assert asked == [range(0, 3), range(3, 6), range(6, 8)] and stored.complete and len(stored) == 8
    assert stored.joined("pool").flatten().tolist() == list(range(8)) and [
        len(chunk) for chunk in stored.chunks("pool")
    ] == [3, 3, 2]
    again = stages().run("full precision", 8, compute)
    assert len(asked) == 3 and torch.equal(again.joined("pool"), stored.joined("pool"))
    stages(resume=False).run("full precision", 8, compute)
    assert len(asked) == 6


def test_an_interrupted_stage_goes_on(stages: Callable[..., Stages]) -> None:
    def stops(indices: range) -> dict[str, Tensor]:
        if indices.start:
            raise KeyboardInterrupt
        return numbers(indices)

    with pytest.raises(KeyboardInterrupt):
        stages().run("real", 8, stops)
    left: list[range] = []
    stages().run("real", 8, lambda indices: left.append(indices) or numbers(indices))  # type: ignore[func-returns-value]
    assert left == [range(3, 6), range(6, 8)]


def test_shards_share_the_work(stages: Callable[..., Stages]) -> None:
    asked: dict[int, list[int]] = {0: [], 1: []}
    for index in (1, 0):
        stored = stages(Shard(index, 2)).run(
            "real", 14, lambda indices, index=index: asked[index].append(indices.start) or numbers(indices)
        )
        assert stored.complete == (index == 0)
    assert asked == {0: [0, 6, 12], 1: [3, 9]}
    assert stages().run("real", 14, lambda _: pytest.fail("all is done")).joined(
        "pool"
    ).flatten().tolist() == list(range(14))


@pytest.mark.parametrize(("index", "count"), [(1, 1), (-1, 2), (0, 0)])
def test_impossible_shards(index: int, count: int) -> None:
    with pytest.raises(ValueError, match=f"{index}/{count}"):
        Shard(index, count)


def test_helpers_come_first_and_the_rest_is_done_here(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "job", {"job": 1}, resume=True)
    asked: list[tuple[str, list[range]]] = []

    def help_with(name: str, todo: Sequence[range]) -> Iterator[range]:
        asked.append((name, list(todo)))
        Stages(journal, 3, Shard(), silent).batch(name, todo[1], numbers)
        yield todo[1]

    here: list[range] = []
    helped = Stages(journal, 3, Shard(), silent, help_with)
    stored = helped.run("real", 8, lambda indices: here.append(indices) or numbers(indices))  # type: ignore[func-returns-value]
    assert asked == [("real", [range(0, 3), range(3, 6), range(6, 8)])] and here == [range(0, 3), range(6, 8)]
    assert stored.joined("pool").flatten().tolist() == list(range(8))
