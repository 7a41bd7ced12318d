"""The recipe value and its parts; every field is checked when it is made."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatchcase
from math import inf
from typing import Any, Literal, TypeVar

from tfmq.errors import shown
from tfmq.nn.scheme import RangeMethod, Tokens
from tfmq.nn.temporal import TableFormat
from tfmq.numerics.equivalence import EQUALIZERS
from tfmq.numerics.estimators import ESTIMATORS
from tfmq.numerics.grids import GRIDS, UNIFORM, Grid, IntegerFormat, table
from tfmq.recipes.published import Published
from tfmq.reconstruction.learning import Learning
from tfmq.reconstruction.solvers import Rounding

PerStep = Literal["none", "temporal", "measured", "all"]
ZeroPoints = Literal["per_step", "shared"]
Split = bool | Literal["direct"]
Spacing = Literal["quadratic"]
Maintenance = Literal["none", "block", "cache", "selected"]
SelectionScope = Literal["key", "feature", "step", "global"]
Part = TypeVar("Part", "Weights", "Activations")
ROLES = ("role:first", "role:last", "role:temporal")


def _choice(name: str, value: object, allowed: tuple[str | bool, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {shown(value)}; it must be one of {', '.join(map(str, allowed))}")


def _each(name: str, values: tuple[str, ...], allowed: tuple[str, ...]) -> None:
    for value in values:
        _choice(name, value, allowed)
    if len(set(values)) < len(values):
        raise ValueError(f"{name} has one twice: {', '.join(values)}")


def _format(bits: int | None, symmetric: bool) -> IntegerFormat | None:
    return None if bits is None else IntegerFormat(bits, symmetric)


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Weight grids, per output channel. `bits` None keeps full precision.

    Attributes:
        bits: of a code.
        grid: what codes of this many bits stand for: evenly spaced values (`uniform`), or those of a table of
            `tfmq.numerics.grids` (`e2m1`). Layers of other bits are uniform.
        symmetric: of uniform grids; None is symmetric at 8 bits, where `code - zero_point` must fit a signed
            byte, and asymmetric below, where it always does.
        ranges: how scales are found.
        embeddings: the bits of the rows of embeddings, which have a uniform grid each; a row is read as it
            is, so that nothing evens out its error.
    """

    bits: int | None = 4
    grid: str = UNIFORM
    symmetric: bool | None = None
    ranges: RangeMethod = "search"
    embeddings: int | None = 8

    def __post_init__(self) -> None:
        _choice("weights.ranges", self.ranges, ("search", "min_max"))
        _choice("weights.grid", self.grid, (UNIFORM, *GRIDS))
        self.uniform(self.bits)
        self.uniform(self.embeddings)

    def uniform(self, bits: int | None) -> IntegerFormat | None:
        """Return the evenly spaced grid of `bits`."""
        return _format(bits, bits == 8 if self.symmetric is None else self.symmetric)

    def format(self) -> Grid | None:
        """Return the grid of a layer; None in full precision."""
        listed = table(self.grid)
        return listed if listed is not None and listed.bits == self.bits else self.uniform(self.bits)


@dataclass(frozen=True, kw_only=True)
class Activations:
    """Activation grids, per tensor. `bits` None keeps full precision.

    Attributes:
        per_step: the scope of finite set calibration: no quantizer (`none`), those of the temporal block
            (`temporal`, the paper), all (`all`, the released code), or beside the temporal block those that
            one grid for all timesteps costs more than 1 dB of accuracy (`measured`).
        zero_points: whether the grids of one quantizer have a zero-point for each timestep (`per_step`), or
            one for all timesteps (`shared`), whose scales are then as large as that zero-point needs to cover
            the same range. In attention products the shared one is the middle code, or 0 on the left. Integer
            engines that want the zero-point as a constant run faster with it, and some compute products of
            activations in integers with it alone.
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
    """

    bits: int | None = 8
    symmetric: bool = False
    ranges: RangeMethod = "search"
    per_step: PerStep = "all"
    zero_points: ZeroPoints = "per_step"
    products: bool = True
    split: Split = True
    tokens: Tokens = "static"

    def __post_init__(self) -> None:
        _choice("activations.tokens", self.tokens, ("static", "dynamic", "measured"))
        _choice("activations.ranges", self.ranges, ("search", "min_max"))
        _choice("activations.per_step", self.per_step, ("none", "temporal", "measured", "all"))
        _choice("activations.zero_points", self.zero_points, ("per_step", "shared"))
        _choice("activations.split", self.split, (True, False, "direct"))
        self.format()

    def format(self) -> IntegerFormat | None:
        """Return the grid of an input; None in full precision."""
        return _format(self.bits, self.symmetric)

    def segments(self, widths: tuple[int, ...], *, direct: bool) -> tuple[int, ...]:
        """Return the `widths` of a concatenation that get grids of their own; `direct` says that a layer
        reads the concatenated tensor itself.
        """
        return widths if self.split is True or (self.split == "direct" and direct) else ()


