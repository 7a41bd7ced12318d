"""The parts of a recipe that are not about grids: temporal features, calibration, rescaling, branches,
correction.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf
from typing import Any, Literal

from tfmq.nn.branch import BRANCH_TYPES, BranchType
from tfmq.nn.temporal import TableFormat
from tfmq.numerics.equivalence import EQUALIZERS
from tfmq.numerics.estimators import ESTIMATORS
from tfmq.numerics.low_rank import SPLITTERS
from tfmq.numerics.rotation import is_group
from tfmq.recipes.checks import choice, each
from tfmq.reconstruction.learning import Learning
from tfmq.reconstruction.solvers import Rounding

Spacing = Literal["quadratic"]
Maintenance = Literal["none", "block", "cache", "selected"]
SelectionScope = Literal["key", "feature", "step", "global"]


@dataclass(frozen=True, kw_only=True)
class Temporal:
    """What keeps temporal features intact.

    Attributes:
        maintenance: `none` (temporal layers are ordinary members of their blocks), `block` (TIAR), `cache`
            (TIAR, and a table that replaces the features of the calibrated schedule), `selected` (whichever
            of the two disturbs a feature less).
        table: storage of the cache.
        scope: what one choice of `selected` covers: a feature at a step, a feature, a step, or everything.
        rounding: how TIAR finds codes; the papers' way is `adaround`.
        learning: hyper-parameters of learned rounding in TIAR.
    """

    maintenance: Maintenance = "cache"
    table: TableFormat = "int8"
    scope: SelectionScope = "key"
    rounding: Rounding = field(default_factory=Rounding)
    learning: Learning = field(default_factory=lambda: Learning(iterations=1000, learning_rate=1e-2))

    def __post_init__(self) -> None:
        choice("temporal.maintenance", self.maintenance, ("none", "block", "cache", "selected"))
        choice("temporal.table", self.table, ("int8", "float16"))
        choice("temporal.scope", self.scope, ("key", "feature", "step", "global"))


def call_options(calibration: Mapping[str, Any]) -> dict[str, Any]:
    """Return how a pipeline is to be called by the fields of a calibration: `eta`, `guidance_scale` and
    `spacing`, as far as they are set.
    """
    return {
        name: calibration[name]
        for name in ("eta", "guidance_scale", "spacing")
        if calibration.get(name) is not None
    }


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The trajectory that calibration runs on: `samples` images of `steps` steps each; weights learn from
    every `interval`-th step.

    Attributes:
        learned: samples that weights learn from at most, those of all these steps together. Where there are
            more, samples take turns from step to step. None learns from all.
        eta, guidance_scale: passed to the pipeline's call, in calibration and when the quantized model is
            opened again; None leaves them to the pipeline. `eta` is that of DDIM.
        spacing: how the timesteps are spaced: None leaves that to the scheduler, `quadratic` is DDIM's
            spacing at the squares of even steps.
        judged: images for each of the samples, rounded down, by which the whole model is judged in the end.
            They are drawn from noise of their own by the model that the recipe makes, by the plainest one of
            the same bits, and in full precision. 0 judges nothing.
    """

    samples: int = 32
    steps: int = 50
    interval: int = 2
    learned: int | None = 512
    batch_size: int = 16
    eta: float | None = None
    guidance_scale: float | None = None
    spacing: Spacing | None = None
    judged: float = 0.25

    def __post_init__(self) -> None:
        if not 0 <= self.judged < inf:
            raise ValueError(f"calibration.judged must be finite and not negative, got {self.judged}")
        for name in ("samples", "steps", "interval", "learned", "batch_size"):
            if (given := getattr(self, name)) is not None and given < 1:
                raise ValueError(f"calibration.{name} must be at least 1, got {given}")
        for name, value in (("eta", self.eta), ("guidance_scale", self.guidance_scale)):
            if value is not None and not 0 <= value < inf:
                raise ValueError(f"calibration.{name} must be finite and not negative, got {value}")
        if self.spacing is not None:
            choice("calibration.spacing", self.spacing, ("quadratic",))

    @property
    def turns(self) -> int:
        """Of how many steps that weights learn from each sample is at one."""
        count = self.samples * -(-self.steps // self.interval)
        return 1 if self.learned is None else -(-count // self.learned)


@dataclass(frozen=True, kw_only=True)
class Rescaling:
    """What inputs of layers outside of the temporal block are multiplied by before they are quantized, with
    the opposite in the weight: a factor for each channel, or a rotation of groups of channels.

    For each layer the error of its output on what it reads in calibration decides; to leave the input as it
    comes is always a candidate.

    Attributes:
        equalizers: propose factors, `ranges` and `peaks`; with none nothing is rescaled.
        rotation: most channels of a group that linear layers rotate by a Hadamard matrix, a power of four
            such as 256 (ConvRot, arXiv 2512.03673); 0 rotates nothing. Groups of other layers are as large as
            their width, and its segments, divide into.
    """

    equalizers: tuple[str, ...] = ()
    rotation: int = 0

    def __post_init__(self) -> None:
        each("rescaling.equalizers", self.equalizers, tuple(EQUALIZERS))
        if self.rotation and not is_group(self.rotation):
            raise ValueError(f"rescaling.rotation must be 0 or a power of four, got {self.rotation}")


@dataclass(frozen=True, kw_only=True)
class Branch:
    """How weights are parted into two thin factors, which are computed beside the layer, and the rest, which
    is quantized. `weights.rank` says which layers outside of the temporal block have such a branch, and of
    which rank.

    For each layer the error of its output on inputs that no factor was fitted to decides, under every
    rescaling of the recipe; to have no branch is always a candidate.

    Attributes:
        splitters: propose factors: `weighted`, `plain`, `alternating`; with none no layer has a branch.
        dtype: dtype of both factors. In floating point they read the input before its quantizer; `int8` ones
            read its codes, as the weight does, for inputs of 8 bits; `int8_weight_only` ones are stored as
            bytes and read what those in floating point do.
    """

    splitters: tuple[str, ...] = ("weighted", "plain")
    dtype: BranchType = "float16"

    def __post_init__(self) -> None:
        each("branch.splitters", self.splitters, tuple(SPLITTERS))
        choice("branch.dtype", self.dtype, BRANCH_TYPES)


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """How large the errors of a network may be on held-out calls. What exceeds it is left in full precision:
    layers whose own output has too large an error, then the worst others until the network's output is near
    enough.

    Attributes:
        layer: the most energy of the error of a layer's output over that of the output; None measures no
            layer.
        output: the same bound on the error of the network's output; None sets none.
        instead: what becomes of a layer that is too far off: it stays in floating point (`float`), or its
            input does (`weights`).
    """

    layer: float | None = None
    output: float | None = None
    instead: Literal["float", "weights"] = "float"

    def __post_init__(self) -> None:
        choice("tolerance.instead", self.instead, ("float", "weights"))
        for name, value in (("layer", self.layer), ("output", self.output)):
            if value is not None and not 0 < value < inf:
                raise ValueError(f"tolerance.{name} must be finite and above 0, got {value}")

    @property
    def measures(self) -> bool:
        """Whether there is a bound at all."""
        return self.layer is not None or self.output is not None


@dataclass(frozen=True, kw_only=True)
class Correction:
    """What is added to and multiplied with each channel of a prediction, step by step, so that it is nearer
    to full precision's.

    A batch of images is drawn in full precision and by the quantized model, from the same noise. Every other
    image fits, the others decide.

    Attributes:
        estimators: the candidates of each step, the simplest first: `bias`, `gain`, `affine`. No correction
            is always one; with none of them nothing is corrected.
    """

    estimators: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        each("correction.estimators", self.estimators, tuple(ESTIMATORS))
