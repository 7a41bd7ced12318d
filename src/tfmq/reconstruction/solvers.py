"""Rounding solvers: how the codes of a unit's layers are found."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Literal, get_args

import torch
from torch import Tensor

from tfmq.calibration.spool import Spool
from tfmq.nn.layer import CalibratedLayer
from tfmq.numerics.compensation import CodeGrid, Quadratic, compensate
from tfmq.numerics.segments import numbers
from tfmq.progress import Advance
from tfmq.reconstruction.learning import Learning, learn_rounding
from tfmq.reconstruction.regression import TOGETHER, Moments, Regression, Run, moments_bytes
from tfmq.reconstruction.unit_gain import Output

# Distance, in codes, from a code at which its learned rounding starts, towards the full-precision weight.
LEAN = 0.1
# Least damping. It keeps the equations solvable where all inputs of a layer are zero.
SMALLEST_DAMPING = 1e-12

UnitInputs = Literal["quantized", "full"]


@dataclass(frozen=True, kw_only=True)
class Rounding:
    """How codes are found: by `nearest` rounding, by `adaround` with the recipe's learning, by `gptq` with
    what follows here, or by both in turn.

    Attributes:
        solver: name in `SOLVERS`; the paper's is `adaround`.
        inputs: what a unit reads while its codes are found: outputs of the network `quantized` so far (the
            paper), so that units come one after the other, or of the `full`-precision network, so that no
            unit waits for another.
        damping: weight of staying near the full-precision weights, relative to the mean square of the inputs.
        positions: output positions (pixels, tokens) of a calibration sample that count.
        sweeps: most sweeps of coordinate descent.
        corrects: whether a layer also makes up for the errors that reach it; else its codes come near to the
            full-precision weight.
        unit_gain: whether each output channel is scaled so that it follows full precision's with gain one.
            Least squares alone shrinks what it fits to noisy inputs, the same way at every step.
        widest: columns of a layer that are solved together; wider layers are solved in parts.
    """

    solver: str = "adaround"
    inputs: UnitInputs = "quantized"
    damping: float = 0.1
    positions: int = 64
    sweeps: int = 6
    corrects: bool = True
    unit_gain: bool = False
    widest: int = 4608

    def __post_init__(self) -> None:
        if self.solver not in SOLVERS:
            raise ValueError(f"rounding.solver is {self.solver!r}; it must be one of {', '.join(SOLVERS)}")
        if self.inputs not in get_args(UnitInputs):
            raise ValueError(
                f"rounding.inputs is {self.inputs!r}; it must be one of {', '.join(get_args(UnitInputs))}"
            )
        if not 0 < self.damping < inf:
            raise ValueError(f"rounding.damping must be > 0 and finite, got {self.damping}")
        for name in ("positions", "sweeps", "widest"):
            if getattr(self, name) < 1:
                raise ValueError(f"rounding.{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class Samples:
    """The calibration samples of a unit, as a solver sees them.

    Attributes:
        parts: their numbers, batch by batch.
        run_full, run: call the unit on a batch, in the full-precision network and in the quantized network so
            far.
        loss: error of the unit's output in the latter on a batch that it draws.
        judge: error of the unit's output on samples that `loss` does not draw; None where it draws from all.
    """

    parts: Sequence[Tensor]
    run_full: Run
    run: Run
    loss: Callable[[torch.Generator], Tensor]
    judge: Callable[[], float] | None = None


@dataclass(frozen=True)
class UnitProblem:
    """A unit to round.

    Attributes:
        layers: its layers in execution order; they have their nearest codes.
        samples: what they learn from.
        learning: hyper-parameters of learned rounding.
        advance: counts the work that is done; a solver calls it `work_amount` times.
        spool: keeps what a solver gathers of the samples; by default in memory.
    """

    layers: Mapping[str, CalibratedLayer]
    samples: Samples
    learning: Learning
    advance: Advance
    spool: Spool | None = None


@dataclass(frozen=True)
class Solver:
    """A way to round a unit.

    Attributes:
        solve: sets codes, scales and corrections of the problem's layers, with random draws from a seed;
            returns the learning steps taken.
        work: how often it advances on a unit of so many layers.
        runs_full: whether it calls `run_full`, for which a unit's full-precision inputs are kept.
        memory: about the bytes that it takes for a unit of some layers, beside the unit's calls.
    """

    solve: Callable[[UnitProblem, Rounding, int], int]
    work: Callable[[Learning, int], int]
    runs_full: bool
    memory: Callable[[Sequence[CalibratedLayer], Rounding], int]


def work_amount(config: Rounding, learning: Learning, layers: int) -> int:
    """Return how often the solver of `config` advances on a unit of `layers` layers."""
    return SOLVERS[config.solver].work(learning, layers)


def nearest(problem: UnitProblem, config: Rounding, seed: int) -> int:
    """Leave the nearest codes."""
    return 0


def adaround(problem: UnitProblem, config: Rounding, seed: int) -> int:
    """Learn the roundings of all layers together (BRECQ, Li et al., 2021)."""
    samples = problem.samples
    return learn_rounding(
        problem.layers,
        samples.loss,
        problem.learning,
        seed=seed,
        advance=problem.advance,
        judge=samples.judge,
    )


@torch.no_grad()
def gptq(problem: UnitProblem, config: Rounding, seed: int) -> int:
    """Round each layer so that its output in the quantized network comes nearest to the full-precision
    network's.

    The inputs are those that the rounded layers before it leave, the outputs those of the full-precision
    network, so that a layer also makes up for errors that reach it. Codes are found by error feedback (GPTQ,
    Frantar et al., 2023) and improved by coordinate descent, with the scales refitted; the bias takes the
    mean error of each channel (Nagel et al., 2019, section 4.2).
    """
    regression = Regression(
        problem.layers, problem.samples.parts, most=config.positions, seed=seed, spool=problem.spool
    )
    regression.record_targets(problem.samples.run_full)
    for names in regression.passes_of(problem.samples.run_full, widest=config.widest):
        found = regression.moments(names, problem.samples.run, widest=config.widest)
        for name in names:
            _round(problem.layers[name], found.pop(name), config)
            problem.advance()
    return 0


def _round(layer: CalibratedLayer, moments: Moments, config: Rounding) -> None:
    """Set the codes, scales and bias of a layer by its moments, which are used up."""
    damping = (config.damping * moments.mean_square()).clamp(min=SMALLEST_DAMPING)
    if layer.bias is not None:
        moments.centre()
    output = Output(layer, moments) if config.unit_gain and moments.cross is not None else None
    moments.damp(damping)
    _solve(layer, moments, config)
    if output is not None:
        layer.grid.scale.mul_(output.gain(layer.quantized_weight())[:, None])
    if layer.correction is not None:
        change = (
            (layer.quantized_weight() - layer.weight)
            .flatten(1)
            .unflatten(0, moments.residuals.shape)
            .double()
        )
        layer.correction.copy_((moments.residuals - (change @ moments.inputs[:, :, None])[:, :, 0]).flatten())


def _solve(layer: CalibratedLayer, moments: Moments, config: Rounding) -> None:
    """Set the codes and scales of a layer; its damped moments are used up."""
    groups, shape = len(moments.inputs), layer.weight.shape

    def matrix(values: Tensor) -> Tensor:
        return values.expand(shape).flatten(1).unflatten(0, (groups, -1)).clone()

    weight = matrix(layer.weight).double()
    # A part that cannot see the others would make up for the whole error, and they too.
    target = (
        weight
        if moments.cross is None or not config.corrects
        else weight + torch.cholesky_solve(moments.cross.mT, torch.linalg.cholesky(moments.hessians[0])).mT
    )
    grid = layer.grid
    scale, zero_point = (
        matrix(grid.steps(layer.weight.ndim)).float(),
        matrix(grid.zeros(layer.weight.ndim)).float(),
    )
    segment = numbers(grid.segments, shape[1], shape[2:].numel()).to(weight.device)
    codes = torch.empty_like(scale)
    for some, hessian in moments.parts():
        problem = Quadratic(target[:, :, some], hessian)
        start = CodeGrid(grid.format, scale[:, :, some], zero_point[:, :, some])
        # Parts of a row share its scales, which then stay as they are.
        codes[:, :, some], fitted = compensate(
            problem, start, segment[some], sweeps=config.sweeps, refitted=moments.cross is not None
        )
        scale[:, :, some] = fitted.scale
    layer.codes.copy_(codes.flatten(0, 1).reshape(shape))
    first = torch.stack([(segment == number).int().argmax() for number in range(grid.scale.shape[1])])
    fitted_scale = scale[:, :, first].flatten(0, 1)
    if grid.multiplier is not None:
        # A refitted row moves as a whole: the steps of its groups keep their ratios.
        fitted_scale /= grid.multiplier[:, first.cpu() // (grid.group * shape[2:].numel())]
    grid.scale.copy_(fitted_scale)


def leaning(layer: CalibratedLayer) -> Tensor:
    """Return the weight that the codes of a layer stand for, moved towards the full-precision one, no further
    than `LEAN` codes.
    """
    coded = layer.quantized_weight()
    step = layer.grid.steps(layer.weight.ndim)
    return coded + (layer.weight - coded).clamp(min=-LEAN * step, max=LEAN * step)


def gptq_adaround(problem: UnitProblem, config: Rounding, seed: int) -> int:
    """Solve by `gptq`, then learn which of the codes to move by one, all layers together: scales and biases
    stay.
    """
    gptq(problem, config, seed)
    samples, learning = problem.samples, problem.learning
    return learn_rounding(
        problem.layers,
        samples.loss,
        learning,
        seed=seed,
        advance=problem.advance,
        start=leaning,
        judge=samples.judge,
    )


def _learning_bytes(layers: Sequence[CalibratedLayer], config: Rounding) -> int:
    """Logits, their gradient and Adam's two moments, the floor, and about as much between a loss and its
    gradient.
    """
    return 40 * sum(layer.weight.numel() for layer in layers)


def _closed_form_bytes(layers: Sequence[CalibratedLayer], config: Rounding) -> int:
    """The hessian of one layer in float64, in order, factored and inverted, its weights as target, codes,
    scales and gradients, and the moments of layers that were gathered with it.
    """
    gathered = [moments_bytes(layer, config.widest) for layer in layers]
    beside = min(sum(gathered) - max(gathered, default=0), (TOGETHER - 1) * max(gathered, default=0))
    return beside + max((_layer_bytes(layer, config.widest) for layer in layers), default=0)


def _layer_bytes(layer: CalibratedLayer, widest: int) -> int:
    solved = 5 * min(layer.weight[0].numel(), widest) ** 2
    return moments_bytes(layer, widest) + 8 * layer.operation.groups * solved + 60 * layer.weight.numel()


SOLVERS: dict[str, Solver] = {
    "nearest": Solver(nearest, lambda learning, layers: 0, runs_full=False, memory=lambda layers, config: 0),
    "adaround": Solver(
        adaround, lambda learning, layers: learning.iterations, runs_full=False, memory=_learning_bytes
    ),
    "gptq": Solver(gptq, lambda learning, layers: layers, runs_full=True, memory=_closed_form_bytes),
    "gptq_adaround": Solver(
        gptq_adaround,
        lambda learning, layers: layers + learning.iterations,
        runs_full=True,
        memory=lambda layers, config: max(
            _learning_bytes(layers, config), _closed_form_bytes(layers, config)
        ),
    ),
}
