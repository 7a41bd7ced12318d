"""How an operand is quantized, and with it a layer: values that a plan holds and calibration fits."""

from dataclasses import dataclass
from typing import Literal

from tfmq.numerics.grids import Grid, IntegerFormat
from tfmq.quantizers.activation import ActivationQuantizer
from tfmq.quantizers.dynamic import DynamicQuantizer
from tfmq.quantizers.input import InputQuantizer
from tfmq.quantizers.steps import StepContext

RangeMethod = Literal["search", "min_max"]
Tokens = Literal["static", "dynamic", "measured"]
Key = Literal["none", "timestep", "measured"]


@dataclass(frozen=True, kw_only=True)
class OperandScheme:
    """How an operand is quantized; as it stands, the rows of an embedding, which have a scale each.

    Attributes:
        grid: the values that a code can have.
        ranges: how scales are found: exact extremes (`min_max`) or those of least error (`search`).
        segments: widths of the parts of the input's channels that have scales of their own; `()` is one for
            all.
    """

    grid: Grid
    ranges: RangeMethod
    segments: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class WeightScheme(OperandScheme):
    """How the weight of a layer is quantized.

    Attributes:
        group: most channels of a group that has a step of its own; 0 is one for a row.
        choices: grids and groups among which the error of the layer's output decides, `grid` and `group`
            among them; none where there is nothing to choose.
    """

    group: int = 0
    choices: tuple[tuple[Grid, int], ...] = ()


@dataclass(frozen=True, kw_only=True)
class ActivationScheme(OperandScheme):
    """How an activation is quantized, on a uniform grid.

    Attributes:
        key: what has grids of its own: nothing (`none`), each timestep, or each timestep until
            calibration finds that one for all does as well (`measured`).
        shared: whether the grids of all timesteps have one zero-point.
        finite: whether the input takes one value a timestep, so that its extremes are exact.
        tokens: whether the grids are fitted in calibration (`static`), are those of each token at each call
            (`dynamic`), or are static until calibration has compared the two (`measured`).
    """

    grid: IntegerFormat
    key: Key = "none"
    shared: bool = False
    finite: bool = False
    tokens: Tokens = "static"

    def zero_points(self, site: str) -> tuple[int, ...]:
        """Return the codes that the one zero-point of the quantizer called `site` may be; none where each
        timestep has its own.

        A product of two activations is an integer product in engines if the right one has signed codes, and
        the left one signed or unsigned ones.
        """
        if not self.shared:
            return ()
        middle = self.grid.middle
        sides = {".tfmq_products.left.": (0, middle), ".tfmq_products.right.": (middle,)}
        return next(
            (codes for side, codes in sides.items() if side in f".{site}."), tuple(range(self.grid.levels))
        )

    def quantizer(self, steps: StepContext, *, axis: int = 1) -> InputQuantizer:
        """Return the quantizer, unfitted; the channels are on `axis`."""
        if self.tokens == "dynamic":
            return DynamicQuantizer(self.grid, segments=self.segments)
        return ActivationQuantizer(
            self.grid, steps=None if self.key == "none" else steps, segments=self.segments, axis=axis
        )


@dataclass(frozen=True, kw_only=True)
class LayerScheme:
    """How a layer is quantized: its weight, and its input unless that stays in full precision.

    Attributes:
        rank: the rank of the branch beside it; 0 is none.
        equalizers: names of those that propose a factor for each channel of the input.
        rotation: most channels of a group that may be rotated; 0 rotates nothing.
        clusters: most clusters of channels of the input that may have grids of their own; 0 makes none.
    """

    weight: WeightScheme
    input: ActivationScheme | None
    rank: int = 0
    equalizers: tuple[str, ...] = ()
    rotation: int = 0
    clusters: int = 0

    @property
    def transforms(self) -> bool:
        """Whether there is a choice of what becomes of the input before its grid."""
        return bool(self.equalizers or self.rotation or self.clusters)
