"""Recipes of networks without a timestep: what turns latents into images and images into latents, and what
reads prompts.
"""

from tfmq.recipes.recipe import Activations, Calibration, Recipe, Temporal, Tolerance, Weights
from tfmq.reconstruction.solvers import Rounding

# Bounds on energies of errors over those of the output, 30 dB and 26 dB.
WITHIN_30_DB = 1e-3
WITHIN_26_DB = 10**-2.6


def image_w8a8() -> Recipe:
    """8-bit weights and static 8-bit inputs of convolutions, linear layers and attention; a layer with
    outliers stays in floating point.
    """
    return Recipe(
        name="image_w8a8",
        weights=Weights(bits=8),
        activations=Activations(per_step="none", zero_points="shared", split="direct"),
        temporal=Temporal(maintenance="none"),
        rounding=Rounding(solver="nearest"),
        calibration=Calibration(interval=1, judged=0.0),
        tolerance=Tolerance(layer=WITHIN_26_DB, output=WITHIN_30_DB),
    )


def text_w8a8() -> Recipe:
    """8-bit weights, and 8-bit inputs on grids of each token where the output stays within the bound; the
    inputs of other layers stay in floating point.
    """
    return Recipe(
        name="text_w8a8",
        weights=Weights(bits=8),
        activations=Activations(per_step="none", products=False, tokens="dynamic"),
        temporal=Temporal(maintenance="none"),
        rounding=Rounding(solver="nearest"),
        calibration=Calibration(interval=1, judged=0.0),
        tolerance=Tolerance(layer=WITHIN_26_DB, output=WITHIN_30_DB, instead="weights"),
    )


def network_recipe(recipe: Recipe, name: str, *, tokens: bool) -> Recipe:
    """Return the recipe of the network `name` beside a denoiser of this `recipe`; `tokens` says that it reads
    whole numbers, as of words.
    """
    return recipe.of_network(name) or (text_w8a8() if tokens else image_w8a8())
