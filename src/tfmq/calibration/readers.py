"""Find which units read the output of which, and which run exactly once in a call. Outputs of the latter can
be kept instead of computed.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tfmq.models.denoiser import Denoiser, Inputs
from tfmq.nn.submodules import named
from tfmq.nn.watch import ModuleCall, all_watched
from tfmq.numerics.trees import map_tensors, tensors_in


class _Origins(TorchDispatchMode):
    """Follows the outputs of units through every operation to the inputs of others, cut at every unit.

    Whatever is computed from an output holds it, integers too, which no gradient follows. Views are one with
    what they are views of, so that what is written into a part is read with the whole.
    """

    def __init__(self) -> None:
        super().__init__()
        # Keep the memory: the number of what is freed could be given to another.
        self._held: dict[int, tuple[Any, set[str]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        read = self.of((args, kwargs))
        if read:
            self._hold((output, (args, kwargs) if func._schema.is_mutable else None), read)
        return output

    def _hold(self, tree: Any, names: set[str]) -> None:
        for tensor in tensors_in(tree):
            storage = tensor.untyped_storage()
            _, held = self._held.setdefault(storage._cdata, (storage, set()))
            held |= names

    def cut(self, name: str, output: Any) -> Any:
        """Return the output as the beginning of what is followed."""

        def begin(leaf: Tensor) -> Tensor:
            # What leaves torch, where nothing is followed, fails on a tensor that asks for its gradient.
            copy = leaf.detach().requires_grad_(leaf.is_floating_point()).clone()
            self._held.pop(copy.untyped_storage()._cdata, None)
            self._hold(copy, {name})
            return copy

        return map_tensors(begin, output)

    def of(self, tree: Any) -> set[str]:
        """Return the units whose outputs the tensors of `tree` are made from."""
        nothing: tuple[Any, set[str]] = None, set()
        return set().union(
            *(self._held.get(tensor.untyped_storage()._cdata, nothing)[1] for tensor in tensors_in(tree))
        )


def find_readers(denoiser: Denoiser, units: Sequence[str], example: Inputs) -> dict[str, set[str]]:
    """Return for each of `units`, in the order of their calls, the units that read its output other than
    through a unit between.

    One call of the denoiser in full precision, for the first sample of `example`. A denoiser whose
    computation leaves torch gives an empty result.
    """
    origins = _Origins()
    readers: dict[str, set[str]] = {name: set() for name in units}

    def before(call: ModuleCall) -> None:
        for source in origins.of((call.args, call.kwargs)):
            readers[source].add(call.name)

    def after(call: ModuleCall) -> Any:
        return origins.cut(call.name, call.output)

    modules = named(denoiser.module, units)
    with all_watched(modules, before=before, after=after), torch.enable_grad(), origins:
        try:
            denoiser(example.rows(0, 1))
        except RuntimeError:
            # Something in this model cannot be followed, so nothing is known of its readers.
            return {}
    return readers


@torch.no_grad()
def called_once(denoiser: Denoiser, units: Sequence[str], example: Inputs) -> set[str]:
    """Return those of `units` that one call of the denoiser calls once; one call for the first sample of
    `example`.
    """
    counts = Counter[str]()
    with all_watched(named(denoiser.module, units), before=lambda call: counts.update([call.name])):
        denoiser(example.rows(0, 1))
    return {name for name, count in counts.items() if count == 1}
