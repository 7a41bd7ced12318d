"""Recipes as Python functions."""

import re
from collections.abc import Callable
from dataclasses import replace

from tfmq.nn.branch import BranchType
from tfmq.recipes.paper import PAPER, PROTOCOLS
from tfmq.recipes.recipe import Activations, Branch, Recipe, Rescaling, Rule, Temporal, Weights
from tfmq.reconstruction.learning import Learning
from tfmq.reconstruction.solvers import Rounding
from tfmq.reconstruction.tuning import Tuning

# The closed form takes a fraction of AdaRound's time and leaves less error.
FAST = Rounding(solver="gptq")
MAINTAINED = Temporal(rounding=FAST)
# Budget of `adaround`, which two CPU cores finish in minutes. The released code runs 20 000 iterations at
# rate 1e-3.
SHORT = Learning(iterations=400, learning_rate=1e-2)


# First and last layer at 8 bits, as in BRECQ; the released TFMQ-DM keeps them in full precision.
ENDS = tuple(Rule(match=role, weights={"bits": 8}) for role in ("role:first", "role:last"))
ENDS_W8A8 = tuple(replace(rule, activations={"bits": 8}) for rule in ENDS)


def tfmq_w4a8() -> Recipe:
    """4-bit weights, 8-bit activations per timestep, temporal features from an int8 table."""
    return Recipe(name="tfmq_w4a8", rounding=FAST, learning=SHORT, temporal=MAINTAINED, rules=ENDS_W8A8)


def tfmq_w4a4() -> Recipe:
    """4-bit weights and activations."""
    base = tfmq_w4a8()
    return replace(base, name="tfmq_w4a4", activations=replace(base.activations, bits=4))


def tfmq_w8a8() -> Recipe:
    """8-bit weights and activations."""
    return Recipe(
        name="tfmq_w8a8", weights=Weights(bits=8), rounding=FAST, learning=SHORT, temporal=MAINTAINED
    )


def tfmq_w4a32() -> Recipe:
    """4-bit weights, activations in full precision."""
    activations = Activations(bits=None, products=False, per_step="none")
    return Recipe(
        name="tfmq_w4a32",
        activations=activations,
        rounding=FAST,
        learning=SHORT,
        temporal=MAINTAINED,
        rules=ENDS,
    )


def rtn(recipe: Recipe) -> Recipe:
    """The round-to-nearest baseline at the bits of `recipe`: one scale for all timesteps, no temporal
    maintenance.
    """
    return replace(
        brecq(recipe), name=recipe.name.replace("tfmq", "rtn"), rounding=Rounding(solver="nearest")
    )


def brecq(recipe: Recipe) -> Recipe:
    """The block reconstruction baseline at the bits of `recipe`: AdaRound on blocks, without TIAR, finite set
    calibration and cache.
    """
    return replace(
        recipe,
        name=recipe.name.replace("tfmq", "brecq"),
        rounding=replace(recipe.rounding, solver="adaround"),
        activations=replace(recipe.activations, per_step="none"),
        temporal=Temporal(maintenance="none"),
        tuning=Tuning(),
        calibration=replace(recipe.calibration, judged=0.0),
    )


def fast(recipe: Recipe) -> Recipe:
    """A recipe for engines with static ranges: no more grids and zero-points than accuracy needs,
    concatenations split in shortcuts alone.
    """
    activations = replace(recipe.activations, per_step="measured", zero_points="shared", split="direct")
    return replace(recipe, name=recipe.name.replace("tfmq", "fast"), activations=activations)


def transformer(recipe: Recipe) -> Recipe:
    """A recipe for DiT, PixArt, SD3, FLUX and their like: each linear layer's input grids static per timestep
    or dynamic per token, as measured.
    """
    return replace(
        recipe,
        name=recipe.name.replace("tfmq", "transformer"),
        activations=replace(recipe.activations, tokens="measured"),
    )


def quick(recipe: Recipe) -> Recipe:
    """A recipe for models whose call takes seconds: nearest codes, and ranges from two images. 8-bit
    weights have exact ranges: a search wins 0.1 dB, and takes seconds for a million of them. Attention, which
    takes much of the time in large pictures, has grids that OpenVINO multiplies in integers.
    """
    weights = recipe.weights
    return replace(
        recipe,
        name=recipe.name.replace("tfmq", "quick"),
        weights=replace(weights, ranges="min_max") if weights.bits == 8 else weights,
        activations=replace(recipe.activations, zero_points="products"),
        rounding=Rounding(solver="nearest"),
        tuning=Tuning(),
        calibration=replace(recipe.calibration, samples=2, batch_size=1, judged=0.0),
    )


def tuned(recipe: Recipe) -> Recipe:
    """The recipe with scales and biases fitted to the whole prediction once all codes are found
    (EfficientQAT).
    """
    return replace(recipe, name=recipe.name.replace("tfmq", "tuned"), tuning=Tuning(iterations=60))


def smooth(recipe: Recipe) -> Recipe:
    """The recipe for transformers with inputs rescaled where that takes away error (SmoothQuant; DiTAS)."""
    return replace(
        transformer(recipe),
        name=recipe.name.replace("tfmq", "smooth"),
        rescaling=Rescaling(equalizers=("ranges",)),
    )


def rotate(recipe: Recipe) -> Recipe:
    """The recipe for transformers with groups of inputs rotated where that takes away error (ConvRot)."""
    return replace(
        transformer(recipe),
        name=recipe.name.replace("tfmq", "rotate"),
        rescaling=Rescaling(rotation=256),
    )


