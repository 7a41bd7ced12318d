"""One side of the page: a model in a process of its own, so that the memory it takes is its own."""

import time
import warnings
from dataclasses import dataclass
from importlib import import_module
from threading import Lock
from typing import Any

from tfmq.backends.backend import Options
from tfmq.backends.execution import AUTO, computed_by, execute
from tfmq.evaluation.cost.system import peak_bytes, resident_bytes
from tfmq.evaluation.sampling import Images, draw_batch
from tfmq.nn.swap import is_quantized, steps_of
from tfmq.studio.worker import Worker, WorkerEndedError
from tfmq.targets import open_sampler


class SideError(RuntimeError):
    """A model's process ended; most likely it was out of memory."""


@dataclass(frozen=True, kw_only=True)
class Wish:
    """An image: the first of the stream `seed`. Text-to-image models heed `prompt`, class-conditional ones
    `label`.
    """

    prompt: str = ""
    label: int = 0
    seed: int = 0
    steps: int = 50


@dataclass(frozen=True)
class Drawn:
    """An image, uint8 `[H, W, C]`, and what drawing it took.

    Args:
        image: the image.
        seconds: time of drawing; the model was open before.
        memory_bytes: the most that the model's process has held beyond its libraries.
        backend: what a quantized model computes with.
        warnings: warnings that drawing gave.
    """

    image: Images
    seconds: float
    memory_bytes: int
    backend: str | None
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class _Open:
    """What a process holds: the model, and the memory that the process had before."""

    sampler: Any
    backend: str | None
    before: int


# The model that this process has open; at most one.
_open: dict[str, _Open] = {}


def _opened(model: str, backend: str, device: str | None, options: Options | None) -> _Open:
    """Open the model of this process, and draw once so that nothing is done for the first time later."""
    # Import first what every model needs, so that its memory does not count as the model's.
    import_module("tfmq.integrations.diffusers.pipelines")
    # Here, because the page's own process, which opens no model, does without diffusers.
    from tfmq.integrations.diffusers.quiet import quiet

    before = resident_bytes()
    with quiet():
        sampler: Any = open_sampler(model)
    if device is not None:
        sampler.pipeline.to(device)
    module = sampler.denoiser.module
    quantized = is_quantized(module)
    if quantized:
        execute(module, backend, options=options)
    with warnings.catch_warnings():
        # Silence the warning that these two steps were not calibrated.
        warnings.simplefilter("ignore")
        sampler.run(range(1), steps=2, seed=0)
    return _Open(sampler, computed_by(module) or backend if quantized else None, before)


def draw_here(
    model: str, backend: str, device: str | None, wish: Wish, options: Options | None = None
) -> Drawn:
    """Draw in this process, which opens `model` the first time.

    Raises:
        ValueError: there is no such model.
        SamplingError: it draws no image.
    """
    if model not in _open:
        _open[model] = _opened(model, backend, device, options)
    held = _open[model]
    if wish.prompt and held.sampler.takes_prompts:
        held.sampler.prompts = (wish.prompt,)
    held.sampler.labels = (wish.label,)
    module = held.sampler.denoiser.module
    if is_quantized(module):
        # Set the same timesteps again, so that those outside of them are warned about anew.
        steps_of(module).replace(steps_of(module).timesteps)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        began = time.perf_counter()
        image = draw_batch(held.sampler, range(1), steps=wish.steps, seed=wish.seed)[0]
        seconds = time.perf_counter() - began
    said = tuple(dict.fromkeys(str(warning.message) for warning in caught if warning.category is UserWarning))
    return Drawn(image, seconds, peak_bytes() - held.before, held.backend, said)


class Side:
    """Draws with whatever model it is asked for; each model gets a new process, and the last one's ends."""

    def __init__(
        self, *, backend: str = AUTO, device: str | None = None, options: Options | None = None
    ) -> None:
        self.backend = backend
        self.options = options
        self.device = device
        self._model: str | None = None
        self._worker: Worker | None = None
        self._ended = False
        # A page draws in threads, and is closed in another.
        self._lock = Lock()

    def draw(self, model: str, wish: Wish) -> Drawn:
        """Draw; see `draw_here`.

        Raises:
            SideError: the process ended, and the next call starts another; or this side was closed.
        """
        worker = self._worker_of(model)
        try:
            drawn: Drawn = worker.call(draw_here, model, self.backend, self.device, wish, self.options)
        except WorkerEndedError as error:
            self._end_worker()
            raise SideError(f"the process of {model} ended; most likely it was out of memory") from error
        return drawn

    def _worker_of(self, model: str) -> Worker:
        """Return the process of `model`, a new one if the last one was another's."""
        if model != self._model:
            self._end_worker()
        with self._lock:
            if self._ended:
                raise SideError("the studio is closed")
            if self._worker is None:
                self._worker, self._model = Worker(), model
            return self._worker

    def _end_worker(self) -> None:
        with self._lock:
            worker, self._worker = self._worker, None
        if worker is not None:
            worker.end()

    def process_ids(self) -> list[int]:
        """Return the number of the process, if there is one."""
        return [] if self._worker is None else [self._worker.process_id]

    def close(self) -> None:
        """End the process, also one that is drawing, for good: none that is just starting may stay behind."""
        with self._lock:
            self._ended = True
        self._end_worker()
