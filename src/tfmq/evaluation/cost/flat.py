"""A denoiser as a function of tensors alone, which converters and exporters can trace."""

from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from tfmq.models.denoiser import Denoiser, Inputs, first_tensor
from tfmq.numerics.trees import tensors_in


def flat_tensors(inputs: Inputs) -> tuple[Tensor, ...]:
    """Return the tensors of a call in a fixed order: sample, timestep, conditions. The timestep is float32,
    which every converter takes.
    """
    return inputs.sample, inputs.timestep.float(), *tensors_in(dict(inputs.conditions))


class Flat(nn.Module):
    """`denoiser` on the tensors of `flat_tensors`; values of `example` that are no tensors are constants."""

    def __init__(self, denoiser: Denoiser, example: Inputs) -> None:
        super().__init__()
        self.module = denoiser.module
        self.names = denoiser.sample, denoiser.timestep
        self.leaves, self.shape = tree_flatten(dict(example.conditions))

    def forward(self, *tensors: Tensor) -> Tensor:
        """Return the denoiser's output for the tensors of a call."""
        sample, timestep, *rest = tensors
        given = iter(rest)
        leaves: list[Any] = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        conditions = tree_unflatten(leaves, self.shape)
        return first_tensor(self.module(**{self.names[0]: sample, self.names[1]: timestep, **conditions}))
