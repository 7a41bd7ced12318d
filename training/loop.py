"""The one training loop of this folder: seeded, resumable after a kill, with a moving average and a held-out
loss.
"""

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")
# Seed of the batches that the held-out loss is taken over; the same at every point of a run.
HELD_OUT_SEED = 4_242


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long and how fast: the rate warms up, stays, and falls linearly to zero over the last `decay` share
    of the steps.
    """

    steps: int
    batch_size: int
    learning_rate: float
    warmup: int = 300
    decay: float = 0.4
    average: float = 0.9995
    save_every: int = 500
    seed: int = 0
    bf16: bool = True
    # A factor of the rate of the parameters whose names begin so.
    factors: Mapping[str, float] = field(default_factory=dict)

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, before its factor."""
        tail = max(1, int(self.steps * self.decay))
        return self.learning_rate * min(1.0, (step + 1) / self.warmup, (self.steps - step) / tail)

    def factor(self, name: str) -> float:
        """Return the factor of the rate of the parameter `name`."""
        return next((factor for start, factor in self.factors.items() if name.startswith(start)), 1.0)


STATE = "state.safetensors"


def begun(directory: Path) -> bool:
    """Whether a run in `directory` has saved a state, from which it goes on."""
    return (directory / STATE).exists()


# The loss of one batch: drawn with this generator, from training's part of the data or the held-out one.
Loss = Callable[[Generator, bool], Tensor]


class Run:
    """A training run in a directory; `average` holds the moving average of every parameter, by name.

    A run that was killed goes on from its last saved step, to the same weights. A longer schedule continues a
    finished one.
    """

    def __init__(self, directory: Path, module: nn.Module, schedule: Schedule) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.schedule = schedule
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.average = {name: p.detach().clone() for name, p in self.parameters.items()}
        groups = [
            {
                "params": [
                    parameter
                    for name, parameter in self.parameters.items()
                    if schedule.factor(name) == factor
                ],
                "factor": factor,
            }
            for factor in sorted(set(map(schedule.factor, self.parameters)))
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.99), weight_decay=0.01)
        self.step = self._restore()

    def _restore(self) -> int:
        if not begun(self.directory):
            return 0
        path = self.directory / STATE
        with safe_open(path, framework="pt") as file:
            step = int(file.metadata()["step"])
        tensors = load_file(path)
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[f"model.{name}"])
                self.average[name].copy_(tensors[f"average.{name}"])
                moments = {moment: tensors[f"{moment}.{name}"] for moment in MOMENTS}
                self.optimizer.state[parameter] = {"step": torch.tensor(float(step)), **moments}
        return step

    def _save(self) -> None:
        tensors = {f"average.{name}": value.contiguous() for name, value in self.average.items()}
        for name, parameter in self.parameters.items():
            tensors[f"model.{name}"] = parameter.detach().contiguous()
            for moment in MOMENTS:
                tensors[f"{moment}.{name}"] = self.optimizer.state[parameter][moment].contiguous()
        partial = self.directory / "state.partial"
        save_file(tensors, partial, metadata={"step": str(self.step)})
        os.replace(partial, self.directory / STATE)

    def load_average(self, module: nn.Module) -> None:
        """Write the moving average into a module of the same parameters."""
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                if name in self.average:
                    parameter.copy_(self.average[name])

    def train(
        self,
        loss_of: Loss,
        *,
        exported: Callable[["Run"], None],
        each: Callable[["Run"], None] = lambda _: None,
    ) -> None:
        """Take the steps that are left. `each` sees the run after every step, `exported` after every save.

        Raises:
            SystemExit: the loss is NaN or infinite.
        """
        began, first, losses = time.time(), self.step, []
        while self.step < self.schedule.steps:
            losses.append(self._advance(loss_of))
            each(self)
            if self.step % 100 == 0:
                speed = (self.step - first) * self.schedule.batch_size / (time.time() - began)
                self._log(
                    {
                        "step": self.step,
                        "loss": float(np.mean(losses)),
                        "held_out": self._held_out(loss_of),
                        "samples_per_second": round(speed, 1),
                    }
                )
                losses.clear()
            if self.step % self.schedule.save_every == 0 or self.step == self.schedule.steps:
                self._save()
                exported(self)

    def _loss(self, loss_of: Loss, generator: Generator, held: bool) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.schedule.bf16):
            return loss_of(generator, held)

    def _advance(self, loss_of: Loss) -> float:
        generator = Generator().manual_seed(self.schedule.seed * 1_000_003 + self.step)
        # What a loss draws besides (dropout) comes from the global state, which follows the step too.
        torch.manual_seed(self.schedule.seed * 1_000_003 + self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.rate(self.step) * group["factor"]
        loss = self._loss(loss_of, generator, held=False)
        if not torch.isfinite(loss):
            raise SystemExit(f"step {self.step}: the loss is {loss.item()}; lower the learning rate")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        rate = min(self.schedule.average, (self.step + 1) / (self.step + 20))
        parameters = [parameter.detach() for parameter in self.parameters.values()]
        torch._foreach_lerp_(list(self.average.values()), parameters, 1 - rate)
        self.step += 1
        return loss.item()

    @torch.no_grad()
    def _held_out(self, loss_of: Loss, batches: int = 4) -> float:
        generator = Generator().manual_seed(HELD_OUT_SEED)
        return float(np.mean([self._loss(loss_of, generator, held=True).item() for _ in range(batches)]))

    def _log(self, line: dict[str, float]) -> None:
        with (self.directory / "log.jsonl").open("a") as log:
            log.write(json.dumps(line) + "\n")
        print(line, flush=True)
