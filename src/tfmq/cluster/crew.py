"""Workers of a Ray cluster, on this machine unless told otherwise; the only file that knows Ray."""

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import torch

from tfmq.errors import require

# Number of further attempts at a task whose worker died or whose machine was lost.
RETRIES = 3
# Bytes of Ray's object store, which would take a third of the memory by default. Only drawn images and tasks
# go through it.
STORE_BYTES = 128 * 2**20

Task = TypeVar("Task")
Result = TypeVar("Result")
# Does tasks, and yields their numbers and results in the order in which they end.
Team = Callable[[Sequence[Task]], Iterator[tuple[int, Result]]]

# Seconds until a machine that does not answer counts as absent.
PATIENCE = 10.0

# What this worker process has opened, by the team that it works for; one entry at a time.
_opened: dict[str, Callable[[Any], Any]] = {}


class WorkerError(RuntimeError):
    """A piece of work did not survive: the workers that it was given to died of it, or for lack of memory."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Where work is done.

    Args:
        address: address of a running Ray cluster, `host:port`, or `auto` for the one that this machine is
            part of. None starts workers here, which end with the run.
        workers: number of workers at the same time; None is as many as the CPUs allow.
        threads: number of threads of each worker. A result may depend on it in its last bits, as on any
            machine; it never depends on the number of workers.
        gpus: number of GPUs of each worker.
    """

    address: str | None = None
    workers: int | None = None
    threads: int = 1
    gpus: int = 0

    def __post_init__(self) -> None:
        if self.threads < 1 or self.gpus < 0 or (self.workers is not None and self.workers < 1):
            raise ValueError(
                "workers and threads must be at least 1 and gpus at least 0, got "
                f"{self.workers}, {self.threads} and {self.gpus}"
            )


def _perform(key: str, make: Callable[[], Callable[[Any], Any]], threads: int, task: Any) -> Any:
    """Do one task in a worker process, which opens what it needs for a team once."""
    if key not in _opened:
        _opened.clear()
        torch.set_num_threads(threads)
        _opened[key] = make()
    return _opened[key](task)


class Crew:
    """The workers of a cluster that this process is connected to; see `connected`."""

    def __init__(self, ray: Any, cluster: Cluster) -> None:
        self._ray = ray
        self._cluster = cluster

    @property
    def _at_once(self) -> int:
        """Tasks that are handed out before the first comes back: one more for each worker keeps it busy."""
        return self._cluster.workers or 2 * max(
            1, int(self._ray.cluster_resources().get("CPU", 1)) // self._cluster.threads
        )

    def team(self, make: Callable[[], Callable[[Task], Result]]) -> Team[Task, Result]:
        """Return what does tasks on the workers.

        Args:
            make: called once in each worker process; what it returns does a task. It is sent there, so it is
                a function of a module, or a partial of one. Doing a task twice must do no harm: that is what
                happens after a worker dies.

        Raises (where results are iterated over):
            WorkerError: a task killed every worker that it was given to.
            Exception: what `make` or a task raised.
        """
        ray, threads = self._ray, self._cluster.threads
        shipped = ray.put(make)
        remote = ray.remote(_perform).options(
            num_cpus=threads, num_gpus=self._cluster.gpus, max_retries=RETRIES
        )

        def do(tasks: Sequence[Task]) -> Iterator[tuple[int, Result]]:
            waiting = iter(enumerate(tasks))
            running: dict[Any, int] = {}

            def hand_out(count: int) -> None:
                for number, task in islice(waiting, count):
                    running[remote.remote(shipped.hex(), shipped, threads, task)] = number

            hand_out(self._at_once)
            try:
                while running:
                    (done, *_), _ = ray.wait(list(running), num_returns=1)
                    number = running.pop(done)
                    result = self._result(done)
                    hand_out(1)
                    yield number, result
            finally:
                for reference in running:
                    ray.cancel(reference, force=True)

        return do

    def _result(self, reference: Any) -> Any:
        """Return what a task returned, or raise what it raised."""
        errors = self._ray.exceptions
        try:
            return self._ray.get(reference)
        except errors.RayTaskError as error:
            raise error.cause from error
        except (errors.WorkerCrashedError, errors.OutOfMemoryError, errors.NodeDiedError) as error:
            cause = str(error).strip().splitlines()[0]
            raise WorkerError(
                f"a worker died, and so did {RETRIES} more on the same work "
                f"({cause}); give them more memory, or fewer at once"
            ) from error


def check_reachable(address: str) -> None:
    """Refuse an address where nobody listens: Ray would go on asking for minutes.

    Raises:
        ConnectionError: there is no cluster at `host:port`.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=PATIENCE).close()
    except OSError as error:
        raise ConnectionError(
            f"there is no Ray cluster at {address} ({error}); start one with: ray start --head"
        ) from error


@contextmanager
def connected(cluster: Cluster) -> Iterator[Crew]:
    """Yield the crew of `cluster`. A program that is connected to Ray already goes on with that connection.

    Raises:
        MissingExtraError: Ray is not installed.
        ConnectionError: there is no cluster at the address.
    """
    ray = require("ray", extra="ray")
    if ray.is_initialized():
        yield Crew(ray, cluster)
        return
    quiet = {"log_to_driver": False, "logging_level": "error"}
    if cluster.address is None:
        # Ray reports its use to its makers unless this is set.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        size = {"num_cpus": cluster.workers * cluster.threads} if cluster.workers else {}
        ray.init(address="local", include_dashboard=False, object_store_memory=STORE_BYTES, **size, **quiet)
    else:
        check_reachable(cluster.address)
        ray.init(address=cluster.address, **quiet)
    try:
        yield Crew(ray, cluster)
    finally:
        ray.shutdown()
