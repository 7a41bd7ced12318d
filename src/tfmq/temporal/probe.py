"""Check by behaviour what the trace says by structure."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tfmq.models.denoiser import Denoiser, Inputs
from tfmq.models.program import LayerTrace
from tfmq.nn.submodules import named
from tfmq.nn.watch import ModuleCall, all_watched
from tfmq.temporal.block import TemporalBlock

# Largest relative difference at which an output counts as unmoved.
TOLERANCE = 1e-4


class ProbeError(RuntimeError):
    """The model does not behave as its traced computation says."""


@contextmanager
def layer_outputs(module: nn.Module, names: list[str]) -> Iterator[dict[str, Tensor]]:
    """Collect the outputs of the submodules `names` while the context is open; a later call overwrites an
    earlier one.
    """
    outputs: dict[str, Tensor] = {}

    def keep(call: ModuleCall) -> None:
        outputs[call.name] = call.output.detach()

    with all_watched(named(module, names), after=keep):
        yield outputs


def _moved(left: Tensor, right: Tensor) -> bool:
    # A NaN counts as unmoved here; calibration names the layer that makes it.
    largest = float(left.nan_to_num(0.0, 0.0, 0.0).abs().max())
    return not torch.allclose(left, right, rtol=TOLERANCE, atol=TOLERANCE * largest + 1e-12, equal_nan=True)


@torch.no_grad()
def probe(denoiser: Denoiser, example: Inputs, *, batch: int = 32) -> TemporalBlock:
    """Return the temporal block of `denoiser`, checked on real calls: same sample at another timestep,
    another sample at the same timestep.

    Raises:
        ProbeError: a temporal layer moves with the sample; its replay differs from the model; or a layer
            moves with the timestep alone but the trace lost its dependence (a timestep read as a Python
            number).
    """
    block = TemporalBlock(denoiser, example, batch=batch)
    if denoiser.timestep is None:
        # Nothing depends on one: neither the trace nor a call can say otherwise.
        return block
    base = example.resized(2)
    early = torch.full_like(base.timestep, 17)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(base.sample.shape, generator=generator).to(base.sample)
    calls = {
        "base": Inputs(base.sample, early, base.conditions),
        "sample": Inputs(base.sample + noise, early, base.conditions),
        "timestep": Inputs(base.sample, early + 400, base.conditions),
    }
    names = [layer.name for layer in block.trace.layers]
    seen: dict[str, dict[str, Tensor]] = {}
    for key, inputs in calls.items():
        with layer_outputs(denoiser.module, names) as outputs:
            denoiser(inputs)
        seen[key] = dict(outputs)
    for layer in block.trace.layers:
        moved = {
            key: _moved(seen["base"][layer.name], seen[key][layer.name]) for key in ("sample", "timestep")
        }
        _check_dependence(layer, with_sample=moved["sample"], with_timestep=moved["timestep"])
    _check_replay(block, early + 400, seen["timestep"])
    return block


def _check_dependence(layer: LayerTrace, *, with_sample: bool, with_timestep: bool) -> None:
    """Refuse a layer that does not move with what it was traced to depend on."""
    if layer.temporal and with_sample:
        raise ProbeError(
            f"{layer.name} was traced as independent of the sample, but its output changes with it"
        )
    if with_timestep and not with_sample and not layer.temporal and "timestep" not in layer.depends_on:
        raise ProbeError(
            f"{layer.name} changes with the timestep, but the model reads the "
            "timestep as a Python number there; keep it a tensor"
        )


def _check_replay(block: TemporalBlock, timesteps: Tensor, seen: Mapping[str, Tensor]) -> None:
    """Refuse a block that does not give the outputs that were `seen` at `timesteps`."""
    temporal = [layer.name for layer in block.trace.temporal]
    replayed = block.run(block.at(timesteps), temporal)
    for name in temporal:
        output = seen[name]
        # The frames of a video share one row for each sample.
        if _moved(output, replayed[name][:2].repeat_interleave(len(output) // 2, dim=0)):
            raise ProbeError(f"the traced computation of {name} does not give what the model computes")
