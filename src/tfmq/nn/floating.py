"""What of a model stays in floating point, how much that is, and why."""

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from tfmq.nn.operation import is_embedding, operation_of
from tfmq.nn.size import tensor_bytes
from tfmq.nn.temporal import stock_name
from tfmq.quantizers.part import Part

RULE = "rule of the recipe"
# Said of a layer that is not called, or is called with more arguments than its input.
UNSEEN = "no plain call of it"
NORM = "norm"
NO_OPERATION = "no integer operation for this kind"
OWN = "tensors of its own"
# Kinds with weights that torch has; what else holds a tensor is no layer.
LAYERS = (
    nn.modules.conv._ConvNd,
    nn.Linear,
    nn.Bilinear,
    nn.Embedding,
    nn.EmbeddingBag,
    nn.RNNBase,
    nn.MultiheadAttention,
)


@dataclass(frozen=True)
class Floating:
    """A module with tensors in floating point: its name in the stock architecture, its class, the bytes of
    its own tensors, and the reason.
    """

    name: str
    kind: str
    bytes: int
    reason: str


def floating(
    module: nn.Module, quantizable: Collection[str], *, quantized: Collection[str] = ()
) -> tuple[Floating, ...]:
    """Return the modules below `module` that hold tensors in floating point, the largest first.

    The biases of quantized layers count as part of those.

    Args:
        module: a packed denoiser, or a stock one.
        quantizable: names of the layers and embeddings that a recipe decides on.
        quantized: names of modules that count as quantized although they are stock ones.
    """
    found = []
    for path, child in module.named_modules():
        name = stock_name(module, path)
        if isinstance(child, Part) or name in quantized:
            continue
        own = (
            *child._parameters.items(),
            *(
                (key, value)
                for key, value in child._buffers.items()
                if key not in child._non_persistent_buffers_set
            ),
        )
        size = sum(
            tensor_bytes(tensor) for _, tensor in own if tensor is not None and tensor.is_floating_point()
        )
        if size:
            found.append(Floating(name, type(child).__name__, size, _reason(child, name in quantizable)))
    return tuple(sorted(found, key=lambda entry: (-entry.bytes, entry.name)))


def _reason(module: nn.Module, quantizable: bool) -> str:
    if operation_of(module) is not None or is_embedding(module):
        return RULE if quantizable else UNSEEN
    if "Norm" in type(module).__name__:
        return NORM
    return NO_OPERATION if isinstance(module, LAYERS) else OWN


def summary(found: Sequence[Floating], total: int) -> dict[str, Any]:
    """Return what `found` is of `total` bytes, as values that JSON keeps."""
    size = sum(entry.bytes for entry in found)
    return {"bytes": size, "share": size / max(1, total), "modules": [asdict(entry) for entry in found]}
