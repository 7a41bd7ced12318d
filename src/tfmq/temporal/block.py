"""The temporal information block: `timestep -> (g_1(h(t)), ..., g_n(h(t)))` as a function apart from the
denoiser.
"""

from collections.abc import Mapping, Sequence
from copy import copy

import torch
from torch import Tensor, nn

from tfmq.models.denoiser import Denoiser, Inputs
from tfmq.models.program import TIMESTEP, Trace, per_sample
from tfmq.models.trace import trace


class TemporalBlock:
    """Replays the temporal part of a denoiser on its current layers, whatever has been swapped in for them.

    Args:
        denoiser: the model; its submodules are looked up by name at every call.
        example: one call of it; conditions that temporal features depend on are taken from here unless a call
            brings its own.
        batch: timesteps computed at once.
    """

    def __init__(self, denoiser: Denoiser, example: Inputs, *, batch: int = 32) -> None:
        self.denoiser = denoiser
        self.module = denoiser.module
        self.example = example.resized(batch)
        self.trace: Trace = trace(denoiser, example, batch=batch)

    @property
    def features(self) -> tuple[str, ...]:
        """Names of the layers whose outputs are the temporal features."""
        return self.trace.features

    @property
    def conditions(self) -> tuple[str, ...]:
        """Names of the inputs beside the timestep that temporal layers depend on: none, a class label, a
        pooled prompt.
        """
        return tuple(
            sorted(frozenset[str]().union(*(layer.depends_on for layer in self.trace.temporal)) - {TIMESTEP})
        )

    @property
    def cacheable(self) -> tuple[str, ...]:
        """The features that take one value per timestep."""
        return tuple(name for name in self.features if self.trace.layer(name).cacheable)

    def of(self, module: nn.Module) -> "TemporalBlock":
        """Return the same computation on the layers of another module with the same names, such as a
        quantized copy.
        """
        other = copy(self)
        other.module = module
        return other

    def run(self, inputs: Inputs, names: Sequence[str]) -> dict[str, Tensor]:
        """Return the outputs of the temporal layers `names` for a batch of exactly `trace.batch` inputs;
        differentiable.

        A layer that a video model calls with a row for each frame gives one row a sample here: its frames
        stand at one timestep.
        """
        outputs = self.trace.program.run(self.module, dict(self.denoiser.labelled(inputs)), names)
        return {name: per_sample(output, self.trace.batch) for name, output in outputs.items()}

    def at(self, timesteps: Tensor, conditions: Mapping[str, Tensor] | None = None) -> Inputs:
        """Return inputs for `timesteps` `[N <= batch]` and, by name, `conditions` `[N, ...]`, padded by
        repetition to the batch.
        """
        index = torch.arange(self.trace.batch) % len(timesteps)
        padded = timesteps[index].to(self.example.timestep.device)
        cast = padded.to(self.example.timestep.dtype)
        # Keep fractional timesteps: a scheduler may step between the integers of the example.
        timestep = cast if torch.equal(cast.to(padded.dtype), padded) else padded
        inputs = Inputs(self.example.sample, timestep, self.example.conditions)
        return self.denoiser.with_conditions(
            inputs,
            {
                name: value[index].to(self.example.timestep.device)
                for name, value in (conditions or {}).items()
            },
        )

    def __call__(self, timesteps: Tensor, names: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Return every cacheable feature (or the layers `names`) at `timesteps` `[N]`, each `[N, d]`.

        Raises:
            ValueError: a layer whose output is not one vector a timestep.
        """
        names = self.cacheable if names is None else names
        parts = [(chunk, self.run(self.at(chunk), names)) for chunk in timesteps.split(self.trace.batch)]
        for name, value in parts[0][1].items():
            if value.ndim != 2 or len(value) != self.trace.batch:
                raise ValueError(
                    f"{name} gives {tuple(value.shape)} for {self.trace.batch} timesteps; "
                    "a temporal feature is one vector a timestep"
                )
        return {name: torch.cat([values[name][: len(chunk)] for chunk, values in parts]) for name in names}
