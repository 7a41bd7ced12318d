"""Timesteps that diffusers' DDIM does not step through: the quadratic spacing of the DDIM experiments on
CIFAR-10 (Song et al., 2021, appendix D).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DDIMScheduler, DiffusionPipeline


class QuadraticDDIMScheduler(DDIMScheduler):
    """DDIM at `t_i = floor((i / (n - 1) * sqrt(0.8 T))**2)`, dense near the image, for `i` of `n` steps and
    `T` training timesteps.

    Where rounding down gives a timestep twice it is visited once: DDIM leaves a sample as it is in a step of
    no length, so that nothing but the call is missing, and `n` steps are a few less. Everything else, `eta`
    too, is diffusers' own step, on the noise levels of the visited timesteps.
    """

    alphas_cumprod: torch.Tensor

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        """Choose the timesteps, the greatest first."""
        last = self.config.num_train_timesteps - 1
        roots = torch.linspace(
            0, (0.8 * self.config.num_train_timesteps) ** 0.5, num_inference_steps, dtype=torch.float64
        )
        visited = (roots.square().long() + self.config.steps_offset).clamp(max=last).unique()
        self.timesteps = visited.flip(0).to(device)
        self._positions = {int(timestep): position for position, timestep in enumerate(visited)}
        self._visited_levels = self.alphas_cumprod[visited.to(self.alphas_cumprod.device)]
        # The step before position `i` is `i - 1`.
        self.num_inference_steps = self.config.num_train_timesteps

    def step(
        self, model_output: torch.Tensor, timestep: int, sample: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """Return the sample at the next timestep; diffusers' signature."""
        with self._levels_of_visited():
            return super().step(model_output, self._positions[int(timestep)], sample, *args, **kwargs)

    @contextmanager
    def _levels_of_visited(self) -> Iterator[None]:
        every, self.alphas_cumprod = self.alphas_cumprod, self._visited_levels
        try:
            yield
        finally:
            self.alphas_cumprod = every


SPACINGS = {"quadratic": QuadraticDDIMScheduler}


@contextmanager
def spaced(pipeline: DiffusionPipeline, spacing: str | None) -> Iterator[None]:
    """Let `pipeline` step through timesteps of another spacing for a while; None leaves it as it is.

    Raises:
        ValueError: the pipeline's scheduler is not DDIM.
    """
    before = pipeline.scheduler
    if spacing is not None:
        if not isinstance(before, DDIMScheduler):
            advice = "pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)"
            raise ValueError(
                f"{spacing} spacing is one of DDIM's timesteps, and the pipeline "
                f"steps with {type(before).__name__}; set {advice}"
            )
        pipeline.scheduler = SPACINGS[spacing].from_config(before.config)
    try:
        yield
    finally:
        if spacing is not None:
            pipeline.scheduler = before
