"""Record the calls that a sampler makes to its denoiser, and to networks around it: one trajectory serves all
of its steps.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress

import torch
from torch import Tensor

from tfmq.calibration.store import CalibrationStore
from tfmq.models.denoiser import Denoiser, Inputs, first_tensor
from tfmq.nn.watch import ModuleCall, all_watched, watched

HELD_OUT = "held_out"
# Number of samples of which one is held out.
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

    def see(call: ModuleCall) -> None:
        if isinstance(call.output, Tensor) and not torch.isfinite(call.output).all():
            broken.append(call.name)

    modules = denoiser.module.named_modules()
    innermost = {name: child for name, child in modules if next(child.children(), None) is None}
    with all_watched(innermost, after=see):
        denoiser(inputs)
    return next(filter(None, broken), type(denoiser.module).__name__)


@contextmanager
def recorded_calls(denoiser: Denoiser, sink: Callable[[Inputs], None]) -> Iterator[None]:
    """Hand the inputs of every call of `denoiser.module` to `sink` while the context is open.

    Raises (inside the context):
        CalibrationError: a sample or an output is NaN or infinite; names the timestep, and the layer that
            made it.
    """

    def before(call: ModuleCall) -> None:
        inputs = denoiser.bind(call.args, call.kwargs).map(lambda tensor: tensor.detach().clone())
        check_finite(inputs)
        sink(inputs)

    def after(call: ModuleCall) -> None:
        bad = ~torch.isfinite(first_tensor(call.output)).flatten(1).all(dim=1)
        if bad.any():
            # The call that looks for the layer is none of the trajectory.
            stop()
            inputs = denoiser.bind(call.args, call.kwargs)
            timestep = float(inputs.timestep[int(bad.int().argmax()) * len(inputs) // len(bad)])
            raise CalibrationError(
                f"{first_broken(denoiser, inputs)} gives NaN or infinite values "
                f"at timestep {timestep:g}, in full precision"
            )

    with watched(denoiser.module, before=before, after=after) as stop:
        yield


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
            keep = _keep_samples(network, store.of(name))
            stack.enter_context(watched(network.module, before=keep))
        yield


def held_out(store: CalibrationStore) -> CalibrationStore:
    """Return the store of the calls of a network that no grid is fitted on: those held out or, where there
    were too few samples, the same ones.
    """
    kept = store.of(HELD_OUT)
    return kept if len(kept) else store


def _keep_samples(network: Denoiser, store: CalibrationStore) -> Callable[[ModuleCall], None]:
    """Return what keeps the samples of the calls of a network."""
    count = itertools.count()

    def keep(call: ModuleCall) -> None:
        with suppress(TypeError, KeyError):
            inputs = network.bind(call.args, call.kwargs).map(lambda tensor: tensor.detach().clone())
            for sample in inputs.chunks(1):
                check_finite(sample)
                (store.of(HELD_OUT) if next(count) % EVERY == 1 else store).append(sample)

    return keep
