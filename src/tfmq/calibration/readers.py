"""Find which units read the output of which, and which run exactly once in a call. Outputs of the latter can
be kept instead of computed.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from tfmq.models.denoiser import Denoiser, Inputs
from tfmq.numerics.trees import map_tensors, tensors_in


def _floating(tree: Any) -> Iterator[Tensor]:
    return (tensor for tensor in tensors_in(tree) if tensor.is_floating_point())


class _Origins:
    """Follows outputs of units to the inputs of others along the graph that autograd records, which is cut at
    every unit.
    """

    def __init__(self) -> None:
        # Keep the variables: the number of a freed one could be given to another.
        self.made: dict[int, tuple[str, Tensor]] = {}

    def cut(self, name: str, output: Any) -> Any:
        """Return the output as the beginning of new graphs."""

        def begin(leaf: Tensor) -> Tensor:
            if not leaf.is_floating_point():
                return leaf
            variable = leaf.detach().requires_grad_()
            self.made[id(variable)] = name, variable
            # Return a copy, which the caller may write to.
            return variable.clone()

        return map_tensors(begin, output)

    def of(self, tree: Any) -> set[str]:
        """Return the units whose outputs the tensors of `tree` are made from."""
        found, seen, waiting = set(), set(), [tensor.grad_fn for tensor in _floating(tree)]
        while waiting:
            node = waiting.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            variable = getattr(node, "variable", None)
            if variable is not None and id(variable) in self.made:
                found.add(self.made[id(variable)][0])
            waiting += [following for following, _ in node.next_functions]
        return found


def find_readers(denoiser: Denoiser, units: Sequence[str], example: Inputs) -> dict[str, set[str]]:
    """Return for each of `units`, in the order of their calls, the units that read its output other than
    through a unit between.

    One call of the denoiser in full precision, for the first sample of `example`. A unit that reads something
    in a way that no gradient follows is not seen to read it. A denoiser that cannot be differentiated at all
    gives an empty result.
    """
    origins = _Origins()
    readers: dict[str, set[str]] = {name: set() for name in units}

    def before(name: str) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            for source in origins.of((args, kwargs)):
                readers[source].add(name)

        return hook

    def after(name: str) -> Any:
        return lambda _, __, output: origins.cut(name, output)

    with ExitStack() as stack, torch.enable_grad():
        for name in units:
            module = denoiser.module.get_submodule(name)
            stack.callback(module.register_forward_pre_hook(before(name), with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(after(name)).remove)
        try:
            denoiser(example.rows(0, 1))
        except RuntimeError:
            # Autograd refuses something in this model, so nothing is known of its readers.
            return {}
    return readers


@torch.no_grad()
def called_once(denoiser: Denoiser, units: Sequence[str], example: Inputs) -> set[str]:
    """Return those of `units` that one call of the denoiser calls once; one call for the first sample of
    `example`.
    """
    counts = dict.fromkeys(units, 0)
    with ExitStack() as stack:
        for name in units:
            count = lambda *_, name=name: counts.update({name: counts[name] + 1})  # noqa: E731 - bound to its unit
            stack.callback(denoiser.module.get_submodule(name).register_forward_pre_hook(count).remove)
        denoiser(example.rows(0, 1))
    return {name for name, count in counts.items() if count == 1}
