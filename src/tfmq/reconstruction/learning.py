"""The one optimisation loop: rounding variables against any reconstruction loss."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from tfmq.nn.layer import CalibratedLayer
from tfmq.numerics.rounding import annealed_beta, rounding_penalty
from tfmq.progress import Advance
from tfmq.quantizers.weight import AdaptiveRounding

# What the roundings of a layer start from: values of its weight, in its shape.
Start = Callable[[CalibratedLayer], Tensor]


@dataclass(frozen=True, kw_only=True)
class Learning:
    """Hyper-parameters of learned rounding; the released TFMQ-DM uses 20 000 iterations at rate 1e-3, else as here.

    Attributes:
        iterations: Adam steps a unit; 0 keeps nearest rounding.
        learning_rate: of Adam on the rounding logits.
        batch_size: samples a step.
        penalty: weight of the rounding regulariser (lambda).
        beta_start, beta_end: exponent of the regulariser, annealed linearly.
        warmup: share of the steps without the regulariser.
    """

    iterations: int = 20_000
    learning_rate: float = 1e-3
    batch_size: int = 32
    penalty: float = 0.01
    beta_start: float = 20.0
    beta_end: float = 2.0
    warmup: float = 0.2

    def __post_init__(self) -> None:
        if self.iterations < 0 or self.batch_size < 1:
            raise ValueError(f"iterations must be >= 0 and batch_size >= 1, got {self.iterations} and {self.batch_size}")
        if not 0.0 <= self.warmup < 1.0:
            raise ValueError(f"warmup is a share of the iterations in [0, 1), got {self.warmup}")
        if self.learning_rate <= 0 or self.penalty < 0:
            raise ValueError(f"learning_rate must be > 0 and penalty >= 0, got {self.learning_rate} and {self.penalty}")


def full_precision(layer: CalibratedLayer) -> Tensor:
    """Return the full-precision weight: where AdaRound starts."""
    return layer.weight


@contextmanager
def adaptive_rounding(layers: Mapping[str, CalibratedLayer], start: Start = full_precision) -> Iterator[list[AdaptiveRounding]]:
    """Give every layer trainable roundings while the context is open; on a clean exit their hard values become the layer's codes."""
    for layer in layers.values():
        layer.rounding = AdaptiveRounding(start(layer), layer.grid)
    try:
        yield [layer.rounding for layer in layers.values() if layer.rounding]
        with torch.no_grad():
            for layer in layers.values():
                if layer.rounding:
                    layer.codes.copy_(layer.rounding.codes(hard=True))
    finally:
        for layer in layers.values():
            layer.rounding = None


def learn_rounding(
    layers: Mapping[str, CalibratedLayer],
    loss: Callable[[torch.Generator], Tensor],
    config: Learning,
    *,
    seed: int,
    advance: Advance,
    start: Start = full_precision,
) -> None:
    """Minimise `loss + penalty * sum(1 - |2 h(V) - 1|**beta)` over the roundings `V` of `layers`, and fix them (AdaRound, equation 21).

    Soft weights begin at `start`, each free to move between the two codes around it. `loss` draws its own batch from the generator it is given.
    Where the learned roundings end with more loss on the same draws than the codes the layers came with, those codes are kept.
    """

    def measured() -> float:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            return sum(float(loss(generator)) for _ in range(4))

    if config.iterations == 0 or not layers:
        return
    before = measured(), {name: layer.codes.clone() for name, layer in layers.items()}
    generator = torch.Generator().manual_seed(seed + 1)
    with adaptive_rounding(layers, start) as roundings:
        optimizer = torch.optim.Adam([rounding.logits for rounding in roundings], lr=config.learning_rate)
        for iteration in range(config.iterations):
            beta = annealed_beta(iteration, config.iterations, start=config.beta_start, end=config.beta_end, warmup=config.warmup)
            optimizer.zero_grad()
            total = loss(generator)
            if beta is not None:
                total = total + config.penalty * sum(rounding_penalty(rounding.soft(), beta) for rounding in roundings)
            total.backward()
            optimizer.step()
            advance()
    if not measured() <= before[0]:
        for name, layer in layers.items():
            layer.codes.copy_(before[1][name])
