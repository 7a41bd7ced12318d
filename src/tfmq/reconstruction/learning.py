"""The one optimisation loop: rounding variables against any reconstruction loss."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor, nn

from tfmq.nn.layer import CalibratedLayer
from tfmq.numerics.rounding import annealed_beta, rectified_sigmoid, rounding_penalty
from tfmq.progress import Advance
from tfmq.quantizers.weight import AdaptiveRounding

# Number of checks on held-out samples over all iterations, and number of checks in a row without gain after
# which learning ends.
CHECKS, PATIENCE = 40, 4
# Returns the values, in the shape of a layer's weight, that its roundings start from.
Start = Callable[[CalibratedLayer], Tensor]


@dataclass(frozen=True, kw_only=True)
class Learning:
    """Hyper-parameters of learned rounding; the released TFMQ-DM uses 20 000 iterations at rate 1e-3, else as
    here.

    Attributes:
        iterations: Adam steps a unit; 0 keeps nearest rounding.
        learning_rate: learning rate of Adam on the rounding logits.
        batch_size: samples a step.
        penalty: weight of the rounding regulariser (lambda).
        beta_start, beta_end: exponent of the regulariser, annealed linearly.
        warmup: share of the steps without the regulariser.
        held_out: share of the samples that learning does not see and is judged on: it ends when the codes
            have not become better there for `PATIENCE` of its `CHECKS` checks, and the best of them are kept.
            0 learns on all samples and takes every step.
    """

    iterations: int = 20_000
    learning_rate: float = 1e-3
    batch_size: int = 32
    penalty: float = 0.01
    beta_start: float = 20.0
    beta_end: float = 2.0
    warmup: float = 0.2
    held_out: float = 0.0

    def __post_init__(self) -> None:
        if self.iterations < 0 or self.batch_size < 1:
            raise ValueError(
                f"iterations must be >= 0 and batch_size >= 1, got {self.iterations} and {self.batch_size}"
            )
        if not 0.0 <= self.warmup < 1.0:
            raise ValueError(f"warmup is a share of the iterations in [0, 1), got {self.warmup}")
        if not 0.0 <= self.held_out < 1.0:
            raise ValueError(f"held_out is a share of the samples in [0, 1), got {self.held_out}")
        if not (0 < self.learning_rate < inf and 0 <= self.penalty < inf):
            raise ValueError(
                "learning_rate must be > 0 and penalty >= 0, both finite, "
                f"got {self.learning_rate} and {self.penalty}"
            )
        if not (0 < self.beta_start < inf and 0 < self.beta_end < inf):
            raise ValueError(
                f"beta_start and beta_end must be > 0 and finite, got {self.beta_start} and {self.beta_end}"
            )


def full_weight(layer: CalibratedLayer) -> Tensor:
    """Return the full-precision weight: where AdaRound starts."""
    return layer.weight


@contextmanager
def adaptive_rounding(
    layers: Mapping[str, CalibratedLayer], start: Start = full_weight
) -> Iterator[list[AdaptiveRounding]]:
    """Give every layer trainable roundings while the context is open; on a clean exit their hard values
    become the layer's codes.
    """
    for layer in layers.values():
        layer.rounding = AdaptiveRounding(start(layer), layer.grid)
    try:
        yield [layer.rounding for layer in layers.values() if layer.rounding]
        _harden(layers)
    finally:
        for layer in layers.values():
            layer.rounding = None


@torch.no_grad()
def _harden(layers: Mapping[str, CalibratedLayer]) -> None:
    """Let the codes of `layers` be their roundings."""
    for layer in layers.values():
        if layer.rounding:
            layer.codes.copy_(layer.rounding.codes(hard=True))


def _joined(roundings: Sequence[AdaptiveRounding]) -> list[nn.Parameter]:
    """Let the logits of all `roundings`, and their gradients, be parts of one tensor for each device and
    dtype; return these.

    A step is then a few operations rather than a few for each layer, on the same numbers.
    """
    groups: dict[tuple[torch.device, torch.dtype], list[AdaptiveRounding]] = {}
    for rounding in roundings:
        groups.setdefault((rounding.logits.device, rounding.logits.dtype), []).append(rounding)
    whole = []
    for group in groups.values():
        values = torch.cat([rounding.logits.detach().flatten() for rounding in group])
        parts = [rounding.logits.numel() for rounding in group]
        one = nn.Parameter(values)
        one.grad = torch.zeros_like(values)
        for rounding, value, gradient in zip(group, values.split(parts), one.grad.split(parts), strict=True):
            shape = rounding.logits.shape
            rounding.logits = nn.Parameter(value.view(shape))
            rounding.logits.grad = gradient.view(shape)
        whole.append(one)
    return whole


class _EarlyStop:
    """Keeps the codes that were best on samples that learning does not see, and says when there is nothing
    left to gain.

    Checks begin with the regulariser: before it the roundings are free, and their nearest codes say little of
    where they will settle.
    """

    def __init__(
        self, layers: Mapping[str, CalibratedLayer], judge: Callable[[], float] | None, config: Learning
    ) -> None:
        self.layers, self.judge = layers, judge
        self.first, self.every = config.warmup * config.iterations, max(1, config.iterations // CHECKS)
        self.best: tuple[float, dict[str, Tensor]] | None = None
        self.failed = 0

    def after(self, iteration: int) -> bool:
        """Look at the codes where a check is due; return whether learning ends here."""
        if self.judge is None or iteration < self.first or (iteration + 1) % self.every:
            return False
        with _hard(self.layers), torch.no_grad():
            error = self.judge()
            better = self.best is None or error < self.best[0]
            if better:
                self.best = error, {name: layer.codes.clone() for name, layer in self.layers.items()}
        self.failed = 0 if better else self.failed + 1
        return self.failed >= PATIENCE

    def restore(self) -> None:
        """Give the layers the best codes that were seen, if any."""
        for name, codes in (self.best[1] if self.best else {}).items():
            self.layers[name].codes.copy_(codes)


@contextmanager
def _hard(layers: Mapping[str, CalibratedLayer]) -> Iterator[None]:
    """Let `layers` compute with the codes that their roundings stand for now."""
    kept = {name: layer.rounding for name, layer in layers.items()}
    for layer in layers.values():
        if layer.rounding:
            layer.codes.copy_(layer.rounding.codes(hard=True))
        layer.rounding = None
    try:
        yield
    finally:
        for name, layer in layers.items():
            layer.rounding = kept[name]


@torch.no_grad()
def _measured(loss: Callable[[torch.Generator], Tensor], seed: int) -> float:
    """Return the sum of the loss of four batches, which `seed` draws."""
    generator = torch.Generator().manual_seed(seed)
    return sum(float(loss(generator)) for _ in range(4))


def _penalty(logits: Sequence[Tensor], beta: float) -> Tensor | int:
    """Return the sum of `1 - |2 h(V) - 1|**beta`."""
    return sum(rounding_penalty(rectified_sigmoid(part), beta) for part in logits)


def learn_rounding(
    layers: Mapping[str, CalibratedLayer],
    loss: Callable[[torch.Generator], Tensor],
    config: Learning,
    *,
    seed: int,
    advance: Advance,
    start: Start = full_weight,
    judge: Callable[[], float] | None = None,
) -> int:
    """Minimise `loss + penalty * sum(1 - |2 h(V) - 1|**beta)` over the roundings `V` of `layers`, and fix
    them (AdaRound, equation 21).

    Soft weights begin at `start`, each free to move between the two codes around it. `loss` draws its own
    batch from the generator it is given. Where the learned roundings end with more loss on the same draws
    than the codes the layers came with, those codes are kept. `judge`, the error on samples that `loss` does
    not draw, stops early (see `Learning.held_out`).

    Returns:
        The steps that were taken; `advance` reports all that were asked for.
    """
    if config.iterations == 0 or not layers:
        return 0
    before = _measured(loss, seed), {name: layer.codes.clone() for name, layer in layers.items()}
    generator, early, taken = torch.Generator().manual_seed(seed + 1), _EarlyStop(layers, judge, config), 0
    with adaptive_rounding(layers, start) as roundings:
        whole = _joined(roundings)
        optimizer = torch.optim.Adam(whole, lr=config.learning_rate)
        for iteration in range(config.iterations):
            beta = annealed_beta(
                iteration,
                config.iterations,
                start=config.beta_start,
                end=config.beta_end,
                warmup=config.warmup,
            )
            # Zero in place: with `set_to_none` the parts would lose their places in the joint gradient.
            optimizer.zero_grad(set_to_none=False)
            total = loss(generator)
            if beta is not None:
                total = total + config.penalty * _penalty(whole, beta)
            total.backward()
            optimizer.step()
            taken += 1
            advance()
            if early.after(iteration):
                break
    advance(config.iterations - taken)
    early.restore()
    if not _measured(loss, seed) <= before[0]:
        for name, layer in layers.items():
            layer.codes.copy_(before[1][name])
    return taken
