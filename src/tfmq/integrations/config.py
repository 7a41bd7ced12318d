"""A manifest as the `quantization_config` of another library, and what its quantizers have in common."""

from collections.abc import Mapping
from enum import StrEnum
from types import ModuleType
from typing import Any

from torch import Tensor

from tfmq.quantizers.part import Part
from tfmq.storage.checkpoint import verify
from tfmq.storage.directory import METHOD
from tfmq.storage.errors import CheckpointError, TensorMismatchError


class QuantMethod(StrEnum):
    """The name under which other libraries know this method."""

    TFMQ = METHOD


class ManifestConfig:
    """A sealed manifest (docs/format.md), field by field, with the backend that a model is loaded for.

    Args:
        backend: as in `tfmq.execute`. It is no part of the manifest, and not saved.
        manifest: the fields.
    """

    def __init__(self, *, backend: str = "auto", **manifest: Any) -> None:
        self.backend = backend
        self.manifest = {**manifest, "quant_method": METHOD}
        self.quant_method = QuantMethod.TFMQ

    @classmethod
    def from_dict(
        cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """Return the config of a manifest; the signature of both libraries."""
        config = cls()
        # A manifest has no field `backend`. If somebody has added one, the seal has to fail.
        config.manifest |= config_dict
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """Return the manifest."""
        return dict(self.manifest)

    def to_diff_dict(self) -> dict[str, Any]:
        """Return what differs from a default config: the manifest, which has no defaults."""
        return self.to_dict()


def register_method(auto: ModuleType, library: str, quantizer: type, config: type) -> None:
    """Make a library know the method, by its two tables in `auto`.

    Raises:
        RuntimeError: this version of it keeps its quantizers elsewhere.
    """
    tables = {"AUTO_QUANTIZER_MAPPING": quantizer, "AUTO_QUANTIZATION_CONFIG_MAPPING": config}
    for table, value in tables.items():
        mapping = getattr(auto, table, None)
        if not isinstance(mapping, dict):
            raise RuntimeError(
                f"{library}.quantizers.auto has no {table}; install a {library} "
                "that tfmq supports: pip install 'tfmq[diffusers]'"
            )
        mapping[METHOD] = value


def mark_as_quantized(model: Any, config: Any, quantizer: Any) -> None:
    """Set what both libraries look for in a quantized model."""
    model.hf_quantizer = quantizer
    model.is_quantized = True
    model.quantization_method = config.quant_method


def check_sealed(state: Mapping[str, Tensor], config: ManifestConfig) -> None:
    """Check that what is saved is what the manifest seals.

    Raises:
        ValueError: the tensors changed since they were quantized, as a cast to another dtype does.
    """
    try:
        verify(state, config.to_dict())
    except CheckpointError as error:
        raise ValueError(
            "the tensors changed since they were sealed (cast to another "
            "dtype?); load the model in float32 to save it"
        ) from error


def check_complete(state: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> None:
    """Check that all tensors of an architecture are stored.

    Raises:
        TensorMismatchError: one is absent.
    """
    if absent := sorted(state.keys() - stored.keys()):
        raise TensorMismatchError(
            f"the checkpoint lacks {absent[0]}, which the architecture has; copy or save it again"
        )


def put(part: Part, name: str, stored: Tensor, *, full_name: str, device: Any) -> None:
    """Put a stored tensor into the buffer `name` of a part, uncast.

    Raises:
        TensorMismatchError: it has another shape.
    """
    wanted = getattr(part, name).shape
    if stored.shape != wanted:
        raise TensorMismatchError(
            f"{full_name} has the shape {list(stored.shape)}, the "
            f"architecture needs {list(wanted)}; copy it again"
        )
    part.register_buffer(name, stored.to(device))
