"""The parts of a recipe that say how weights and activations are quantized."""

from dataclasses import dataclass
from typing import Literal

from tfmq.nn.scheme import RangeMethod, Tokens
from tfmq.numerics.grids import GRIDS, UNIFORM, Grid, IntegerFormat, table
from tfmq.numerics.groups import has_room
from tfmq.recipes.checks import choice, each, group, natural

PerStep = Literal["none", "temporal", "measured", "all"]
ZeroPoints = Literal["per_step", "products", "shared"]
Split = bool | Literal["direct"]


def _format(bits: int | None, symmetric: bool) -> IntegerFormat | None:
    return None if bits is None else IntegerFormat(bits, symmetric)


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Weight grids, per output channel. `bits` None keeps full precision.

    Attributes:
        bits: bits of a code.
        grid: what codes of this many bits stand for: evenly spaced values (`uniform`), or those of a table of
            `tfmq.numerics.grids` (`e2m1`). Layers of other bits are uniform.
        symmetric: whether uniform grids are symmetric; None means yes at 8 bits, where `code - zero_point`
            must fit a signed byte, and no below, where it always does.
        ranges: how scales are found.
        embeddings: the bits of the rows of embeddings, which have a uniform grid each; a row is read as it
            is, so that nothing evens out its error.
        group: most input channels of a row with a step of their own (`numerics.groups`); 0 is one a row.
        grids, groups: what to choose from beside `grid` and `group`, by the error of a layer's output in
            calibration, against the bits of a weight with all that it stores.
        rank: rank of the branch beside the codes (see `Branch`); 0 means no branch.
    """

    bits: int | None = 4
    grid: str = UNIFORM
    symmetric: bool | None = None
    ranges: RangeMethod = "search"
    embeddings: int | None = 8
    group: int = 0
    grids: tuple[str, ...] = ()
    groups: tuple[int, ...] = ()
    rank: int = 0

    def __post_init__(self) -> None:
        choice("weights.ranges", self.ranges, ("search", "min_max"))
        choice("weights.grid", self.grid, (UNIFORM, *GRIDS))
        each("weights.grids", self.grids, (UNIFORM, *GRIDS))
        group("weights.group", self.group)
        group("weights.groups", *self.groups)
        self.format()
        natural("weights.rank", self.rank)
        self.uniform(self.embeddings)

    def uniform(self, bits: int | None) -> IntegerFormat | None:
        """Return the evenly spaced grid of `bits`."""
        return _format(bits, bits == 8 if self.symmetric is None else self.symmetric)

    def format(self) -> Grid | None:
        """Return the grid of a layer; None in full precision."""
        return self._of_bits(self.grid)

    def _of_bits(self, name: str) -> Grid | None:
        listed = table(name)
        return listed if listed is not None and listed.bits == self.bits else self.uniform(self.bits)

    def choices(self) -> tuple[tuple[Grid, int], ...]:
        """Return the grids and groups that a layer may have, the recipe's own first; none where there is
        nothing to choose.
        """
        grids = [grid for name in (self.grid, *self.grids) if (grid := self._of_bits(name)) is not None]
        found = dict.fromkeys(
            (grid, group if has_room(grid) else 0) for grid in grids for group in (self.group, *self.groups)
        )
        return tuple(found) if len(found) > 1 else ()

    def check_room(self) -> None:
        """Refuse groups where no grid leaves them room.

        Raises:
            ValueError: says for how many bits there is.
        """
        grids = [grid for name in (self.grid, *self.grids) if (grid := self._of_bits(name)) is not None]
        if (self.group or any(self.groups)) and grids and not any(map(has_room, grids)):
            raise ValueError(
                f"weights.group needs a grid of small integers, as uniform ones of at most five bits have; "
                f"{self.grid} of {self.bits} bits leaves no room for multiples of its scale in eight"
            )


@dataclass(frozen=True, kw_only=True)
class Activations:
    """Activation grids, per tensor. `bits` None keeps full precision.

    Attributes:
        per_step: the scope of finite set calibration: no quantizer (`none`), those of the temporal block
            (`temporal`, the paper), all (`all`, the released code), or beside the temporal block those that
            one grid for all timesteps costs more than 1 dB of accuracy (`measured`).
        zero_points: whether the grids of one quantizer have a zero-point for each timestep (`per_step`), or
            one for all timesteps (`shared`; `products` alone: those of attention), whose scales are then as
            large as that zero-point needs to cover the same range. In attention products the shared one is
            the middle code, or 0 on the left. Some integer engines run faster with it, or compute products
            of activations with it alone.
        products: quantize attention's q, k, v and post-softmax map.
        split: give each source of a channel concatenation its own grid, in activations and weights: in every
            layer that reads one (True), in none (False), or in those that read the concatenated tensor itself
            (`direct`), a shortcut for one, as Q-Diffusion and the code released with TFMQ-DM do. Behind a
            normalisation the parts are alike already.
        tokens: grids of the linear layers outside of the temporal block: `static` ones from calibration,
            `dynamic` ones of each token at each call, or `measured`: for each layer whichever of the two
            gives less output error on the calibration calls. Convolutions, temporal layers and attention
            products are static: sums over places have no grid of each place, and finite sets have exact
            ranges.
        group: channels of the inputs of linear layers outside of the temporal block that have a grid of their
            own, and their weights with them, sized as those of `weights.group`; 0 is one for all. An engine
            multiplies group by group, which takes more than twice the time.
        clusters: most clusters of alike channels of an input outside of the temporal block that have a grid
            of their own, and their weights with them, where that takes away enough of the output's error; 0
            makes none. An engine multiplies cluster by cluster.
    """

    bits: int | None = 8
    symmetric: bool = False
    ranges: RangeMethod = "search"
    per_step: PerStep = "all"
    zero_points: ZeroPoints = "per_step"
    products: bool = True
    split: Split = True
    tokens: Tokens = "static"
    group: int = 0
    clusters: int = 0

    def __post_init__(self) -> None:
        group("activations.group", self.group)
        natural("activations.clusters", self.clusters)
        if self.group and self.clusters:
            raise ValueError(
                "activations.group and activations.clusters both part the channels; set one to 0"
            )
        choice("activations.tokens", self.tokens, ("static", "dynamic", "measured"))
        choice("activations.ranges", self.ranges, ("search", "min_max"))
        choice("activations.per_step", self.per_step, ("none", "temporal", "measured", "all"))
        choice("activations.zero_points", self.zero_points, ("per_step", "products", "shared"))
        choice("activations.split", self.split, (True, False, "direct"))
        self.format()

    def format(self) -> IntegerFormat | None:
        """Return the grid of an input; None in full precision."""
        return _format(self.bits, self.symmetric)

    def segments(self, widths: tuple[int, ...], *, direct: bool) -> tuple[int, ...]:
        """Return the `widths` of a concatenation that get grids of their own; `direct` says that a layer
        reads the concatenated tensor itself.
        """
        return widths if self.split is True or (self.split == "direct" and direct) else ()