@dataclass(frozen=True, kw_only=True)
class Temporal:
    """What keeps temporal features intact.

    Attributes:
        maintenance: `none` (temporal layers are ordinary members of their blocks), `block` (TIAR), `cache`
            (TIAR, and a table that replaces the features of the calibrated schedule), `selected` (whichever
            of the two disturbs a feature less).
        table: storage of the cache.
        scope: what one choice of `selected` covers: a feature at a step, a feature, a step, or everything.
        learning: hyper-parameters of TIAR.
    """

    maintenance: Maintenance = "cache"
    table: TableFormat = "int8"
    scope: SelectionScope = "key"
    learning: Learning = field(default_factory=lambda: Learning(iterations=1000, learning_rate=1e-2))

    def __post_init__(self) -> None:
        _choice("temporal.maintenance", self.maintenance, ("none", "block", "cache", "selected"))
        _choice("temporal.table", self.table, ("int8", "float16"))
        _choice("temporal.scope", self.scope, ("key", "feature", "step", "global"))


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
        eta, guidance_scale: passed to the pipeline's call, in calibration and when the quantized model is
            opened again; None leaves them to the pipeline. `eta` is that of DDIM.
        spacing: of the timesteps: None is the scheduler's own, `quadratic` DDIM's at the squares of even
            steps.
        judged: images for each of the samples, rounded down, by which the whole model is judged in the end.
            They are drawn from noise of their own by the model that the recipe makes, by the plainest one of
            the same bits, and in full precision. 0 judges nothing.
    """

    samples: int = 32
    steps: int = 50
    interval: int = 2
    batch_size: int = 16
    eta: float | None = None
    guidance_scale: float | None = None
    spacing: Spacing | None = None
    judged: float = 0.25

    def __post_init__(self) -> None:
        if not 0 <= self.judged < inf:
            raise ValueError(f"calibration.judged must be finite and not negative, got {self.judged}")
        for name in ("samples", "steps", "interval", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"calibration.{name} must be at least 1, got {getattr(self, name)}")
        for name, value in (("eta", self.eta), ("guidance_scale", self.guidance_scale)):
            if value is not None and not 0 <= value < inf:
                raise ValueError(f"calibration.{name} must be finite and not negative, got {value}")
        if self.spacing is not None:
            _choice("calibration.spacing", self.spacing, ("quadratic",))


@dataclass(frozen=True, kw_only=True)
class Rescaling:
    """A factor for each input channel of a layer outside of the temporal block: the input is multiplied by
    it, and the weight divided.

    Attributes:
        equalizers: propose factors, `ranges` and `peaks`. The factor one is always a candidate, and the error
            of the layer's output on what it reads in calibration decides; with no equalizer nothing is
            rescaled.
    """

    equalizers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _each("rescaling.equalizers", self.equalizers, tuple(EQUALIZERS))


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
        _each("correction.estimators", self.estimators, tuple(ESTIMATORS))


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What is different in the layers that `match`: a name pattern (`*.conv_shortcut`), or a role
    (`role:first`, `role:last`, `role:temporal`).

    Attributes:
        match: the pattern or role.
        weights, activations: fields of `Weights` and `Activations`, with the values that these layers have in
            the place of the recipe's own. `{"bits": None}` is full precision. Where rules match the same
            layer, the first that has a field decides on it.
    """

    match: str
    weights: Mapping[str, Any] = field(default_factory=dict, hash=False, metadata={"changes": Weights})
    activations: Mapping[str, Any] = field(
        default_factory=dict, hash=False, metadata={"changes": Activations}
    )

    def __post_init__(self) -> None:
        if self.match.startswith("role:") and self.match not in ROLES:
            raise ValueError(f"unknown role {shown(self.match)}; it must be one of {', '.join(ROLES)}")
        if not self.weights and not self.activations:
            raise ValueError(f"the rule {shown(self.match)} changes nothing; give it weights or activations")
        _changed(Weights(), self.weights, "weights")
        _changed(Activations(), self.activations, "activations")

    def matches(self, name: str, roles: frozenset[str]) -> bool:
        """Whether the rule covers the layer `name`, which plays `roles`."""
        return self.match in roles or fnmatchcase(name, self.match)


def _changed(part: Part, changes: Mapping[str, Any], name: str) -> Part:
    """Return a part of a recipe with some of its fields changed."""
    known = [field.name for field in fields(part)]
    unknown = [key for key in changes if key not in known]
    if unknown:
        raise ValueError(f"unknown key {name}.{shown(unknown[0])} of a rule; it may have {', '.join(known)}")
    return replace(part, **changes)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides how a model is quantized. Presets are functions in `tfmq.recipes.presets`; YAML
    is a serialisation.
    """

    name: str
    weights: Weights = field(default_factory=Weights)
    activations: Activations = field(default_factory=Activations)
    temporal: Temporal = field(default_factory=Temporal)
    rounding: Rounding = field(default_factory=Rounding)
    learning: Learning = field(default_factory=Learning)
    calibration: Calibration = field(default_factory=Calibration)
    rescaling: Rescaling = field(default_factory=Rescaling)
    correction: Correction = field(default_factory=Correction)
    rules: tuple[Rule, ...] = ()
    published: tuple[Published, ...] = ()

    def __post_init__(self) -> None:
        listed = table(self.weights.grid)
        if listed is not None and self.weights.bits not in (None, listed.bits):
            raise ValueError(
                f"weights.grid {listed.name} has {listed.bits} bits, and weights.bits is {self.weights.bits}"
            )

    def scheme(self, name: str, roles: frozenset[str] = frozenset()) -> tuple[Weights, Activations]:
        """Return the weights and activations of the layer `name`, which plays `roles`: the recipe's own, as
        the rules change them.
        """
        weights, activations = self.weights, self.activations
        # The first rule has the last word.
        for rule in reversed(self.rules):
            if rule.matches(name, roles):
                weights = _changed(weights, rule.weights, "weights")
                activations = _changed(activations, rule.activations, "activations")
        return weights, activations

    def rows_of(self, name: str) -> IntegerFormat | None:
        """Return the grid of the rows of the embedding `name`, None for full precision. Their bits are those
        that a rule gives its weights, else the recipe's `embeddings`.
        """
        weights, _ = self.scheme(name)
        ruled = any("bits" in rule.weights for rule in self.rules if rule.matches(name, frozenset()))
        if ruled or self.weights.bits is None:
            return weights.uniform(weights.bits)
        return weights.uniform(weights.embeddings)
