"""Whether a calibration saw more than one value of each condition that has finitely many, such as a class."""

import warnings
from collections.abc import Sequence

from torch import Tensor

from tfmq.calibration.store import CalibrationStore
from tfmq.models.denoiser import Denoiser, Inputs
from tfmq.models.program import Trace


def finite_conditions(denoiser: Denoiser, example: Inputs, traced: Trace) -> tuple[str, ...]:
    """Return the names of conditions with one whole number a sample that a layer depends on."""
    heeded = frozenset().union(*(layer.depends_on for layer in traced.layers))
    return tuple(
        name for name, tensor in denoiser.labelled(example)[2:] if name in heeded and _is_label(tensor)
    )


def _is_label(tensor: Tensor) -> bool:
    return (
        not tensor.is_floating_point()
        and not tensor.is_complex()
        and tensor.ndim > 0
        and tensor[0].numel() == 1
    )


def single_values(
    denoiser: Denoiser, names: Sequence[str], store: CalibrationStore, batches: Sequence[range]
) -> dict[str, tuple[int, ...]]:
    """Return those of the conditions `names` that were the same for all images, with the value, or under
    guidance the two values, of each.

    An image has the value of its class, and under guidance also that of none, in two rows of one call or in
    two calls: a row is compared with those of other images at the same call of the trajectory.

    Args:
        denoiser: names the conditions.
        names: names of the conditions that have one whole number for each sample.
        store: the calls of the first batch of images, then those of the next. They are read until every
            condition has shown two values.
        batches: the images of each.
    """
    left = {name: dict[int, tuple[int, ...]]() for name in names}
    each = max(1, len(store) // len(batches))
    for number in range(len(store) if left else 0):
        images = len(batches[min(number // each, len(batches) - 1)])
        labelled = denoiser.labelled(store.read(number))[2:]
        for name, tensor in ((name, tensor) for name, tensor in labelled if name in left):
            columns = {tuple(column) for column in tensor.reshape(-1, images).t().tolist()}
            columns.add(left[name].setdefault(number % each, min(columns)))
            if len(columns) > 1:
                del left[name]
        if not left:
            break
    return {
        name: tuple(sorted({value for values in seen.values() for value in values}))
        for name, seen in left.items()
        if seen
    }


def warn_of_single_values(
    denoiser: Denoiser, example: Inputs, traced: Trace, store: CalibrationStore, batches: Sequence[range]
) -> None:
    """Warn of every condition that a calibration saw one value of: what depends on it was fitted to that
    value alone.
    """
    names = finite_conditions(denoiser, example, traced)
    for name, values in single_values(denoiser, names, store, batches).items():
        warnings.warn(
            f"the calibration saw one {name} alone, {' and '.join(map(str, values))}: "
            "other values may come out badly. Draw more images "
            "(--calib-size), or give them values in turn: per_image of "
            "tfmq.LoopSampler, labels of tfmq.PipelineSampler",
            stacklevel=2,
        )
