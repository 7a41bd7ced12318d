"""Recipes: everything that decides how a model is quantized, as one value."""

from tfmq.recipes.presets import PRESETS, scheme
from tfmq.recipes.published import Published
from tfmq.recipes.recipe import Activations, Calibration, Recipe, Rule, Temporal, Weights

__all__ = [
    "PRESETS",
    "Activations",
    "Calibration",
    "Published",
    "Recipe",
    "Rule",
    "Temporal",
    "Weights",
    "scheme",
]
