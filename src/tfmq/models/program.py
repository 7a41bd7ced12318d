"""What tracing a denoiser call gives: the layers with what they depend on, and the temporal computation as a
program.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from tfmq.numerics.trees import tensors_in

TIMESTEP = "timestep"


@dataclass(frozen=True)
class Segments:
    """The widths of concatenated sources along `axis`; `direct` as long as nothing was computed from them."""

    widths: tuple[int, ...]
    axis: int
    direct: bool = True


@dataclass(frozen=True)
class LayerTrace:
    """A layer with a quantized form: what its output depends on, whether that makes it temporal, and the
    widths of a concatenation that it reads.

    `direct` says that what it reads is the concatenated tensor itself, copied, viewed or enlarged at most,
    and not computed from it. `tokenwise` says that the layer computes each token by itself: a linear layer,
    with channels on the last axis. `channels` are those that it reads.
    """

    name: str
    depends_on: frozenset[str]
    temporal: bool
    segments: tuple[int, ...] = ()
    tokenwise: bool = False
    direct: bool = False
    channels: int = 0

    @property
    def cacheable(self) -> bool:
        """Whether the output takes one value per timestep, so that a table can hold all of them."""
        return self.depends_on == {TIMESTEP}


@dataclass(frozen=True)
class Ref:
    """A tensor made earlier in a program: output `leaf` of call `call`, or the input `name`."""

    call: int
    leaf: int = 0
    name: str = ""


@dataclass(frozen=True)
class Call:
    """One recorded operation, or the call of the submodule `module`; tensors among its arguments are `Ref`s
    or constants.
    """

    function: Callable[..., Any] | None
    module: str
    args: Any
    kwargs: Any


@dataclass(frozen=True)
class Program:
    """Recorded calls that read no sample, and `outputs`: where those of some submodules leave them."""

    calls: tuple[Call, ...]
    outputs: Mapping[str, Ref]

    def run(self, module: nn.Module, given: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
        """Return the outputs of the submodules `names`, computed from the inputs `given` by name with the
        submodules that `module` has now; differentiable.
        """
        outputs: list[list[Tensor]] = []

        def resolve(value: Any) -> Any:
            if not isinstance(value, Ref):
                return value
            return given[value.name] if value.call < 0 else outputs[value.call][value.leaf]

        for call in self.calls:
            function = call.function or module.get_submodule(call.module)
            result = function(*tree_map(resolve, call.args), **tree_map(resolve, call.kwargs))
            outputs.append(tensors_in(result))
        return {name: resolve(self.outputs[name]) for name in names}


@dataclass(frozen=True)
class Trace:
    """What one traced call says about a denoiser.

    `layers` in execution order; `features` the temporal layers whose output meets something other than the
    timestep; `products` the number of attention product sites by owner; `program` what the temporal layers
    put out, for a batch of `batch`; `embeddings` the names of look-ups whose tables have a quantized form.
    """

    layers: tuple[LayerTrace, ...]
    features: tuple[str, ...]
    products: Mapping[str, int]
    program: Program
    batch: int
    embeddings: tuple[str, ...] = ()

    def layer(self, name: str) -> LayerTrace:
        """Return the layer called `name`."""
        return next(layer for layer in self.layers if layer.name == name)

    @property
    def quantizable(self) -> frozenset[str]:
        """The names of all layers and embeddings that a recipe decides on."""
        return frozenset((*(layer.name for layer in self.layers), *self.embeddings))

    @property
    def temporal(self) -> tuple[LayerTrace, ...]:
        """The temporal layers, in execution order."""
        return tuple(layer for layer in self.layers if layer.temporal)


def per_sample(output: Tensor, batch: int) -> Tensor:
    """Return one row of a temporal layer's output for each of `batch` samples: a video model calls it with a
    row for each frame, and the frames of a sample stand at one timestep.
    """
    frames, rest = divmod(len(output), batch)
    return output if rest or output.ndim != 2 else output[::frames]


def _needed(calls: Sequence[Call | None], wanted: Mapping[str, Ref]) -> dict[int, Call]:
    """Return the calls, by number, that make what is `wanted`."""
    needed: dict[int, Call] = {}
    pending = [ref.call for ref in wanted.values()]
    while pending:
        index = pending.pop()
        if index in needed or index < 0:
            continue
        call = calls[index]
        if call is None:
            raise RuntimeError("a temporal computation reads a tensor made from the sample")
        needed[index] = call
        pending += [leaf.call for leaf in tree_leaves((call.args, call.kwargs)) if isinstance(leaf, Ref)]
    return needed


def sliced(calls: Sequence[Call | None], wanted: Mapping[str, Ref]) -> Program:
    """Return the calls that `wanted` needs, renumbered, and where they leave it.

    Raises:
        RuntimeError: one of them depends on the sample.
    """
    needed = _needed(calls, wanted)
    order = {old: new for new, old in enumerate(sorted(needed))}

    def renumber(value: Any) -> Any:
        return Ref(order[value.call], value.leaf) if isinstance(value, Ref) and value.call >= 0 else value

    kept = (needed[index] for index in sorted(needed))
    program = tuple(
        Call(c.function, c.module, tree_map(renumber, c.args), tree_map(renumber, c.kwargs)) for c in kept
    )
    return Program(program, {name: renumber(ref) for name, ref in wanted.items()})
