"""Fit the scales and biases of all layers together, by the prediction of the whole denoiser.

Units are rounded one after the other, each by its own output. What their errors do together only the
prediction shows. Codes stay as they are here; steps of weights and biases, a few values a row, follow the
gradient of the prediction's error (EfficientQAT, Chen et al., 2024, arXiv 2407.11062, end-to-end training of
quantization parameters; learned step sizes: LSQ, Esser et al., 2020).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import cos, inf, pi

import torch
from torch import Tensor, nn

from tfmq.nn.layer import CalibratedLayer
from tfmq.nn.watch import ModuleCall, all_watched

Loss = Callable[[], Tensor]
# Iterations in which the rate rises from nothing.
WARMUP = 5
# Decay of Adam's second moment: that of the first, 0.9, and this follow gradients of a few dozen iterations.
SECOND = 0.99
# Adam's smallest divisor. Errors of good models are small, and so are their gradients.
SMALLEST = 1e-12


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """How scales and biases are fitted to the prediction once all codes are found.

    Attributes:
        iterations: steps of Adam, whose rate rises and then falls like a cosine; 0 fits nothing.
        batch_size: samples a step.
        scale_rate: largest rate of the logarithm of a scale.
        bias_rate: largest rate of a bias, in root mean squares of its layer's output.
    """

    iterations: int = 0
    batch_size: int = 16
    scale_rate: float = 1e-3
    bias_rate: float = 5e-4

    def __post_init__(self) -> None:
        if self.iterations < 0 or self.batch_size < 1:
            raise ValueError(
                f"tuning.iterations must be >= 0 and tuning.batch_size >= 1, "
                f"got {self.iterations} and {self.batch_size}"
            )
        for name in ("scale_rate", "bias_rate"):
            if not 0 <= getattr(self, name) < inf:
                raise ValueError(f"tuning.{name} must be >= 0 and finite, got {getattr(self, name)}")


@dataclass(frozen=True)
class TuningReport:
    """Squared error of the prediction on held-out calls, relative to the prediction's square, before tuning
    and after (None where it was no number), and the iterations. Unless it fell, nothing was changed.
    """

    iterations: int
    before: float
    after: float | None

    @property
    def fell(self) -> bool:
        """Whether the error fell."""
        return self.after is not None and self.after < self.before


@dataclass
class Place:
    """How far tuning has come: logarithms of what scales are multiplied by and shifts of biases, each as one
    vector for all layers, and Adam's two moments of these. `done` counts the iterations.
    """

    scales: Tensor
    shifts: Tensor
    moments: dict[str, Tensor]
    done: int = 0

    def tensors(self) -> dict[str, Tensor]:
        """Return the values as tensors by name."""
        return {"scales": self.scales, "shifts": self.shifts, "done": torch.tensor(self.done), **self.moments}


MOMENTS = ("scales_mean", "scales_square", "shifts_mean", "shifts_square")


def place_of(tensors: Mapping[str, Tensor]) -> Place:
    """Return the place whose `tensors` these are."""
    moments = {name: tensors[name] for name in MOMENTS}
    return Place(tensors["scales"], tensors["shifts"], moments, int(tensors["done"]))


class Tunable:
    """The scales and biases of quantized layers as two vectors.

    Args:
        layers: quantized layers, by name.
        sizes: root mean square of the output of each layer, by name.
    """

    def __init__(self, layers: Mapping[str, CalibratedLayer], sizes: Mapping[str, float]) -> None:
        self.layers = layers
        self.sizes = sizes
        self.shifted = {name: layer for name, layer in layers.items() if layer.correction is not None}

    def start(self) -> Place:
        """Return the place where nothing has changed."""
        scales = torch.zeros(sum(layer.grid.scale.numel() for layer in self.layers.values()))
        shifts = torch.zeros(sum(len(_correction(layer)) for layer in self.shifted.values()))
        moments = {name: torch.zeros_like(scales if "scales" in name else shifts) for name in MOMENTS}
        return Place(scales, shifts, moments)

    @contextmanager
    def moved(self, scales: Tensor, shifts: Tensor) -> Iterator[None]:
        """Let the layers compute with changed scales and biases, differentiable in both, for a while."""
        before = {name: (layer.grid, layer.correction) for name, layer in self.layers.items()}
        self._move(scales, shifts)
        try:
            yield
        finally:
            for name, (grid, correction) in before.items():
                self.layers[name].grid, self.layers[name].correction = grid, correction

    @torch.no_grad()
    def move(self, place: Place) -> None:
        """Change the scales and biases of the layers for good."""
        self._move(place.scales, place.shifts)

    def _move(self, scales: Tensor, shifts: Tensor) -> None:
        amounts = scales.split([layer.grid.scale.numel() for layer in self.layers.values()])
        for layer, amount in zip(self.layers.values(), amounts, strict=True):
            scale = layer.grid.scale
            factor = amount.exp().view_as(scale).to(scale)
            layer.grid = replace(layer.grid, scale=scale * factor)
        parts = shifts.split([len(_correction(layer)) for layer in self.shifted.values()])
        for (name, layer), part in zip(self.shifted.items(), parts, strict=True):
            correction = _correction(layer)
            layer.correction = correction + self.sizes[name] * part.to(correction)


def _correction(layer: CalibratedLayer) -> Tensor:
    assert layer.correction is not None
    return layer.correction


@torch.no_grad()
def output_sizes(layers: Mapping[str, nn.Module], run: Callable[[], object]) -> dict[str, float]:
    """Return the root mean square of what each of `layers` puts out while `run` calls the model; 0 for one
    that is not called.
    """
    squares: dict[str, list[Tensor]] = {name: [] for name in layers}

    def see(call: ModuleCall) -> None:
        squares[call.name].append(call.output.double().square().mean())

    with all_watched(layers, after=see):
        run()
    return {name: float(torch.stack(seen).mean().sqrt()) if seen else 0.0 for name, seen in squares.items()}


class NoRoomError(RuntimeError):
    """A gradient keeps more than there is room for."""


def saved_bytes(run: Callable[[], object], *, most: int | None = None) -> int:
    """Return the bytes of the tensors that `run` keeps for a gradient, each counted once.

    Raises:
        NoRoomError: they are more than `most`, as soon as they are.
    """
    seen: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        if most is not None and sum(seen.values()) > most:
            raise NoRoomError(f"a gradient keeps more than the {most / 2**20:.0f} MiB that may be used")
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return sum(seen.values())


def rate(iteration: int, iterations: int) -> float:
    """Return the share of the largest rate that an iteration has.

    >>> [round(rate(number, 100), 3) for number in (0, 4, 50, 99)]
    [0.2, 0.996, 0.5, 0.0]
    """
    return min(1.0, (iteration + 1) / WARMUP) * 0.5 * (1 + cos(pi * iteration / iterations))


def descend(
    tunable: Tunable,
    place: Place,
    config: Tuning,
    batches: Sequence[Callable[[], Sequence[Loss]]],
    *,
    total: int,
    advance: Callable[[], None],
) -> Place:
    """Return the place after one step of Adam for each of `batches`.

    Args:
        tunable: the layers.
        place: where to go on.
        config: rates.
        batches: give the losses of the parts of each step, which add up to its loss.
        total: iterations from the first to the last, which the rate depends on.
        advance: counts steps.
    """
    scales, shifts = (nn.Parameter(values.clone()) for values in (place.scales, place.shifts))
    optimizer = torch.optim.Adam(
        [{"params": [scales]}, {"params": [shifts]}], betas=(0.9, SECOND), eps=SMALLEST
    )
    for name, values in (("scales", scales), ("shifts", shifts)):
        optimizer.state[values] = {
            "step": torch.tensor(float(place.done)),
            "exp_avg": place.moments[f"{name}_mean"].clone(),
            "exp_avg_sq": place.moments[f"{name}_square"].clone(),
        }
    for number, parts_of in enumerate(batches):
        share = rate(place.done + number, total)
        for group, most in zip(optimizer.param_groups, (config.scale_rate, config.bias_rate), strict=True):
            group["lr"] = share * most
        optimizer.zero_grad()
        for loss in parts_of():
            with torch.enable_grad(), tunable.moved(scales, shifts):
                loss().backward()
        optimizer.step()
        advance()
    states = {"scales": optimizer.state[scales], "shifts": optimizer.state[shifts]}
    kinds = (("mean", "exp_avg"), ("square", "exp_avg_sq"))
    moments = {f"{name}_{kind}": states[name][key] for name in states for kind, key in kinds}
    return Place(scales.detach(), shifts.detach(), moments, place.done + len(batches))
