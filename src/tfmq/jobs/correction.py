"""The correction of what a quantized model predicts, as a part of the job: both models draw a batch of images
from the same noise.
"""

from functools import partial

import torch
from torch import Tensor, nn

from tfmq.calibration.correction import NONE, Fitting, StepFit, recorded_predictions
from tfmq.jobs.job import Job, Work
from tfmq.jobs.judging import draw, exchanged
from tfmq.jobs.stage import Kept, Tensors
from tfmq.nn.correction import Correction, attach_correction
from tfmq.nn.operation import operation_of
from tfmq.nn.swap import steps_of
from tfmq.recipes.plan import last_layer


def correct(job: Job, work: Work, full: nn.Module) -> tuple[StepFit, ...]:
    """Fit the recipe's correction of the job's packed model and attach it.

    Args:
        job: its model has packed layers.
        work: what its stages have left.
        full: the model in full precision.

    Returns:
        What was found for each step; nothing where the recipe asks for no correction.
    """
    if not job.recipe.correction.estimators:
        return ()
    return Kept("correction", partial(_fitted, full), _attach)(job, work)


def _attach(job: Job, work: Work, found: Tensors) -> tuple[StepFit, ...]:
    """Attach the correction that was found; return what was kept of each step."""
    module = job.denoiser.module
    correction = Correction(steps_of(module), channels=found["gain"].shape[1], axis=int(found["axis"]))
    correction.load_state_dict({name: found[name] for name in ("gain", "bias")})
    attach_correction(module, correction.to(steps_of(module).timesteps.device))
    rows = zip(found["kept"].tolist(), found["before"].tolist(), found["after"].tolist(), strict=True)
    names = (NONE, *job.recipe.correction.estimators)
    return tuple(StepFit(names[kept], before, after) for kept, before, after in rows)


def channel_axis(prediction: Tensor, last: nn.Module) -> int:
    """Return where a `prediction` has its channels: behind the batch, unless it is rows of tokens, which a
    linear layer put out `last`.
    """
    operation = operation_of(last)
    return 1 if prediction.ndim != 3 or operation is None else operation.channel_axis


def _fitted(full: nn.Module, job: Job, work: Work) -> Tensors:
    """Fit the correction of the job's model to what the `full` precision model predicts."""
    module, recipe = job.denoiser.module, job.recipe
    count, steps = max(2, recipe.calibration.batch_size), recipe.calibration.steps
    with job.progress("correction: images of two models", 2 * count * steps) as advance:
        with exchanged(module, full), recorded_predictions(module) as expected:
            draw(job, count, advance, "correction")
        axis = channel_axis(expected[0], full.get_submodule(last_layer(work.block.trace)))
        # Where a model predicts a variance too, its channels are behind those of the sample.
        channels = min(expected[0].shape[axis], job.sampler.example().sample.shape[axis])
        correction = Correction(steps_of(module), channels=channels, axis=axis).to(expected[0].device)
        fitting = Fitting(
            job.denoiser, correction, expected, estimators=recipe.correction.estimators, images=count
        )
        with fitting.running():
            draw(job, count, advance, "correction")
    return {
        "axis": torch.tensor(correction.axis),
        "gain": correction.gain,
        "bias": correction.bias,
        **_numbers(fitting, len(correction.gain)),
    }


def _numbers(fitting: Fitting, steps: int) -> Tensors:
    """Return what was kept and the errors, step by step; nothing is kept for a step that was not visited."""
    names, unvisited = (NONE, *fitting.estimators), StepFit(NONE, 0.0, 0.0)
    fits = [fitting.fits.get(step, unvisited) for step in range(steps)]
    return {
        "kept": torch.tensor([names.index(fit.kept) for fit in fits], dtype=torch.uint8),
        "before": torch.tensor([fit.before for fit in fits]),
        "after": torch.tensor([fit.after for fit in fits]),
    }
