"""The step context: which calibrated timestep each sample of the running batch stands at."""

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from tfmq.quantizers.part import Part


class StepContext(Part):
    """Looks up timesteps in the calibrated set and holds the result while the denoiser runs.

    One instance belongs to a denoiser; every quantizer with a finite-set table reads it. `timesteps` `[S]` is
    ascending, in float32 (exact for integers below 2**24). Outside of `at` there is no current step, and
    reading it is an error.
    """

    timesteps: Tensor

    def __init__(self, timesteps: Tensor) -> None:
        super().__init__()
        self.register_buffer("timesteps", timesteps.detach().to(torch.float32).flatten().sort().values)
        self._index: Tensor | None = None
        self._exact: Tensor | None = None
        self._all_exact = False
        self._warned = False
        self._kept: tuple[Tensor, Tensor, float] | None = None

    @property
    def index(self) -> Tensor:
        """Bin of each sample, int64 `[B]`, or `[1]` where the whole batch stands at one timestep.

        Raises:
            RuntimeError: no denoiser call is running.
        """
        if self._index is None:
            raise RuntimeError(
                "a per-step quantizer ran outside of its denoiser: call the whole denoiser with a timestep"
            )
        return self._index

    @property
    def exact(self) -> Tensor:
        """Whether each sample's timestep is a calibrated one, bool of the shape of `index`.

        Raises:
            RuntimeError: no denoiser call is running.
        """
        if self._exact is None:
            raise RuntimeError(
                "a temporal table was read outside of its denoiser: call the whole denoiser with a timestep"
            )
        return self._exact

    @property
    def all_exact(self) -> bool:
        """Whether every timestep of the running batch is a calibrated one."""
        return self._all_exact

    def lookup(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """Return the nearest bin of each timestep (edges at midpoints), and whether it was calibrated."""
        wanted = timestep.detach().flatten().to(self.timesteps.device, torch.float32).contiguous()
        if len(self.timesteps) == 0:
            raise RuntimeError("the step table is empty: the model was not calibrated")
        edges, tolerance = self._bounds()
        index = torch.bucketize(wanted, edges)
        return index, (self.timesteps[index] - wanted).abs() <= tolerance

    def replace(self, timesteps: Tensor) -> None:
        """Take another finite set; whoever holds a row for each timestep has to follow. A timestep outside of
        it warns again.
        """
        self.timesteps = timesteps.detach().to(torch.float32).flatten().sort().values
        self._warned = False

    def _bounds(self) -> tuple[Tensor, float]:
        """Return the edges between bins, and a thousandth of the smallest gap: what rounding on the way here
        may have moved a timestep by.

        They are kept while the timesteps are the same tensor, since every call of a denoiser asks for them.
        """
        if self._kept is None or self._kept[0] is not self.timesteps:
            gaps = self.timesteps.diff()
            tolerance = 1e-3 * float(gaps.min()) if len(gaps) else 1e-3
            self._kept = self.timesteps, (self.timesteps[1:] + self.timesteps[:-1]) / 2, tolerance
        return self._kept[1:]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        # Loading writes into the tensor in place, so what was derived from it is void.
        self._kept = None
        super()._load_from_state_dict(*args, **kwargs)

    @property
    def tolerance(self) -> float:
        """A thousandth of the smallest gap between calibrated timesteps: what rounding on the way here may
        have moved a timestep by.
        """
        return self._bounds()[1]

    @contextmanager
    def at(self, timestep: Tensor) -> Iterator[None]:
        """Set the current bins for the duration of one denoiser call; warn once about timesteps that were not
        calibrated.
        """
        before = self._index, self._exact, self._all_exact
        try:
            wanted = timestep.detach().flatten()
            # One row serves a batch at one timestep: it is less to look up, and integer kernels are fastest
            # with it.
            self._index, self._exact = self.lookup(
                wanted[:1] if len(wanted) > 1 and bool((wanted == wanted[0]).all()) else wanted
            )
            self._all_exact = bool(self._exact.all())
            if not self._all_exact:
                self._warn(float(wanted[: len(self._exact)][~self._exact.to(wanted.device)][0]))
            yield
        finally:
            self._index, self._exact, self._all_exact = before

    @contextmanager
    def at_bins(self, index: Tensor, exact: Tensor | None = None) -> Iterator[None]:
        """Set the current bins `[B or 1]` without looking at values, for graphs in which they are an input.

        `exact`, of the same shape, says which of the timesteps are calibrated ones; without it all of them
        are.
        """
        before = self._index, self._exact, self._all_exact
        try:
            self._index, self._all_exact = index, exact is None
            self._exact = torch.ones_like(index, dtype=torch.bool) if exact is None else exact
            yield
        finally:
            self._index, self._exact, self._all_exact = before

    def first(self) -> AbstractContextManager[None]:
        """Return the context of a call without a timestep, which stands at the first bin."""
        return self.at_bins(torch.zeros(1, dtype=torch.long, device=self.timesteps.device))

    def _warn(self, unseen: float) -> None:
        if self._warned:
            return
        self._warned = True
        warnings.warn(
            f"timestep {unseen:g} was not calibrated; the nearest of "
            f"{len(self.timesteps)} calibrated steps is used. "
            "Quantize with the schedule you sample with, or call tfmq.rebake.",
            stacklevel=4,
        )
