"""A manifest as the `quantization_config` of another library."""

from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from tfmq.storage.directory import METHOD


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
