"""How many bytes the tensors of a module have."""

from torch import Tensor, nn


def state_bytes(module: nn.Module) -> int:
    """Return the bytes of the tensors of a state dict, parts of tensor subclasses included."""
    return sum(tensor_bytes(value) for value in module.state_dict().values() if isinstance(value, Tensor))


def tensor_bytes(tensor: Tensor) -> int:
    """Return the bytes of a tensor, of its parts if it is a subclass of them."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(tensor_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()