def group(recipe: Recipe) -> Recipe:
    """The recipe for transformers with weights in groups of 128 inputs, smaller ones where the output's error
    is worth their bytes (Q-DiT, Chen et al., 2025).
    """
    return replace(
        transformer(recipe),
        name=recipe.name.replace("tfmq", "group"),
        weights=replace(recipe.weights, group=128, groups=(64, 32)),
    )


def fp4(recipe: Recipe) -> Recipe:
    """The recipe for transformers with the grid of each weight chosen among uniform ones and floats of four
    bits (FP4DiT, Chen et al., 2025).
    """
    return replace(
        transformer(recipe),
        name=recipe.name.replace("tfmq", "fp4"),
        weights=replace(recipe.weights, grids=("e2m1", "e3m0")),
    )


def svd(recipe: Recipe) -> Recipe:
    """A recipe for transformers whose layers have a low-rank branch beside their codes, and inputs rescaled,
    where that takes away error together (SVDQuant). First and last layer have none.

    Inputs of 8 bits are fine enough for the branch too, which then reads their codes. As in the paper
    attention products are not quantized at 4 bits.
    """
    fine = recipe.activations.bits == 8
    smoothed = smooth(recipe)
    return replace(
        smoothed,
        name=recipe.name.replace("tfmq", "svd"),
        weights=replace(recipe.weights, rank=16),
        activations=replace(smoothed.activations, products=fine),
        branch=Branch(dtype="int8" if fine else "float16"),
        rules=tuple(replace(rule, weights={**rule.weights, "rank": 0}) for rule in recipe.rules),
    )


def cluster(recipe: Recipe) -> Recipe:
    """The recipe with branches, whose layers may have inputs in up to four clusters of channels with a grid
    each (DGQ, Ryu et al., 2025): for inputs of four bits. Factors in floating point become bytes, which
    halves them.
    """
    branched = svd(recipe)
    stored: BranchType = "int8" if branched.branch.dtype == "int8" else "int8_weight_only"
    return replace(
        branched,
        name=recipe.name.replace("tfmq", "cluster"),
        activations=replace(branched.activations, clusters=4),
        branch=replace(branched.branch, dtype=stored),
    )


def _composed(change: Callable[[Recipe], Recipe], build: Callable[[], Recipe]) -> Callable[[], Recipe]:
    return lambda: change(build())


_METHODS: dict[str, Callable[[Recipe], Recipe]] = {"rtn": rtn, "brecq": brecq}
_SCHEMES: dict[str, Callable[[], Recipe]] = {"w4a8": tfmq_w4a8, "w8a8": tfmq_w8a8, "w4a32": tfmq_w4a32}
PRESETS: dict[str, Callable[[], Recipe]] = {f"tfmq_{name}": build for name, build in _SCHEMES.items()}
PRESETS |= {
    f"{method}_{name}": _composed(f, b) for method, f in _METHODS.items() for name, b in _SCHEMES.items()
}
PRESETS |= {f"fast_{name}": _composed(fast, _SCHEMES[name]) for name in ("w4a8", "w8a8")}
_VARIANTS = {
    "transformer": transformer,
    "quick": quick,
    "tuned": tuned,
    "smooth": smooth,
    "rotate": rotate,
}
PRESETS |= {
    f"{variant}_{name}": _composed(change, _SCHEMES[name])
    for variant, change in _VARIANTS.items()
    for name in ("w4a8", "w8a8")
}
PRESETS |= {
    "group_w4a8": _composed(group, tfmq_w4a8),
    "group_w4a4": _composed(group, tfmq_w4a4),
    "fp4_w4a8": _composed(fp4, tfmq_w4a8),
}
PRESETS |= {
    "svd_w4a4": _composed(svd, tfmq_w4a4),
    "svd_w4a8": _composed(svd, tfmq_w4a8),
    "cluster_w4a4": _composed(cluster, tfmq_w4a4),
}


def _bits_of(name: str) -> tuple[int | None, int | None]:
    """Return the bits of weights and activations that `wXaY` names, None for full precision.

    Raises:
        ValueError: it is no such name.
    """
    found = re.fullmatch(r"w(\d+)a(\d+)", name)
    bits = [int(text) for text in found.groups()] if found else []
    if not bits or not all(2 <= value <= 8 or value in (16, 32) for value in bits):
        choices = ", ".join((*_SCHEMES, *PRESETS, *(f"{protocol.name}_wXaY" for protocol in PROTOCOLS)))
        raise ValueError(
            f"unknown scheme {name!r}; give wXaY with 2 to 8 bits (16 or "
            f"32 for full precision), or one of {choices}"
        )
    weight, activation = (value if value <= 8 else None for value in bits)
    return weight, activation


def scheme(name: str) -> Recipe:
    """Return the recipe of a scheme: a preset's name, or `wXaY` with X and Y of 2 to 8 bits, or 16 or 32 for
    full precision.

    Presets of `tfmq.recipes.paper` repeat a published experiment, such as `ldm4_bedrooms_w4a8`, with its
    budget of hours to days.

    Raises:
        ValueError: no such scheme.
    """
    named = PRESETS | PAPER | _SCHEMES
    if name in named:
        return named[name]()
    weight, activation = _bits_of(name)
    if weight is None:
        raise ValueError(
            f"scheme {name!r} keeps full-precision weights; integer arithmetic "
            "needs both operands, so choose weights of 2 to 8 bits"
        )
    base = tfmq_w4a32() if activation is None else tfmq_w4a8()
    activations = replace(base.activations, bits=activation)
    return replace(base, name=f"tfmq_{name}", weights=Weights(bits=weight), activations=activations)
