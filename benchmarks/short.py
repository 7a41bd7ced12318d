"""What short comparisons in images share: how a model is opened and its denoiser quantized, and how values
read in a table.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

import tfmq
from tfmq.recipes import Recipe
from tfmq.targets import open_sampler


def opened(model: str, guidance: Mapping[str, float]) -> Any:
    """Return the sampler of a model, with its guidance where it has one."""
    return open_sampler(model, options={"guidance_scale": guidance[model]} if model in guidance else {})


def quantize(sampler: Any, recipe: Recipe) -> Any:
    """Quantize the denoiser of a sampler alone, by seed 0, and return the report."""
    components = "denoiser" if hasattr(sampler, "pipeline") else None
    return tfmq.quantize(sampler, recipe, seed=0, components=components).report


def with_error(values: np.ndarray, *, sign: bool = False) -> str:
    """Return the mean of some values with its standard error.

    >>> with_error(np.array([1.0, 3.0]))
    '2.00 ± 1.00'
    """
    error = values.std(ddof=1) / len(values) ** 0.5
    return f"{values.mean():{'+' if sign else ''}.2f} ± {error:.2f}"
