"""The one view of a model that the algorithms have: `f(sample, timestep, **conditions)`."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from tfmq.numerics.trees import map_tensors, tensors_in

SAMPLE_NAMES = ("sample", "hidden_states", "x", "x_t", "noisy", "latents")
TIMESTEP_NAMES = ("timestep", "timesteps", "t", "time", "sigma")


@dataclass(frozen=True)
class Inputs:
    """One batched denoiser call: `sample` `[B, ...]`, `timestep` `[B]`, and the other arguments by name
    (tensors with `B` rows or values).

    Beside a video `[B, C, F, H, W]`, tokens `[B * F, N, C]` have a row for each frame, sample by sample
    (AnimateDiff's prompt).
    """

    sample: Tensor
    timestep: Tensor
    conditions: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.sample.shape[0]

    def map(self, function: Callable[[Tensor], Tensor]) -> "Inputs":
        """Apply `function` to every tensor."""
        return Inputs(
            function(self.sample),
            function(self.timestep),
            map_tensors(function, dict(self.conditions)),
        )

    def rows_each(self, tensor: Tensor) -> int:
        """Return how many rows of `tensor` belong to a sample; none where it has no batch axis."""
        if not tensor.ndim or tensor.shape[0] == len(self):
            return min(1, tensor.ndim)
        frames = self.sample.shape[2] if self.sample.ndim == 5 else 1
        return frames if tensor.ndim == 3 and tensor.shape[0] == len(self) * frames else 0

    def rows(self, start: int, stop: int) -> "Inputs":
        """Return the samples `start` to `stop`; condition tensors without a batch axis are kept whole."""

        def cut(tensor: Tensor) -> Tensor:
            each = self.rows_each(tensor)
            return tensor[start * each : stop * each] if each else tensor

        return self.map(cut)

    def picked(self, places: Tensor) -> "Inputs":
        """Return the samples at some `places` `[n]`; conditions without a batch axis are kept whole."""

        def pick(tensor: Tensor) -> Tensor:
            each = self.rows_each(tensor)
            if not each:
                return tensor
            return tensor.unflatten(0, (-1, each))[places.to(tensor.device)].flatten(0, 1)

        return self.map(pick)

    def resized(self, size: int) -> "Inputs":
        """Return `size` copies of the first sample."""
        first = self.rows(0, 1)
        return first.map(
            lambda tensor: (
                tensor.repeat(size, *[1] * (tensor.ndim - 1)) if first.rows_each(tensor) else tensor
            )
        )

    def chunks(self, size: int) -> Iterator["Inputs"]:
        """Yield the samples in batches of at most `size`."""
        for start in range(0, len(self), size):
            yield self.rows(start, min(start + size, len(self)))


def joined(parts: Sequence[Inputs]) -> list[Inputs]:
    """Return all samples of `parts` in few calls: those whose conditions are equal, but for what each sample
    has of its own, are one.
    """
    groups: list[list[Inputs]] = []
    for part in parts:
        group = next((group for group in groups if _alike(group[0], part)), None)
        if group is None:
            groups.append([part])
        else:
            group.append(part)
    return [group[0] if len(group) == 1 else _one(group) for group in groups]


def _alike(one: Inputs, other: Inputs) -> bool:
    """Whether the samples of two calls could be those of one."""
    leaves, specs = zip(
        *(tree_flatten((part.sample, dict(part.conditions))) for part in (one, other)), strict=True
    )
    if specs[0] != specs[1]:
        return False
    return all(_fit(mine, yours, one, other) for mine, yours in zip(*leaves, strict=True))


def _fit(value: Any, beside: Any, one: Inputs, other: Inputs) -> bool:
    if not (isinstance(value, Tensor) and isinstance(beside, Tensor)):
        return type(value) is type(beside) and bool(value == beside)
    if one.rows_each(value) and other.rows_each(beside):
        return value.shape[1:] == beside.shape[1:] and value.dtype == beside.dtype
    return torch.equal(value, beside)


def _one(group: Sequence[Inputs]) -> Inputs:
    """Return calls that are alike as one."""
    flat = [tree_flatten((part.sample, part.timestep, dict(part.conditions))) for part in group]
    columns = zip(*(leaves for leaves, _ in flat), strict=True)
    whole = [
        torch.cat(column) if isinstance(column[0], Tensor) and group[0].rows_each(column[0]) else column[0]
        for column in columns
    ]
    return Inputs(*tree_unflatten(whole, flat[0][1]))


def output_tensors(output: Any) -> tuple[Tensor, ...]:
    """Return every tensor of a module's output: a tensor, a tuple, or a diffusers output object."""
    leaves = tuple(tensors_in(output))
    if not leaves and hasattr(output, "values"):
        leaves = tuple(value for value in output.values() if isinstance(value, Tensor))
    if not leaves:
        raise TypeError(f"the denoiser returned {type(output).__name__}, in which there is no tensor")
    return leaves


def first_tensor(output: Any) -> Tensor:
    """Return the first tensor of a module's output."""
    return output_tensors(output)[0]


class Denoiser:
    """A module with names for its arguments; stock diffusers models need none.

    Args:
        module: any `nn.Module` whose `forward` takes a noisy sample and a timestep.
        sample: name of the sample argument; by default the first one that is called like one.
        timestep: name of the timestep argument; by default the first one that is called like one.

    Raises:
        TypeError: `forward` has no argument that could be the sample or the timestep; pass their names.
    """

    def __init__(self, module: nn.Module, *, sample: str | None = None, timestep: str | None = None) -> None:
        self.module = module
        self.signature = inspect.signature(module.forward)
        self.sample = sample or self._find(SAMPLE_NAMES, "sample")
        self.timestep: str | None = timestep or self._find(TIMESTEP_NAMES, "timestep")

    def _find(self, names: tuple[str, ...], role: str) -> str:
        for name in names:
            if name in self.signature.parameters:
                return name
        names_text = ", ".join(names)
        raise TypeError(
            f"{type(self.module).__name__}.forward{self.signature} has no "
            f"{role} argument called one of {names_text}; "
            f"name it: Denoiser(module, {role}=...)"
        )

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Inputs:
        """Return the arguments of a `forward` call as `Inputs`; a scalar timestep is repeated for each
        sample.
        """
        bound = dict(self.signature.bind(*args, **kwargs).arguments)
        for name, parameter in self.signature.parameters.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                bound.update(bound.pop(name, {}))
        sample = bound.pop(self.sample)
        # Without a timestep all calls stand at one and the same.
        given = 0.0 if self.timestep is None else bound.pop(self.timestep)
        timestep = torch.as_tensor(given, device=sample.device).flatten()
        if len(timestep) == 1:
            timestep = timestep.expand(sample.shape[0]).clone()
        conditions = {
            name: value for name, value in bound.items() if value is not None and name != "return_dict"
        }
        return Inputs(sample, timestep, conditions)

    def __call__(self, inputs: Inputs) -> Tensor:
        """Run the module on its device; the output `[B, ...]` is its first tensor."""
        device = next((parameter.device for parameter in self.module.parameters()), inputs.sample.device)
        if inputs.sample.device != device:
            inputs = inputs.map(lambda tensor: tensor.to(device))
        return first_tensor(self.module(**self.arguments(inputs)))

    def arguments(self, inputs: Inputs) -> dict[str, Any]:
        """Return the arguments of a `forward` call by name."""
        timestep = {} if self.timestep is None else {self.timestep: inputs.timestep}
        return {self.sample: inputs.sample, **timestep, **inputs.conditions}

    def labelled(self, inputs: Inputs) -> list[tuple[str, Tensor]]:
        """Return every input tensor with the name of what it carries: `sample`, `timestep`, or the innermost
        condition name.
        """
        pairs = [("sample", inputs.sample), ("timestep", inputs.timestep)]
        paths, _ = torch.utils._pytree.tree_flatten_with_path(dict(inputs.conditions))
        for path, leaf in paths:
            if isinstance(leaf, Tensor):
                pairs.append((_label(path), leaf))
        return pairs

    def with_conditions(self, inputs: Inputs, values: Mapping[str, Tensor]) -> Inputs:
        """Return `inputs` with the condition tensors that `labelled` calls by the names in `values` replaced
        by these.
        """

        def replaced(path: tuple[Any, ...], leaf: Any) -> Any:
            return values.get(_label(path), leaf) if isinstance(leaf, Tensor) else leaf

        return Inputs(
            inputs.sample,
            inputs.timestep,
            torch.utils._pytree.tree_map_with_path(replaced, dict(inputs.conditions)),
        )


class Timeless(Denoiser):
    """A network without a timestep, such as a decoder or a text encoder, as the algorithms see it: a denoiser
    all of whose calls stand at the timestep 0.

    Args:
        module: any `nn.Module`.
        sample: name of what it transforms, with the batch as first axis; by default its first argument.

    Raises:
        TypeError: `forward` has no argument.
    """

    def __init__(self, module: nn.Module, *, sample: str | None = None) -> None:
        self.module = module
        self.signature = inspect.signature(module.forward)
        first = next(iter(self.signature.parameters), None)
        if first is None:
            raise TypeError(f"{type(module).__name__}.forward has no argument")
        self.sample = sample or first
        self.timestep = None


def _label(path: tuple[Any, ...]) -> str:
    return [str(key.key) for key in path if isinstance(getattr(key, "key", None), str)][-1]
