"""The temporal features of a denoiser's calls: rows of the tables, or what the layers behind them compute."""

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tfmq.backends.kept import used
from tfmq.export.capture import Call, Graph
from tfmq.models.program import TIMESTEP, Program, per_sample
from tfmq.models.trace import program_of
from tfmq.nn.swap import steps_of
from tfmq.nn.temporal import cached_features, tabulated
from tfmq.quantizers.steps import StepContext

# Kinds of call whose programs are kept. A program holds no weights.
KEPT_PROGRAMS = 16
# Number of timesteps outside of the tables whose features are kept, one float32 row each: more than pictures
# in few steps need.
KEPT_ROWS = 128


class TemporalFeatures:
    """The temporal features that a denoiser has tables for, at any timestep.

    At timesteps that the tables know they are a look-up. At any other the layers behind the tables compute
    them, apart from the rest of the model, as the traced program of one call says. What they computed is
    kept, since the next picture asks again.
    """

    def __init__(self, module: nn.Module) -> None:
        cached = cached_features(module)
        self.widths = {name: child.width for name, child in cached.items()}
        timesteps = steps_of(module).timesteps
        with torch.no_grad():
            self.table = tabulated(module, torch.arange(len(timesteps), device=timesteps.device))
            # True at the timesteps where every feature comes from its table.
            self.chosen = torch.stack([child.use_table.bool() for child in cached.values()]).all(dim=0)
        self.everywhere = all(child.everywhere for child in cached.values())
        self.programs: OrderedDict[tuple[str, int], Program] = OrderedDict()
        self.rows: OrderedDict[tuple[str, float], Tensor] = OrderedDict()

    def of(self, module: nn.Module, call: Call) -> Tensor:
        """Return the features of a call whose bins are set, float32 `[B, D]`."""
        steps: StepContext = steps_of(module)
        index = steps.index
        if steps.all_exact and (self.everywhere or bool(self.chosen.to(index.device)[index].all())):
            self.table = self.table.to(index.device)
            return self.table[index].expand(call.batch, -1)
        assert call.signature.timestep is not None, "a model without timesteps has no tables"
        timesteps = call.tensors[call.signature.timestep][: len(index)]
        rows = [
            used(
                self.rows,
                (call.signature.key, timestep),
                partial(self._computed, module, call, place),
                most=KEPT_ROWS,
            )
            for place, timestep in enumerate(timesteps.tolist())
        ]
        return torch.cat(rows).expand(call.batch, -1)

    def _computed(self, module: nn.Module, call: Call, place: int) -> Tensor:
        """Return the features at the timestep of one sample, `[1, D]`."""
        steps = steps_of(module)
        program = used(
            self.programs,
            (call.signature.key, call.batch),
            lambda: _program(module, call, list(self.widths)),
            most=KEPT_PROGRAMS,
        )
        given = dict(_labelled(call))
        one = slice(place, place + 1)
        given[TIMESTEP] = given[TIMESTEP][one].expand(call.batch)
        with torch.no_grad(), steps.at_bins(steps.index[one], steps.exact[one]):
            outputs = program.run(module, given, program.outputs)
        # A layer that this kind of call leaves out is not read either.
        parts = [
            per_sample(outputs[name], call.batch)[:1].float()
            if name in outputs
            else torch.zeros(1, width, device=steps.index.device)
            for name, width in self.widths.items()
        ]
        return torch.cat(parts, dim=1)


def _program(module: nn.Module, call: Call, names: Sequence[str]) -> Program:
    """Return the program of the temporal layers `names` in calls like this one."""
    graph, bins = Graph(module, call.signature), steps_of(module).index

    def run(tensors: Sequence[Tensor]) -> Any:
        return graph.output(bins, tensors)

    return program_of(module, _labelled(call), run, names)


def _labelled(call: Call) -> list[tuple[str, Tensor]]:
    """Return the tensors of a call with the name of what each carries: `sample` for that which has the
    batch, `timestep`, or where in the arguments it is.
    """
    sample = next(place for place, tensor in enumerate(call.tensors) if tensor.ndim > 1)
    own = {sample: "sample", call.signature.timestep: TIMESTEP}
    return [
        (own.get(place, f"{name} of the call"), tensor)
        for place, (name, tensor) in enumerate(zip(call.signature.names, call.tensors, strict=True))
    ]
