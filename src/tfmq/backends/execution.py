"""Choose what a quantized model computes with."""

from contextlib import ExitStack
from typing import Any

from torch import nn

from tfmq.allocator import give_back

# Registered by being imported.
from tfmq.backends import onednn, openvino, operators, reference  # noqa: F401
from tfmq.backends.backend import BACKENDS, Coverage, Options, release
from tfmq.errors import MissingExtraError
from tfmq.nn.swap import STEPS

AUTO = "auto"
# By kind of device, the fastest first.
PREFERRED = {"cpu": ("torch",), "cuda": ("cuda",)}


def backend_names() -> tuple[str, ...]:
    """Return every name that `execute` takes."""
    return (AUTO, *sorted(BACKENDS))


def choose(name: str, module: nn.Module) -> str:
    """Return the backend that `name` stands for on this machine.

    Raises:
        ValueError: no such backend, or the machine lacks what it needs.
        MissingExtraError: its library is not installed.
    """
    if name not in backend_names():
        raise ValueError(f"there is no backend {name!r}; choose one of {', '.join(backend_names())}")
    if name != AUTO:
        if missing := BACKENDS[name].missing():
            raise ValueError(f"the backend {name} needs {missing}")
        return name
    device = next((parameter.device.type for parameter in module.parameters()), "cpu")
    for candidate in PREFERRED.get(device, ()):
        try:
            if not BACKENDS[candidate].missing():
                return candidate
        except MissingExtraError:
            continue
    return "simulated"


def quantized_modules(target: Any) -> tuple[nn.Module, ...]:
    """Return the quantized denoisers of a pipeline, or the module itself.

    Raises:
        ValueError: there is none.
    """
    parts = target.components.values() if hasattr(target, "components") else (target,)
    found = tuple(part for part in parts if isinstance(part, nn.Module) and hasattr(part, STEPS))
    if not found:
        raise ValueError(f"{type(target).__name__} holds no model quantized by tfmq")
    return found


def _check_values(module: nn.Module) -> None:
    """Raise `ValueError` for a NaN among the model's own values, which integers would hide."""
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point() and bool(tensor.isnan().any()):
            raise ValueError(f"{name} holds NaN: the model is damaged, and integer arithmetic would turn that into plausible numbers")


def execute(target: Any, backend: str = AUTO, *, options: Options | None = None) -> Coverage:
    """Make a quantized pipeline or denoiser compute by `backend` from now on, in place.

    The pipeline stays what it is: schedulers, guidance, saving. Only the denoiser's arithmetic changes, within the bounds that
    docs/performance.md states.

    Args:
        target: a pipeline with a quantized component, or a quantized module.
        backend: "auto", "simulated", "reference", "operators", "torch", "openvino" or "cuda".
        options: memory and compilation; see `Options`.

    Returns:
        Which layers compute in integers.

    Raises:
        ValueError: no such backend, nothing quantized, the machine lacks what it needs, or the model holds NaN.
        MissingExtraError: the backend's library is not installed.
    """
    covered: dict[str, str | None] = {}
    for module in quantized_modules(target):
        name = choose(backend, module)
        _check_values(module)
        release(module)
        with ExitStack() as undo:
            undo.callback(release, module)
            coverage = BACKENDS[name].attach(module, options or Options())
            undo.pop_all()
        give_back()
        covered |= dict.fromkeys(coverage.integer, None) | dict(coverage.floating)
    integer = tuple(name for name, reason in covered.items() if reason is None)
    return Coverage(integer=integer, floating={name: reason for name, reason in covered.items() if reason is not None})
