"""Put converted tensors into a model: every key fits, or none is taken."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def fit(
    model: Any,
    tensors: Mapping[str, Tensor],
    *,
    original: Mapping[str, Tensor] | None = None,
    assign: bool = False,
) -> Any:
    """Load `tensors` into `model` and return it in evaluation mode.

    Args:
        model: a diffusers or transformers model.
        tensors: the tensors by the model's names.
        original: the tensors that `tensors` were converted from; each must have gone somewhere.
        assign: let the model have the tensors themselves, of whatever dtype, in the place of its own, which
            may be on the meta device.

    Raises:
        ValueError: keys are missing, unknown, of another shape, or were left behind; lists all of them.
    """
    expected = model.state_dict()
    complaints = {
        "missing": sorted(expected.keys() - tensors.keys()),
        "unknown": sorted(tensors.keys() - expected.keys()),
        "of another shape": sorted(
            name for name in expected.keys() & tensors.keys() if expected[name].shape != tensors[name].shape
        ),
        "not used": left_behind(original or {}, tensors),
    }
    found = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in complaints.items() if names)
    if found:
        raise ValueError(
            f"the checkpoint does not fit the {type(model).__name__} "
            f"that its configuration describes; {found}"
        )
    model.load_state_dict(dict(tensors), assign=assign)
    return model.eval()


def left_behind(original: Mapping[str, Tensor], converted: Mapping[str, Tensor]) -> list[str]:
    """Return the names in `original` of which nothing is in `converted`: converters take views, or the
    tensors themselves.
    """
    taken = {tensor.data_ptr() for tensor in converted.values()}
    return sorted(name for name, tensor in original.items() if tensor.data_ptr() not in taken)
