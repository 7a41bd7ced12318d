"""Choose what a quantized model computes with."""

from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from torch import nn

from tfmq.allocator import give_back

# Importing these modules registers their backends.
from tfmq.backends import floating, onednn, openvino, operators, reference  # noqa: F401
from tfmq.backends.auto import AutoExecutor
from tfmq.backends.backend import BACKENDS, Coverage, EngineError, Options, release
from tfmq.backends.fallback import FallbackExecutor, complain
from tfmq.backends.prepared import Prepared, Way
from tfmq.errors import MissingExtraError
from tfmq.nn.plan import packed_layers
from tfmq.nn.swap import networks_of

AUTO = "auto"
# Backends that take over, in this order, where an engine fails. The last one, torch's own floating point,
# needs no engine.
FALLBACKS = ("torch", "simulated")
# Backends that run layer by layer unless `Options(compile=True)` asks for more.
LAYERWISE = ("torch", "operators", "cuda")


def backend_names() -> tuple[str, ...]:
    """Return every name that `execute` takes."""
    return (AUTO, *sorted(BACKENDS))


def _check_name(name: str) -> None:
    """Refuse a backend that there is not, or that this machine lacks something for.

    Raises:
        ValueError: there is no such backend, or the machine lacks what it needs.
        MissingExtraError: its library is not installed.
    """
    if name not in backend_names():
        raise ValueError(f"there is no backend {name!r}; choose one of {', '.join(backend_names())}")
    if name != AUTO and (missing := BACKENDS[name].missing()):
        raise ValueError(f"the backend {name} needs {missing}")


def _usable(name: str) -> bool:
    try:
        return not BACKENDS[name].missing()
    except MissingExtraError:
        return False


def _order(module: nn.Module, backend: str, options: Options) -> tuple[Way, ...]:
    """Return the ways to compute by `backend`, and by others where it fails: uncompiled, then `FALLBACKS`."""
    eager = replace(options, compile=False)
    ways = [Way(backend, options)]
    if options.compile and backend in LAYERWISE:
        ways.append(Way(backend, eager))
    after = FALLBACKS[FALLBACKS.index(backend) + 1 :] if backend in FALLBACKS else FALLBACKS
    on_cpu = all(parameter.device.type == "cpu" for parameter in module.parameters())
    ways += [Way(name, eager) for name in after if (on_cpu or name != "torch") and _usable(name)]
    return tuple(ways)


def computed_by(module: nn.Module) -> str | None:
    """Return the backend that has computed the last call of a denoiser which chooses by itself or falls back;
    None for any other.
    """
    executor = getattr(module, "tfmq_executor", None)
    if not isinstance(executor, AutoExecutor | FallbackExecutor) or executor.prepared.current is None:
        return None
    return executor.prepared.current.backend


def computed_alone(module: nn.Module, backend: str) -> str:
    """Return what computes a layer of a denoiser that `backend` runs, where the layer is called by itself:
    the backend, or "simulated" where it has compiled the whole and its layers have no kernels.
    """
    kernels = any(layer.kernel is not None for layer in packed_layers(module).values())
    return backend if kernels else "simulated"


def quantized_modules(target: Any) -> tuple[nn.Module, ...]:
    """Return what is quantized of a pipeline or of a module: denoisers, decoders, encoders.

    Raises:
        ValueError: there is none.
    """
    parts = target.components.values() if hasattr(target, "components") else (target,)
    found = tuple(
        network for part in parts if isinstance(part, nn.Module) for network in networks_of(part).values()
    )
    if not found:
        raise ValueError(f"{type(target).__name__} holds no model quantized by tfmq")
    return found


def _check_values(module: nn.Module) -> None:
    """Raise `ValueError` for a NaN among the model's own values, which integers would hide."""
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point() and bool(tensor.isnan().any()):
            raise ValueError(
                f"{name} holds NaN: the model is damaged, and integer arithmetic "
                "would turn that into plausible numbers"
            )


def _attach(module: nn.Module, backend: str, options: Options) -> Coverage:
    """Make a denoiser compute by `backend`, or by what comes after it where its engine fails, now or at a
    call; undone if nothing can be prepared.
    """
    if backend == AUTO:
        module.tfmq_executor = AutoExecutor(options)  # type: ignore[assignment]
        return Coverage(
            integer=(),
            floating=dict.fromkeys(packed_layers(module), "what computes it is measured at the first call"),
        )
    order, prepared = _order(module, backend, options), Prepared()
    for way, following in zip(order, (*order[1:], None), strict=True):
        try:
            coverage = prepared.use(module, way)
        except EngineError as error:
            if following is None:
                raise
            complain(way, error, following, stacklevel=3)
            continue
        break
    assert coverage is not None
    if prepared.graphs:
        module.tfmq_executor = FallbackExecutor(order[order.index(way) :], prepared)  # type: ignore[assignment]
    return coverage


def execute(target: Any, backend: str = AUTO, *, options: Options | None = None) -> Coverage:
    """Make a quantized pipeline or denoiser compute by `backend` from now on, in place.

    The pipeline stays what it is: schedulers, guidance, saving. Only the arithmetic of what is quantized
    changes, each denoiser, decoder or encoder by itself, within the bounds that docs/performance.md states.

    "auto" measures at the first call, and at the first of another batch: some calls of each backend that is
    installed, and of the dequantized model in floating point ("float"), which is nearer to full precision
    than the integers are. What is fastest then computes such calls; it is kept in the user's cache, and said
    in one line by the logger `tfmq` at the level INFO. Where an engine fails, the next one computes, with a
    warning.

    Args:
        target: a pipeline with a quantized component, or a quantized module.
        backend: "auto", "float", "simulated", "reference", "operators", "torch", "openvino" or "cuda".
        options: memory and compilation; see `Options`.

    Returns:
        Which layers compute in integers; none is known to while "auto" has not measured.

    Raises:
        ValueError: no such backend, nothing quantized, the machine lacks what it needs, or the model holds
            NaN.
        MissingExtraError: the backend's library is not installed.
    """
    _check_name(backend)
    covered: dict[str, str | None] = {}
    for module in quantized_modules(target):
        _check_values(module)
        release(module)
        with ExitStack() as undo:
            undo.callback(release, module)
            coverage = _attach(module, backend, options or Options())
            undo.pop_all()
        give_back()
        covered |= dict.fromkeys(coverage.integer, None) | dict(coverage.floating)
    integer = tuple(name for name, reason in covered.items() if reason is None)
    return Coverage(
        integer=integer, floating={name: reason for name, reason in covered.items() if reason is not None}
    )
