"""Record the calls that a sampler makes to its denoiser: one trajectory serves all of its steps."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tfmq.models.denoiser import Denoiser, Inputs, first_tensor


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
