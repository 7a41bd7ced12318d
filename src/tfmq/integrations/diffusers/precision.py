"""One precision for all components of a pipeline, which hand each other tensors."""

import torch
from diffusers import DiffusionPipeline
from torch import nn


def component_modules(pipeline: DiffusionPipeline) -> dict[str, nn.Module]:
    """Return the components of a pipeline that have weights."""
    return {name: child for name, child in pipeline.components.items() if isinstance(child, nn.Module)}


def in_float32(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """Return a pipeline with all components in float32."""
    for component in component_modules(pipeline).values():
        # Cast only where it is needed: a quantized component has float32 parameters, and tables in a dtype of
        # their own.
        if any(parameter.dtype != torch.float32 for parameter in component.parameters()):
            component.float()
    return pipeline


def in_one_precision(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """Return a pipeline whose components have one precision: float32 where they have several, since those of
    another precision do not compute with each other's tensors.
    """
    parameters = [list(part.parameters()) for part in component_modules(pipeline).values()]
    precisions = {own[0].dtype for own in parameters if own}
    return in_float32(pipeline) if len(precisions) > 1 else pipeline
