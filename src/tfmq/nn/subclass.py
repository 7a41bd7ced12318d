"""Give a module a subclass of its own class, into which something is mixed."""

from collections.abc import Mapping
from functools import wraps
from typing import Any

from torch import nn

# The subclasses that were made, by what is mixed in and the class below: modules of one class share one.
_MIXED: dict[tuple[type, type[nn.Module]], type[nn.Module]] = {}


def mix_in(module: nn.Module, mixin: type, members: Mapping[str, Any] | None = None) -> None:
    """Let `module` compute by the `forward` of `mixin`, in place.

    The module's class becomes a subclass of itself of the same name, so that `isinstance` and methods stay,
    and so does the signature of its `forward`, by which pipelines look up the arguments of a denoiser.

    Args:
        module: keeps its tensors and attributes.
        mixin: a class with a `forward`.
        members: attributes of the subclass beside these, taken from the first module of a class.
    """
    kind = type(module)
    if (mixin, kind) not in _MIXED:

        @wraps(kind.forward)
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            return mixin.forward(self, *args, **kwargs)  # type: ignore[attr-defined]

        attributes = {"__module__": kind.__module__, **(members or {}), "forward": forward}
        _MIXED[mixin, kind] = type(kind.__name__, (mixin, kind), attributes)
    module.__class__ = _MIXED[mixin, kind]
