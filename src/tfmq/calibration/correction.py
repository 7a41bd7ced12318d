"""Fit the correction of a prediction while a quantized model draws what full precision has drawn from the
same noise.

A step is fitted with all steps before it corrected already, so that what an earlier step has mended is not
mended again. Every other image decides which estimator is used, or that none is.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tfmq.models.denoiser import Denoiser, first_tensor
from tfmq.nn.correction import Correction, with_prediction
from tfmq.nn.swap import steps_of
from tfmq.nn.watch import ModuleCall, watched
from tfmq.numerics.estimators import ESTIMATORS, Affine, identity

NONE = "none"
# Share of a step's error on the deciding images that a more complex candidate has to remove beyond a simpler
# one.
WORTH = 0.01


@dataclass(frozen=True)
class StepFit:
    """What was found for one step: the estimator that was `kept`, the squared error on the deciding images
    before and after.
    """

    kept: str
    before: float
    after: float


def explained(before: float, after: float) -> float:
    """Return the share of a squared error that is gone."""
    return 1 - after / before if before > 0 else 0.0


@contextmanager
def recorded_predictions(module: nn.Module) -> Iterator[list[Tensor]]:
    """Note the prediction of every call, in order."""
    found: list[Tensor] = []
    with watched(module, after=lambda call: found.append(first_tensor(call.output).detach().clone())):
        yield found


class Fitting:
    """Fits the rows of a correction at the first call of each step; every call of the denoiser is corrected
    by it.

    Args:
        denoiser: has been quantized, and draws `images` images at once.
        correction: starts as the identity; it must not be attached yet.
        expected: predictions in full precision, call by call.
        estimators: names among `ESTIMATORS`.
        images: number of images; rows of a call are these, several times over where guidance calls with both
            halves at once.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        correction: Correction,
        expected: Sequence[Tensor],
        *,
        estimators: tuple[str, ...],
        images: int,
    ) -> None:
        self.denoiser, self.correction = denoiser, correction
        self.expected = iter(expected)
        self.estimators, self.images = estimators, images
        self.fits: dict[int, StepFit] = {}

    @contextmanager
    def running(self) -> Iterator[None]:
        """Fit and correct the calls of the denoiser."""
        with watched(self.denoiser.module, after=self._called):
            yield

    def _called(self, call: ModuleCall) -> Any:
        """Return the corrected output of a call, whose new steps are fitted first."""
        steps, exact = steps_of(call.module), next(self.expected)
        bins, _ = steps.lookup(self.denoiser.bind(call.args, call.kwargs).timestep)
        computed = first_tensor(call.output)
        for step in sorted(set(bins.tolist()) - self.fits.keys()):
            rows = (bins == step).nonzero().flatten().to(computed.device)
            self._fit(step, rows, self._values(computed[rows]), self._values(exact[rows]))
        with steps.at_bins(bins):
            return with_prediction(call.output, self.correction)

    def _values(self, prediction: Tensor) -> Tensor:
        """Return the corrected channels of a prediction `[B, ...]`, float64 `[B, N, C]`."""
        channels = prediction.narrow(self.correction.axis, 0, self.correction.channels).movedim(
            self.correction.axis, -1
        )
        return channels.reshape(len(prediction), -1, self.correction.channels).double()

    def _fit(self, step: int, rows: Tensor, computed: Tensor, exact: Tensor) -> None:
        decides = rows % self.images % 2 == 1
        fitted = [
            ESTIMATORS[name](computed[~decides].flatten(0, 1), exact[~decides].flatten(0, 1))
            for name in self.estimators
        ]
        candidates = {NONE: identity(computed.shape[-1]), **dict(zip(self.estimators, fitted, strict=True))}
        errors = {
            name: float((found(computed[decides]) - exact[decides]).square().sum())
            for name, found in candidates.items()
        }
        kept = NONE
        for name in self.estimators:
            if errors[name] < errors[kept] - WORTH * errors[NONE]:
                kept = name
        self._keep(step, candidates[kept])
        self.fits[step] = StepFit(kept, errors[NONE], errors[kept])

    @torch.no_grad()
    def _keep(self, step: int, found: Affine) -> None:
        self.correction.gain[step] = found.gain
        self.correction.bias[step] = found.bias
