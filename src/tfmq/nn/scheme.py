"""How an operand is quantized, and with it a layer: values that a plan holds and calibration fits."""

from dataclasses import dataclass
from typing import Literal

from tfmq.numerics.formats import IntegerFormat
from tfmq.quantizers.activation import ActivationQuantizer
from tfmq.quantizers.dynamic import DynamicQuantizer
from tfmq.quantizers.input import InputQuantizer
from tfmq.quantizers.steps import StepContext

RangeMethod = Literal["search", "min_max"]
Tokens = Literal["static", "dynamic", "measured"]
Key = Literal["none", "timestep", "measured"]


@dataclass(frozen=True, kw_only=True)
class OperandScheme:
    """How a weight or an activation is quantized.

    Attributes:
        grid: the values that a code can have.
        ranges: how scales are found: exact extremes (`min_max`) or those of least error (`search`).
        segments: widths of the parts of the channels that have grids of their own; `()` is one for all. A
            weight has a grid for each of its rows besides.
        key: what else has grids of its own: nothing (`none`), each timestep, or each timestep until
            calibration finds that one for all does as well (`measured`).
        shared: whether the grids of all timesteps have one zero-point.
        tokens: whether the grids are fitted in calibration (`static`), are those of each token at each call
            (`dynamic`), or are static until calibration has compared the two (`measured`).
    """

    grid: IntegerFormat
    ranges: RangeMethod
    segments: tuple[int, ...] = ()
    key: Key = "none"
    shared: bool = False
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
        """Return the quantizer of an activation with channels on `axis`, unfitted."""
        if self.tokens == "dynamic":
            return DynamicQuantizer(self.grid, segments=self.segments)
        return ActivationQuantizer(
            self.grid, steps=None if self.key == "none" else steps, segments=self.segments, axis=axis
        )


@dataclass(frozen=True, kw_only=True)
class LayerScheme:
    """How a layer is quantized: its weight, and its input unless that stays in full precision."""

    weight: OperandScheme
    input: OperandScheme | None
