"""The methods that benchmarks compare, each a change of a scheme's recipe, and the cells of the leaderboard
that they make.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import tfmq
from tfmq.recipes.paper import released
from tfmq.recipes.presets import (
    brecq,
    cluster,
    fast,
    fp4,
    group,
    rotate,
    rtn,
    smooth,
    svd,
    transformer,
    tuned,
)
from tfmq.recipes.recipe import Correction, Recipe, Rescaling


def gptq(recipe: Recipe) -> Recipe:
    """The solver of the tfmq rows and, like `brecq`, nothing that maintains temporal features."""
    return replace(brecq(recipe), name=recipe.name.replace("tfmq", "gptq"), rounding=recipe.rounding)


def min_max(recipe: Recipe) -> Recipe:
    """Round to nearest on grids from the least to the greatest value, where `rtn` searches for the range of
    least error.
    """
    nearest = rtn(recipe)
    weights, activations = (
        replace(nearest.weights, ranges="min_max"),
        replace(nearest.activations, ranges="min_max"),
    )
    return replace(
        nearest, name=recipe.name.replace("tfmq", "min_max"), weights=weights, activations=activations
    )


def unit_gain(recipe: Recipe) -> Recipe:
    """The preset, each channel of whose layers follows full precision with gain one."""
    return replace(
        recipe,
        name=recipe.name.replace("tfmq", "unit_gain"),
        rounding=replace(recipe.rounding, unit_gain=True),
    )


def every_sample(recipe: Recipe) -> Recipe:
    """The preset, whose units learn from all samples, however many there are."""
    return replace(
        recipe,
        name=recipe.name.replace("tfmq", "every_sample"),
        calibration=replace(recipe.calibration, learned=None),
    )


def rotated(recipe: Recipe) -> Recipe:
    """The preset with groups of inputs rotated where that leaves less error."""
    return replace(recipe, name=recipe.name.replace("tfmq", "rotated"), rescaling=Rescaling(rotation=256))


def svd_rotated(recipe: Recipe) -> Recipe:
    """The scheme with branches, whose layers may have rotated inputs instead of rescaled ones."""
    branched = svd(recipe)
    return replace(
        branched,
        name=branched.name.replace("svd", "svd_rotated"),
        rescaling=replace(branched.rescaling, rotation=256),
    )


def clusters(recipe: Recipe) -> Recipe:
    """The scheme for transformers with inputs in up to four clusters of channels (DGQ)."""
    plain = transformer(recipe)
    return replace(
        plain,
        name=recipe.name.replace("tfmq", "clusters"),
        activations=replace(plain.activations, clusters=4),
    )


def rescaled(recipe: Recipe, *equalizers: str) -> Recipe:
    """The preset with rescaled inputs where that leaves less error."""
    return replace(
        recipe,
        name=recipe.name.replace("tfmq", "-".join(equalizers)),
        rescaling=Rescaling(equalizers=equalizers),
    )


def corrected(recipe: Recipe, *estimators: str) -> Recipe:
    """The preset with a correction of what the model predicts."""
    return replace(
        recipe,
        name=recipe.name.replace("tfmq", "-".join(estimators)),
        correction=Correction(estimators=estimators),
    )


def gridded(recipe: Recipe, grid: str) -> Recipe:
    """The preset with weights on a listed grid, in the layers that have its bits."""
    weights = replace(recipe.weights, grid=grid)
    return replace(recipe, name=recipe.name.replace("tfmq", grid), weights=weights)


METHODS: dict[str, Callable[[Recipe], Recipe]] = {
    "min-max": min_max,
    "rtn": rtn,
    "brecq": brecq,
    "gptq": gptq,
    "tfmq": lambda recipe: recipe,
    "unit-gain": unit_gain,
    "every-sample": every_sample,
    "rescaled": lambda recipe: rescaled(recipe, "ranges"),
    "peaks": lambda recipe: rescaled(recipe, "peaks"),
    "rotated": rotated,
    "tuned": tuned,
    "smooth": smooth,
    "rotate": rotate,
    "bias": lambda recipe: corrected(recipe, "bias"),
    "gain": lambda recipe: corrected(recipe, "gain"),
    "affine": lambda recipe: corrected(recipe, "affine"),
    "e1m2": lambda recipe: gridded(recipe, "e1m2"),
    "e2m1": lambda recipe: gridded(recipe, "e2m1"),
    "released": released,
    "fast": fast,
    "transformer": transformer,
    "group": group,
    "fp4": fp4,
    "svd": svd,
    "svd-rotated": svd_rotated,
    "clusters": clusters,
    "svd-clusters": cluster,
}
BITS = ("w8a8", "w4a8", "w4a32", "w6a6", "w4a4")
# Where a method is tried, if not everywhere. W4A32 has no grids of inputs. What corrects the finished model
# is tried where most people are, and where most is to be gained.
OF_INPUTS = ("w8a8", "w4a8", "w6a6", "w4a4")
DOORS = ("w8a8", "w4a8", "w4a4")
TRIED = {
    **dict.fromkeys(("fast", "transformer"), OF_INPUTS),
    **dict.fromkeys(
        ("rescaled", "peaks", "rotated", "tuned", "smooth", "rotate", "bias", "gain", "affine"), DOORS
    ),
    **dict.fromkeys(("e1m2", "e2m1", "group", "fp4", "svd", "svd-rotated"), ("w4a8", "w4a4")),
    **dict.fromkeys(("clusters", "svd-clusters"), ("w8a8", "w4a8", "w4a4")),
    **dict.fromkeys(("released", "every-sample"), ("w4a8",)),
}
# The exceptions of the released code name layers of its UNet; and of the models here only that one has more
# samples than units learn from.
OF_DEFAULT = ("released", "every-sample")
# Rows with three seeds; the others have one.
HEADLINE = {"w4a8": ("rtn", "brecq", "tfmq", "transformer"), "w8a8": ("tfmq",)}
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Cell:
    """One quantized model of the leaderboard."""

    model: str
    bits: str
    method: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.model}-{self.bits}-{self.method}-{self.seed}"

    def recipe(self) -> Recipe:
        """Return the recipe, but for the calibration, which is the model's."""
        return METHODS[self.method](tfmq.scheme(self.bits))


def cells(
    models: Sequence[str], *, methods: Sequence[str] = tuple(METHODS), bits: Sequence[str] = BITS
) -> Iterator[Cell]:
    """Yield the cells of each model: the headline first, then the other rows, then further seeds of the
    headline.
    """
    for model in models:
        headline = [(width, method) for width, chosen in HEADLINE.items() for method in chosen]
        every = [
            (width, method)
            for width in BITS
            for method in METHODS
            if width in TRIED.get(method, BITS) and (method not in OF_DEFAULT or model == "default")
        ]
        ordered = [(row, 0) for row in dict.fromkeys([*headline, *every])] + [
            (row, seed) for seed in SEEDS[1:] for row in headline
        ]
        for (width, method), seed in ordered:
            if width in bits and method in methods:
                yield Cell(model, width, method, seed)
