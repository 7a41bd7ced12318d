"""The recipe value and its parts; every field is checked when it is made."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatchcase
from typing import Any, TypeVar

from tfmq.errors import shown
from tfmq.numerics.grids import IntegerFormat, table
from tfmq.recipes.operands import Activations, PerStep, Split, Weights, ZeroPoints
from tfmq.recipes.published import Published
from tfmq.recipes.stages import (
    Branch,
    Calibration,
    Correction,
    Maintenance,
    Rescaling,
    SelectionScope,
    Spacing,
    Temporal,
    Tolerance,
    call_options,
)
from tfmq.reconstruction.learning import Learning
from tfmq.reconstruction.solvers import Rounding
from tfmq.reconstruction.tuning import Tuning

__all__ = [
    "Activations",
    "Branch",
    "Calibration",
    "Correction",
    "Maintenance",
    "PerStep",
    "Recipe",
    "Rescaling",
    "Rule",
    "SelectionScope",
    "Spacing",
    "Split",
    "Temporal",
    "Tolerance",
    "Tuning",
    "Weights",
    "ZeroPoints",
    "call_options",
]

Part = TypeVar("Part", "Weights", "Activations", "Rescaling")
ROLES = ("role:first", "role:last", "role:temporal")


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What is different in the layers that `match`: a name pattern (`*.conv_shortcut`), or a role
    (`role:first`, `role:last`, `role:temporal`).

    Attributes:
        match: the pattern or role.
        weights, activations, rescaling: fields of `Weights`, `Activations` and `Rescaling`, with the values
            that these layers have in the place of the recipe's own. `{"bits": None}` is full precision. Where
            rules match the same layer, the first that has a field decides on it.
    """

    match: str
    weights: Mapping[str, Any] = field(default_factory=dict, hash=False, metadata={"changes": Weights})
    activations: Mapping[str, Any] = field(
        default_factory=dict, hash=False, metadata={"changes": Activations}
    )
    rescaling: Mapping[str, Any] = field(default_factory=dict, hash=False, metadata={"changes": Rescaling})

    def __post_init__(self) -> None:
        if self.match.startswith("role:") and self.match not in ROLES:
            raise ValueError(f"unknown role {shown(self.match)}; it must be one of {', '.join(ROLES)}")
        if not self.changes:
            raise ValueError(
                f"the rule {shown(self.match)} changes nothing; give it weights, activations or rescaling"
            )
        weights = _changed(Weights(), self.weights, "weights")
        if "bits" in self.weights:
            weights.check_room()
        _changed(Activations(), self.activations, "activations")
        _changed(Rescaling(), self.rescaling, "rescaling")

    @property
    def changes(self) -> frozenset[tuple[str, str]]:
        """The parts and fields of a recipe that the rule decides on."""
        parts = {"weights": self.weights, "activations": self.activations, "rescaling": self.rescaling}
        return frozenset((part, key) for part, values in parts.items() for key in values)

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

    `components` has recipes of further networks of a pipeline, such as its decoder, by patterns of their
    names (`vae`, `vae.decoder`, `text_encoder*`); the first that fits counts, and a network that none fits
    has a recipe for its kind. Their calibration is part of that of this one.
    """

    name: str
    weights: Weights = field(default_factory=Weights)
    activations: Activations = field(default_factory=Activations)
    temporal: Temporal = field(default_factory=Temporal)
    rounding: Rounding = field(default_factory=Rounding)
    learning: Learning = field(default_factory=Learning)
    calibration: Calibration = field(default_factory=Calibration)
    rescaling: Rescaling = field(default_factory=Rescaling)
    branch: Branch = field(default_factory=Branch)
    correction: Correction = field(default_factory=Correction)
    tuning: Tuning = field(default_factory=Tuning)
    tolerance: Tolerance = field(default_factory=Tolerance)
    rules: tuple[Rule, ...] = ()
    published: tuple[Published, ...] = ()
    components: Mapping[str, "Recipe"] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        self.weights.check_room()
        listed = table(self.weights.grid)
        if listed is not None and self.weights.bits not in (None, listed.bits):
            raise ValueError(
                f"weights.grid {listed.name} has {listed.bits} bits, and weights.bits is {self.weights.bits}"
            )

    def scheme(
        self, name: str, roles: frozenset[str] = frozenset()
    ) -> tuple[Weights, Activations, Rescaling]:
        """Return the weights, activations and rescaling of the layer `name`, which plays `roles`: those of
        the recipe, as the rules change them.
        """
        weights, activations, rescaling = self.weights, self.activations, self.rescaling
        # The first rule has the last word.
        for rule in reversed(self.rules):
            if rule.matches(name, roles):
                weights = replace(weights, **rule.weights)
                activations = replace(activations, **rule.activations)
                rescaling = replace(rescaling, **rule.rescaling)
        return weights, activations, rescaling

    def of_network(self, name: str) -> "Recipe | None":
        """Return the recipe of a further network, by its name or that of its component; None where there is
        none for it.
        """
        component = name.partition(".")[0]
        fitting = (
            recipe
            for pattern, recipe in self.components.items()
            if fnmatchcase(name, pattern) or fnmatchcase(component, pattern)
        )
        return next(fitting, None)

    def rows_of(self, name: str) -> IntegerFormat | None:
        """Return the grid of the rows of the embedding `name`, None for full precision. Their bits are those
        that a rule gives its weights, else the recipe's `embeddings`.
        """
        weights, *_ = self.scheme(name)
        ruled = any("bits" in rule.weights for rule in self.rules if rule.matches(name, frozenset()))
        if ruled or self.weights.bits is None:
            return weights.uniform(weights.bits)
        return weights.uniform(weights.embeddings)
