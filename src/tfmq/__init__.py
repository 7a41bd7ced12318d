"""Quantize diffusion models with temporal feature maintenance, and run the result.

    import tfmq
    tfmq.quantize("default", "w4a8", output_dir="model")
    pipeline = tfmq.load("model")

After `import tfmq`, `diffusers.DiffusionPipeline.from_pretrained("model")` does the same.
"""

from typing import TYPE_CHECKING, Any

from tfmq.lazy import when_imported
from tfmq.version import __version__

if TYPE_CHECKING:
    from tfmq.adapt import fuse_lora, rebake
    from tfmq.api import quantize
    from tfmq.artifact import load, relist
    from tfmq.backends.backend import Options
    from tfmq.backends.execution import execute
    from tfmq.models.denoiser import Denoiser
    from tfmq.models.sampler import Guidance, LoopSampler, Sampler
    from tfmq.recipes import Recipe, scheme
    from tfmq.reconstruction.resources import Resources

__all__ = [
    "Denoiser", "Guidance", "LoopSampler", "Options", "Recipe", "Resources", "Sampler", "__version__",
    "execute", "fuse_lora", "load", "quantize", "rebake", "relist", "scheme",
]  # fmt: skip

_HOMES = {
    "Denoiser": "tfmq.models.denoiser",
    "Guidance": "tfmq.models.sampler",
    "LoopSampler": "tfmq.models.sampler",
    "Options": "tfmq.backends.backend",
    "Recipe": "tfmq.recipes",
    "Resources": "tfmq.reconstruction.resources",
    "Sampler": "tfmq.models.sampler",
    "execute": "tfmq.backends.execution",
    "fuse_lora": "tfmq.adapt",
    "load": "tfmq.artifact",
    "quantize": "tfmq.api",
    "rebake": "tfmq.adapt",
    "relist": "tfmq.artifact",
    "scheme": "tfmq.recipes",
    # Not in `__all__`, since they need diffusers: the configuration for `from_pretrained`, a sampler of a
    # pipeline with options of its own, and classes that saved pipelines name.
    "TFMQConfig": "tfmq.integrations.diffusers.quantizer",
    "PipelineSampler": "tfmq.integrations.diffusers.pipelines",
    "ClassEmbedder": "tfmq.integrations.diffusers.class_conditional",
    "LatentClassPipeline": "tfmq.integrations.diffusers.class_conditional",
    "UNet2DHeadsModel": "tfmq.integrations.diffusers.heads",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for, so that `import tfmq` stays fast."""
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module 'tfmq' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def _execute_loaded(module: Any, backend: str) -> None:
    from tfmq.backends.execution import execute

    execute(module, backend)


def _register_with_diffusers() -> None:
    from tfmq.integrations.loaded import execute_with

    execute_with(_execute_loaded)
    # Importing it registers it; where that import is what brought diffusers in, it is under way and finishes
    # by itself.
    import tfmq.integrations.diffusers.quantizer  # noqa: F401


def _register_with_transformers() -> None:
    from tfmq.integrations.loaded import execute_with

    execute_with(_execute_loaded)
    import tfmq.integrations.text  # noqa: F401


def _register_components() -> None:
    import tfmq.integrations.diffusers.components  # noqa: F401


def _register_pipeline() -> None:
    import tfmq.integrations.diffusers.class_conditional  # noqa: F401


when_imported("diffusers.quantizers.auto", _register_with_diffusers)
when_imported("transformers.quantizers.auto", _register_with_transformers)
when_imported("diffusers.pipelines.pipeline_loading_utils", _register_components)
# Whoever has `DiffusionPipeline` has the models that this pipeline is made of.
when_imported("diffusers.pipelines.pipeline_utils", _register_pipeline)
