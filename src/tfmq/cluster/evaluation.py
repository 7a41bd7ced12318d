"""Evaluate on many workers: each leaves its batches in the folder of the job, as a shard does."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

from tfmq.cluster.crew import Crew
from tfmq.evaluation.job import Request, open_job
from tfmq.evaluation.stages import BatchHelpers
from tfmq.models.sampler import Sampler

# Returns the quantized model and the full-precision one, if there is one.
OpenModels = Callable[[], tuple[Sampler, Sampler | None]]


def _make(open_models: OpenModels, request: Request) -> Callable[[tuple[str, range]], None]:
    """Open the job in a worker, and return what does a batch of a stage there; refuse where the worker would
    compute something else.
    """
    evaluator, _ = open_job(*open_models(), request)
    return lambda task: evaluator.batch(*task)


def helpers(crew: Crew, open_models: OpenModels, request: Request) -> BatchHelpers:
    """Return what computes batches on the workers; see `tfmq.evaluation.job.evaluate`.

    Args:
        crew: does it.
        open_models: is called in each worker.
        request: the one that is evaluated here. Its folder, and every file that it or `open_models` names,
            must be the same one on all machines.

    Raises (where batches are asked for):
        JobMismatchError: a worker has another model, other weights of metrics, or other versions.
        WorkerError: a batch could not be computed.
    """
    team = crew.team(partial(_make, open_models, request))

    def help_with(name: str, todo: Sequence[range]) -> Iterator[range]:
        for number, _ in team([(name, indices) for indices in todo]):
            yield todo[number]

    return help_with
