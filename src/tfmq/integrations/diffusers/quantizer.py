"""diffusers' quantizer interface: a component whose config carries a tfmq manifest loads with
`from_pretrained`.

diffusers has no public registration; `register_quantizer` fills its two tables in
`diffusers.quantizers.auto`, and has it heed the backend of a config that a model is loaded with.
"""

import warnings
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from diffusers import __version__ as diffusers_version
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import Tensor, nn

from tfmq.allocator import page_out
from tfmq.integrations.config import (
    ManifestConfig,
    check_complete,
    check_sealed,
    mark_as_quantized,
    put,
    register_method,
)
from tfmq.integrations.diffusers.adapters import admit_adapters
from tfmq.integrations.diffusers.at_load import AtLoad, bits_of, leave_files
from tfmq.integrations.loaded import loaded
from tfmq.nn.structure import assemble
from tfmq.quantizers.part import Part
from tfmq.storage.atomic import read_json, read_tensors
from tfmq.storage.digest import remember_digest
from tfmq.storage.directory import METHOD, verify_component
from tfmq.storage.manifest import Manifest


class TFMQConfig(ManifestConfig, QuantizationConfigMixin):
    """The `quantization_config` of a quantized component: its sealed manifest (docs/format.md), field by
    field.

    Passed to `from_pretrained`, it says what the model computes with; its manifest is the stored one in any
    case. For a component `quantization_config=TFMQConfig(backend="openvino")`, for a pipeline the same in a
    `PipelineQuantizationConfig(quant_mapping={"unet": ...})`. With `bits` a model that is not quantized is
    quantized while it is loaded, see `tfmq.integrations.diffusers.at_load`.

    Args:
        backend: as in `tfmq.execute`.
        bits: "w8a8", "w4a8", "w8a32" or "w4a32", for a model that is not quantized.
        manifest: the fields of one that is.

    Raises:
        ValueError: no such bits.
    """

    def __init__(self, *, backend: str = "auto", bits: str | None = None, **manifest: Any) -> None:
        super().__init__(backend=backend, **manifest)
        if bits is not None:
            bits_of(bits)
        self.bits = bits


