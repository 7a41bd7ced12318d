"""Record the calls that a sampler makes to its denoiser, and to networks around it: one trajectory serves all
of its steps.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from tfmq.calibration.store import CalibrationStore
from tfmq.models.denoiser import Denoiser, Inputs, first_tensor

HELD_OUT = "held_out"
# One sample of so many is held out.
EVERY = 4


class CalibrationError(RuntimeError):
    """Calibration met a value that no range can hold; names the place and the timestep."""


def check_finite(inputs: Inputs) -> None:
    """Raise `CalibrationError` where the sample of a denoiser call is NaN or infinite."""
    bad = ~torch.isfinite(inputs.sample).flatten(1).all(dim=1)
    if bad.any():
        timestep = float(inputs.timestep[bad][0])
        raise CalibrationError(
            f"the sample is not finite at timestep {timestep:g}: the "
            "full-precision model breaks on its own trajectory"
        )


def first_broken(denoiser: Denoiser, inputs: Inputs) -> str:
    """Return the name of the first innermost module that gives a NaN or infinite value in this call; the
    model's own where none does.
    """
    broken: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            if isinstance(output, Tensor) and not torch.isfinite(output).all():
                broken.append(name)

        return hook

    with ExitStack() as stack:
        for name, child in denoiser.module.named_modules():
            if next(child.children(), None) is None:
                stack.callback(child.register_forward_hook(watch(name)).remove)
        denoiser(inputs)
    return next(filter(None, broken), type(denoiser.module).__name__)


@contextmanager
def recorded_calls(denoiser: Denoiser, sink: Callable[[Inputs], None]) -> Iterator[None]:
    """Hand the inputs of every call of `denoiser.module` to `sink` while the context is open.

    Raises (inside the context):
        CalibrationError: a sample or an output is NaN or infinite; names the timestep, and the layer that
            made it.
    """

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = denoiser.bind(args, kwargs).map(lambda tensor: tensor.detach().clone())
        check_finite(inputs)
        sink(inputs)

    def after(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        bad = ~torch.isfinite(first_tensor(output)).flatten(1).all(dim=1)
        if bad.any():
            remove()
            inputs = denoiser.bind(args, kwargs)
            timestep = float(inputs.timestep[int(bad.int().argmax()) * len(inputs) // len(bad)])
            raise CalibrationError(
                f"{first_broken(denoiser, inputs)} gives NaN or infinite values "
                f"at timestep {timestep:g}, in full precision"
            )

    handles = (
        denoiser.module.register_forward_pre_hook(before, with_kwargs=True),
        denoiser.module.register_forward_hook(after, with_kwargs=True),
    )

    def remove() -> None:
        for handle in handles:
            handle.remove()

    try:
        yield
    finally:
        remove()


@contextmanager
def recorded_networks(networks: Mapping[str, Denoiser], store: CalibrationStore) -> Iterator[None]:
    """Keep the calls of `networks`, which stand before or behind the denoiser on its trajectory, sample by
    sample while the context is open.

    Those of each go to `store.of(name)`; one of `EVERY` samples is held out and goes to the store within it,
    see `held_out`. A call of which something cannot be kept, such as a cache that a network fills, is left
    out.
    """
    with ExitStack() as stack:
        for name, network in networks.items():
            hook = _keep_samples(network, store.of(name))
            stack.callback(network.module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


def held_out(store: CalibrationStore) -> CalibrationStore:
    """Return the store of the calls of a network that no grid is fitted on: those held out or, where there
    were too few samples, the same ones.
    """
    kept = store.of(HELD_OUT)
    return kept if len(kept) else store


def _keep_samples(network: Denoiser, store: CalibrationStore) -> Callable[..., None]:
    """Return a hook that keeps the samples of the calls of a network."""
    count = itertools.count()

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with suppress(TypeError, KeyError):
            inputs = network.bind(args, kwargs).map(lambda tensor: tensor.detach().clone())
            for sample in inputs.chunks(1):
                check_finite(sample)
                (store.of(HELD_OUT) if next(count) % EVERY == 1 else store).append(sample)

    return keep
