"""Text encoders of transformers, saved with a manifest and loaded by its `from_pretrained`.

A quantized one is written under the names that its modules have, and not under those of the checkpoint that
it came from, so that the digest of the manifest is that of the file.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import __version__ as transformers_version
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from tfmq.integrations.config import (
    ManifestConfig,
    check_complete,
    check_sealed,
    mark_as_quantized,
    put,
    register_method,
)
from tfmq.integrations.loaded import loaded
from tfmq.nn.structure import assemble
from tfmq.nn.submodules import submodules
from tfmq.quantizers.part import Part
from tfmq.storage.atomic import read_json, read_tensors
from tfmq.storage.digest import remember_digest
from tfmq.storage.directory import verify_component
from tfmq.storage.manifest import Manifest

# What transformers notes in a configuration of its own accord.
NOTES = frozenset({"architectures", "dtype", "quantization_config", "torch_dtype", "transformers_version"})


class TextConfig(ManifestConfig, QuantizationConfigMixin):
    """The `quantization_config` of a quantized text encoder: its sealed manifest."""


class TextQuantizer(HfQuantizer):
    """Rebuilds the quantized modules of a text encoder, and puts the stored tensors into them as they are.

    Raises (while a model is loaded):
        CheckpointError: a damaged, truncated, foreign or incomplete checkpoint.
        ValueError: the architecture is not the one that was quantized.
    """

    requires_calibration = True

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        self._files = list(checkpoint_files or ())
        tensors = self._read()
        source = Path(self._files[0]).parent / "config.json"
        manifest = Manifest.from_json(self.quantization_config.to_dict(), source=source)
        verify_component(tensors, manifest, read_json(source), source=source)
        assemble(model, self.quantization_config.manifest["structure"])
        # What transformers holds in float32 would have its codes cast to it; 5.0 keeps a plan of that.
        model._keep_in_fp32_modules = model._keep_in_fp32_modules_strict = None
        model.dtype_plan = {}

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        tensors = self._read()
        check_complete(stored_state(model), tensors)
        for owner, part in submodules(model, Part).items():
            for name, tensor in list(part.named_buffers(recurse=False)):
                if part.keeps(name):
                    full_name = f"{owner}.{name}".lstrip(".")
                    put(part, name, tensors[full_name], full_name=full_name, device=tensor.device)
        model.requires_grad_(False)
        model._weight_conversions = []
        remember_digest(model, self.quantization_config.manifest["digest"], tensors)
        loaded(model, self.quantization_config.backend)
        return model

    def _read(self) -> dict[str, Tensor]:
        return {name: tensor for path in self._files for name, tensor in read_tensors(path)[0].items()}

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return what is saved, after checking that it is what the manifest seals.

        Raises:
            ValueError: the tensors changed since they were quantized, as a cast to another dtype does.
        """
        state = stored_state(model)
        check_sealed(state, self.quantization_config)
        return state, {}

    def is_serializable(self) -> bool:
        """Quantized models can be saved again."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Packed weights have no gradient."""
        return False


def reads_text(component: Any) -> bool:
    """Whether a component is a model of transformers that reads tokens."""
    return _of_transformers(component) and component.main_input_name == "input_ids"


def _of_transformers(module: nn.Module) -> bool:
    """Whether a module is a model of transformers."""
    # Not at the top: this module is imported while transformers imports its models.
    from transformers import PreTrainedModel

    return isinstance(module, PreTrainedModel)


def stored_state(model: Any) -> dict[str, Tensor]:
    """Return the tensors of a text encoder as they are saved: of tied ones the source alone.

    Raises:
        RuntimeError: this transformers does not say which are tied.
    """
    tied = getattr(model, "all_tied_weights_keys", None)
    if tied is None:
        raise RuntimeError(
            f"transformers {transformers_version} is too old to quantize a text encoder with; "
            "pip install 'tfmq[diffusers]'"
        )
    state: dict[str, Tensor] = model.state_dict()
    for name, source in tied.items():
        if name in state and source in state and state[name].data_ptr() == state[source].data_ptr():
            del state[name]
    return state


def configuration(model: Any) -> dict[str, Any]:
    """Return the architecture of a model of transformers as its `config.json` has it, without the manifest
    and notes; {} for other modules.
    """
    if not _of_transformers(model):
        return {}
    stored = json.loads(model.config.to_json_string())
    return {name: value for name, value in stored.items() if name not in NOTES and not name.startswith("_")}


def mark_quantized(model: Any, manifest: Mapping[str, Any]) -> None:
    """Make a model of transformers that was quantized in memory save and describe itself like a loaded one;
    other modules are left alone.
    """
    if not _of_transformers(model):
        return
    config = TextConfig.from_dict(manifest)
    model.config.quantization_config = config
    mark_as_quantized(model, config, TextQuantizer(config, pre_quantized=True))
    # Names of the checkpoint that the model came from.
    model._weight_conversions = []


register_method(auto, "transformers", TextQuantizer, TextConfig)
