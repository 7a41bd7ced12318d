"""Adapt a quantized model, in place, without calibrating again: to another schedule, to a LoRA."""

import warnings
from dataclasses import asdict
from typing import Any

from tfmq.artifact import remark
from tfmq.backends.backend import release
from tfmq.calibration.drift import LayerDrift, complaint
from tfmq.models.sampler import Sampler
from tfmq.nn.swap import adapted, is_quantized, steps_of
from tfmq.targets import open_sampler
from tfmq.temporal.block import TemporalBlock
from tfmq.temporal.rebake import rebake_tables, visited


def _pair(target: Any, reference: Any, *, verb: str) -> tuple[Sampler, Sampler]:
    """Return samplers of a quantized model, which computes in simulated arithmetic from now on, and of its
    full-precision reference.
    """
    sampler, full = open_sampler(target), open_sampler(reference)
    if not is_quantized(sampler.denoiser.module) or is_quantized(full.denoiser.module):
        raise ValueError(f"{verb} takes a quantized model and the full-precision model that it was made from")
    release(sampler.denoiser.module)
    return sampler, full


def rebake(target: Any, reference: Any, *, steps: int) -> None:
    """Move a quantized model, in place, to the schedule that its sampler now steps through: another
    scheduler, another number of steps.

    One image is drawn to see the timesteps. Temporal features are tabulated anew from the full-precision
    reference; the grids of all other activations follow the nearest calibrated timestep, so a schedule far
    from the calibrated one is better quantized again. Save the pipeline afterwards as any other. Call
    `tfmq.execute` again where a backend was chosen.

    Args:
        target: a quantized pipeline with the scheduler to move to, or a `Sampler` of a quantized model.
        reference: the full-precision model that it was made from, as `quantize` takes it.
        steps: denoising steps to sample with from now on.

    Raises:
        ValueError: the target is not quantized, or the reference is another model.
    """
    sampler, full = _pair(target, reference, verb="rebake")
    module = sampler.denoiser.module
    rebake_tables(module, TemporalBlock(full.denoiser, full.example()), visited(sampler, steps))
    remark(module, rebaked={"steps": steps})


def fuse_lora(
    target: Any, reference: Any = None, *, scale: float = 1.0, steps: int | None = None
) -> tuple[LayerDrift, ...]:
    """Fuse a LoRA into a quantized model without calibrating again: the one that it carries beside its layers
    itself, or that of the full-precision model that it was made from.

    Without a `reference` the adapters of the quantized model (`pipeline.load_lora_weights`) become part of
    the branches beside its layers, which is exact, and is saved with it. Codes and tables stay.

    With one, the layers that its LoRA changes are rounded to nearest; activation ranges stay, so this
    measures how far the LoRA leaves them and warns where it does. Both models are changed in place, and the
    full-precision one ends with the LoRA fused. Call `tfmq.execute` again afterwards.

    Args:
        target: a quantized pipeline, or a `Sampler` of a quantized model.
        reference: the full-precision model that it was made from, with the LoRA loaded
            (`pipeline.load_lora_weights`) and not fused.
        scale: factor on the LoRA's weights.
        steps: number of steps of the two images that ranges are measured on; by default one for each
            calibrated timestep.

    Returns:
        The layers whose inputs leave their range, the furthest first.

    Raises:
        ValueError: the target is not quantized, there is no LoRA, or the reference is another model.
    """
    if reference is None:
        return _fuse_beside(target, scale)
    from tfmq.integrations.diffusers.adapters import fuse_adapters

    sampler, full = _pair(target, reference, verb="fuse_lora")
    module = sampler.denoiser.module
    found = fuse_adapters(module, full, steps=steps or len(steps_of(module).timesteps), scale=scale)
    remark(module, lora={"scale": scale, "drift": [asdict(entry) for entry in found]})
    if text := complaint(found):
        warnings.warn(f"the LoRA {text}; for full quality quantize the fused pipeline again", stacklevel=2)
    return found


def _fuse_beside(target: Any, scale: float) -> tuple[LayerDrift, ...]:
    """Make the adapters of a quantized model part of its branches."""
    module: Any = open_sampler(target).denoiser.module
    if not is_quantized(module) or not adapted(module):
        raise ValueError(f"{type(module).__name__} is no quantized model with a LoRA beside its layers")
    module.fuse_lora(lora_scale=scale)
    module.unload_lora()
    remark(module, lora={"scale": scale})
    return ()
