"""Put quantized modules in the place of stock ones, and choose for a while what they compute with."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tfmq.errors import shown
from tfmq.nn.correction import corrected
from tfmq.nn.poison import poisoned
from tfmq.nn.subclass import mix_in
from tfmq.nn.submodules import submodules
from tfmq.quantizers.part import Part, Precision
from tfmq.quantizers.steps import StepContext

STEPS = "tfmq_steps"
TIMESTEP = "tfmq_timestep"


def replace_module(root: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` where `root` has the submodule `name`; it takes over the training mode."""
    parent, _, attribute = name.rpartition(".")
    new.train(root.get_submodule(name).training)
    setattr(root.get_submodule(parent), attribute, new)


class Executor(Protocol):
    """Computes a call of the denoiser `module` by other means; the step context holds the bins of the call.

    `arguments` are those of the call by name. The result is what `module.forward` would return.
    """

    def __call__(self, module: nn.Module, arguments: Mapping[str, Any]) -> Any: ...


class _Stepped:
    """Mixed into the class of a denoiser: its `forward` sets the step context from its own timestep
    argument.
    """

    tfmq_steps: StepContext
    tfmq_timestep: str | None
    tfmq_executor: Executor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Look up the timestep of a call and compute it; a sample with NaN comes out as NaN."""
        bound = self.tfmq_signature.bind(*args, **kwargs)  # type: ignore[attr-defined]
        with entered_steps(self, bound.arguments):  # type: ignore[arg-type]
            run: Executor = self.tfmq_executor or plain_forward
            output = run(self, bound.arguments)  # type: ignore[arg-type]
        return poisoned(output, bound.arguments)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Move the denoiser. A `dtype` that it has already is left out: diffusers refuses to cast quantized
        models, and its loaders ask for that.
        """
        if {kwargs.get("dtype")} == {parameter.dtype for parameter in self.parameters()}:  # type: ignore[attr-defined]
            del kwargs["dtype"]
        return super().to(*args, **kwargs)  # type: ignore[misc]


def attach_steps(module: nn.Module, steps: StepContext, *, timestep: str | None) -> None:
    """Make every call of `module` set `steps` from its argument named `timestep`, or to the first bin where
    it has none; its class becomes a subclass of itself.

    Raises:
        ValueError: its `forward` has no such argument.
    """
    signature = inspect.signature(module.forward)
    if timestep is not None and timestep not in signature.parameters:
        raise ValueError(f"{type(module).__name__} has no argument {shown(timestep)} for the timestep")
    mix_in(module, _Stepped, {"tfmq_signature": signature})
    setattr(module, TIMESTEP, timestep)
    setattr(module, STEPS, steps)


def is_quantized(module: nn.Module) -> bool:
    """Whether `module` is a denoiser that has been quantized, or is being quantized."""
    return hasattr(module, STEPS)


def networks_of(component: nn.Module) -> dict[str, nn.Module]:
    """Return what has been quantized of a component of a pipeline, by name: itself, called "", or submodules
    such as the decoder of an autoencoder. Each computes its own calls.
    """
    owners = (name.rpartition(".")[0] for name in submodules(component, StepContext))
    return {name: component.get_submodule(name) for name in owners}


def context_of(contexts: Mapping[str, StepContext], name: str) -> StepContext:
    """Return the step context, of those of some networks by name, of the network that has the module `name`.

    Raises:
        ValueError: none of them has it.
    """
    for network, steps in contexts.items():
        if not network or f"{name}.".startswith(f"{network}."):
            return steps
    raise ValueError(f"the checkpoint names {name}, which is part of none of its networks")


def steps_of(module: nn.Module) -> StepContext:
    """Return the step context of a quantized denoiser."""
    steps: StepContext = getattr(module, STEPS)
    return steps


def timestep_of(module: nn.Module, arguments: Mapping[str, Any]) -> Tensor | None:
    """Return the timesteps of a call of a quantized denoiser; None where it takes none."""
    name: str | None = getattr(module, TIMESTEP)
    return None if name is None else torch.as_tensor(arguments[name])


def entered_steps(module: nn.Module, arguments: Mapping[str, Any]) -> AbstractContextManager[None]:
    """Return the context in which a call of a quantized denoiser computes: the bins of its timesteps are
    set.
    """
    timestep = timestep_of(module, arguments)
    return steps_of(module).first() if timestep is None else steps_of(module).at(timestep)


def plain_forward(module: nn.Module, arguments: Mapping[str, Any]) -> Any:
    """Call the forward of a denoiser's own class and correct what it predicts: whoever calls it has set the
    step context.
    """
    bound = module.tfmq_signature.bind_partial()  # type: ignore[operator, union-attr]
    bound.arguments.update(arguments)
    kind = next(kind for kind in type(module).__mro__ if not issubclass(kind, _Stepped))
    return corrected(module, kind.forward(module, *bound.args, **bound.kwargs))  # type: ignore[attr-defined]


@contextmanager
def precision(
    module: nn.Module, *, weights: Precision | None = None, inputs: Precision | None = None
) -> Iterator[None]:
    """Let all that is calibrated below `module` compute with full or quantized weights and inputs for a
    while; None leaves it as it is.
    """
    with ExitStack() as stack:
        for child in parts_of(module):
            stack.callback(child.choose(weights=weights, inputs=inputs))
        yield


def release_parts(module: nn.Module) -> None:
    """Let a denoiser compute in simulated arithmetic again."""
    module.tfmq_executor = None  # type: ignore[assignment]
    for child in parts_of(module):
        child.execute(None)


def adapted(module: nn.Module) -> bool:
    """Whether peft has put adapters beside the layers of a denoiser."""
    return bool(getattr(module, "peft_config", None))


def parts_of(module: nn.Module) -> Iterator[Part]:
    """Yield what quantization has put into `module`."""
    yield from submodules(module, Part).values()
