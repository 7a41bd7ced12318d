"""Tasks on workers: each once, errors as they were, and an end to retrying."""

import os
import socket
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tfmq.cluster import crew as module
from tfmq.cluster.crew import Cluster, WorkerError, check_reachable, connected


def doubler() -> Callable[[int], int]:
    return lambda number: 2 * number


def refuser() -> Callable[[int], int]:
    def refuse(number: int) -> int:
        raise ValueError(f"{number} is refused")

    return refuse


def dier(folder: Path) -> Callable[[int], int]:
    def die(number: int) -> int:
        (folder / str(os.getpid())).touch()
        os._exit(1)

    return die


@pytest.fixture
def sent_by_value(ray: Any) -> Any:
    """Let workers take functions of this file as they are: they cannot import it."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def test_every_task_once_with_its_number(sent_by_value: None) -> None:
    with connected(Cluster(workers=2)) as crew:
        assert sorted(crew.team(doubler)(range(7))) == [(number, 2 * number) for number in range(7)]
        assert list(crew.team(doubler)([])) == []


def test_an_error_is_raised_as_it_was(sent_by_value: None) -> None:
    with connected(Cluster()) as crew, pytest.raises(ValueError, match=r"^3 is refused$"):
        list(crew.team(refuser)([3]))


def test_what_kills_every_worker_is_given_up(
    sent_by_value: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RETRIES", 1)
    with connected(Cluster()) as crew, pytest.raises(WorkerError, match="1 more on the same work"):
        list(crew.team(partial(dier, tmp_path))([0]))
    assert len(list(tmp_path.iterdir())) == 2


def test_a_worker_has_the_threads_that_it_is_given(ray: Any) -> None:
    from torch import get_num_threads

    def make() -> Callable[[int], int]:
        return lambda _: get_num_threads()

    with connected(Cluster(threads=2)) as crew:
        assert list(crew.team(make)([0])) == [(0, 2)]


@pytest.mark.parametrize("wrong", [{"workers": 0}, {"threads": 0}, {"gpus": -1}])
def test_impossible_clusters(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least"):
        Cluster(**wrong)  # type: ignore[arg-type]


def test_an_address_where_nobody_listens_is_refused_at_once() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        with pytest.raises(ConnectionError, match=f"127.0.0.1:{port}"):
            check_reachable(f"127.0.0.1:{port}")
        taken.listen()
        check_reachable(f"127.0.0.1:{port}")
    check_reachable("auto")