class TFMQQuantizer(DiffusersQuantizer):
    """Rebuilds the quantized modules around a stock architecture, and loads packed tensors into them.

    Raises (while a model is loaded):
        CheckpointError: a damaged, truncated, foreign or incomplete checkpoint; never a wrong image.
        ValueError: the architecture is not the one that was quantized.
    """

    # A config without bits does; see `validate_environment`.
    requires_calibration = False
    use_keep_in_fp32_modules = False
    # The tensors of the files, on the meta device: names, dtypes and shapes without values.
    _sealed: Mapping[str, Tensor] = {}
    _at_load: AtLoad | None = None

    def __init__(self, quantization_config: TFMQConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        # A single file is opened without a word on whether it is quantized.
        if quantization_config.bits is not None and "structure" not in quantization_config.manifest:
            self.pre_quantized = False

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Check that there is something to quantize by.

        Raises:
            ValueError: the model is not quantized, and the config does not say in how many bits it should be.
        """
        if not self.pre_quantized and self.quantization_config.bits is None:
            raise ValueError(
                "the model is not quantized by tfmq: quantize it while it loads, TFMQConfig(bits='w8a8'), or "
                "with calibration, tfmq quantize"
            )

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        """Verify the files against the manifest before anything is built or loaded from them."""
        if not self.pre_quantized:
            return loaded_keys
        tensors: dict[str, Tensor] = {}
        for path in checkpoint_files:
            tensors |= read_tensors(path)[0]
        source = Path(checkpoint_files[0]).parent / "config.json"
        manifest = Manifest.from_json(self.quantization_config.to_dict(), source=source)
        verify_component(tensors, manifest, read_json(source), source=source)
        self._sealed = {name: tensor.to("meta") for name, tensor in tensors.items()}
        return loaded_keys

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        if self.pre_quantized:
            if not self._sealed:
                raise RuntimeError(
                    f"diffusers {diffusers_version} is too old to check a quantized model with; "
                    "pip install 'tfmq[diffusers]'"
                )
            assemble(model, self.quantization_config.manifest["structure"])
        else:
            self._at_load = AtLoad(model, self.quantization_config.bits)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> nn.Module:
        if self._at_load is not None:
            leave_files(model)
            self.quantization_config.manifest |= self._at_load.manifest(model)
            self._at_load, self.pre_quantized = None, True
            model.register_to_config(quantization_config=self.quantization_config.to_dict())
            self._sealed = model.state_dict()
        else:
            check_complete(model.state_dict(), self._sealed)
        model.requires_grad_(False)
        remember_digest(model, self.quantization_config.manifest["digest"], self._sealed)
        self._sealed = {}
        admit_adapters()
        loaded(model, self.quantization_config.backend)
        quantized: nn.Module = model
        return quantized

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Any], safe_serialization: bool = False
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return what is saved, after checking that it is what the manifest seals.

        Raises:
            ValueError: the tensors changed since they were quantized, as a cast to another dtype does.
        """
        check_sealed(state_dict, self.quantization_config)
        return state_dict, {}

    def check_if_quantized_param(
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        state_dict: dict[str, Any],
        **kwargs: Any,
    ) -> bool:
        """Whether a tensor keeps the dtype it is stored in, or becomes codes."""
        if self._at_load is not None:
            return self._at_load.takes(param_name)
        owner, _, name = param_name.rpartition(".")
        module = model.get_submodule(owner)
        return isinstance(module, Part) and module.keeps(name)

    def create_quantized_param(
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        target_device: Any,
        state_dict: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Put a stored tensor into its buffer, uncast, or the codes of a weight into a layer."""
        if self._at_load is not None:
            self._at_load.put(model, param_name, param_value, device=target_device)
            # The file is mapped until all of a shard is read; what has become codes need not stay in memory.
            page_out(state_dict[param_name])
            return
        owner, _, name = param_name.rpartition(".")
        module = model.get_submodule(owner)
        assert isinstance(module, Part)
        put(module, name, state_dict[param_name], full_name=param_name, device=target_device)

    def update_torch_dtype(self, torch_dtype: torch.dtype | None = None) -> torch.dtype:
        """Default to float32, in which the quantized model was measured."""
        return torch_dtype or torch.float32

    @property
    def is_serializable(self) -> bool:
        """Quantized models can be saved again."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Packed weights have no gradient."""
        return False

    @property
    def is_compileable(self) -> bool:
        """The simulated forward compiles with graph breaks only: it looks up whether a timestep was
        calibrated.
        """
        return False


def _heeding(merge: Callable[..., Any]) -> Callable[..., Any]:
    """Return diffusers' choice between a stored and a given config, which drops the given one, such that a
    given backend counts.
    """

    @wraps(merge)
    def merged(stored: Any, given: Any = None) -> Any:
        ours = (
            isinstance(given, TFMQConfig)
            and (stored.get("quant_method") if isinstance(stored, dict) else stored.quant_method) == METHOD
        )
        config = merge(stored, None if ours else given)
        if ours:
            config.backend = given.backend
            if given.bits is not None:
                warnings.warn(
                    f"bits={given.bits!r} has no effect: the model is quantized already", stacklevel=2
                )
        return config

    setattr(merged, METHOD, True)
    return merged


def register_quantizer() -> None:
    """Make diffusers know the method.

    Raises:
        RuntimeError: this diffusers keeps its quantizers elsewhere.
    """
    register_method(auto, "diffusers", TFMQQuantizer, TFMQConfig)
    merge = auto.DiffusersAutoQuantizer.merge_quantization_configs
    if not getattr(merge, METHOD, False):
        auto.DiffusersAutoQuantizer.merge_quantization_configs = staticmethod(_heeding(merge))


def mark_quantized(model: Any, manifest: Mapping[str, Any]) -> None:
    """Make a diffusers model that was quantized in memory save and describe itself like a loaded one; other
    modules are left alone.
    """
    # Import it here, not at the top: this module is imported while diffusers imports its models.
    from diffusers.models.modeling_utils import ModelMixin

    if not isinstance(model, ModelMixin):
        return
    config = TFMQConfig.from_dict(manifest)
    model.register_to_config(quantization_config=config.to_dict())
    mark_as_quantized(model, config, TFMQQuantizer(config, pre_quantized=True))
    admit_adapters()


register_quantizer()
