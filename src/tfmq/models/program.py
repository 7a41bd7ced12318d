"""What tracing a denoiser call gives: the layers with what they depend on, and the temporal computation as a
program.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

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
    with channels on the last axis.
    """

    name: str
    depends_on: frozenset[str]
    temporal: bool
    segments: tuple[int, ...] = ()
    tokenwise: bool = False
    direct: bool = False

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
class Trace:
    """What one traced call says about a denoiser.

    `layers` in execution order; `features` the temporal layers whose output meets something other than the
    timestep; `products` the number of attention product sites by owner; `calls` the recorded timestep-only
    program with `outputs` into it, for a batch of `batch`; `embeddings` the names of look-ups whose tables
    have a quantized form.
    """

    layers: tuple[LayerTrace, ...]
    features: tuple[str, ...]
    products: Mapping[str, int]
    calls: tuple[Call, ...]
    outputs: Mapping[str, Ref]
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
