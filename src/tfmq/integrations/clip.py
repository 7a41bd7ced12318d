"""CLIP from a local folder or from the cache of the hub; never from the network."""

from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import Tensor

# The error that torch raises for a file with more than tensors. It has no public name but in the pickle
# module.
from torch._weights_only_unpickler import UnpicklingError  # type: ignore[attr-defined]
from transformers import CLIPModel, CLIPProcessor

from tfmq.storage.errors import ForeignFileError, MissingFileError


class ClipFeatures(CLIPModel):
    """CLIP whose features are tensors, as metrics expect, where recent transformers wrap them in an output
    object.
    """

    def get_image_features(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the features of images `[N, d]`, whatever this transformers wraps them in."""
        return _unwrapped(super().get_image_features(*args, **kwargs))

    def get_text_features(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the features of texts `[N, d]`, whatever this transformers wraps them in."""
        return _unwrapped(super().get_text_features(*args, **kwargs))


def _unwrapped(output: Any) -> Tensor:
    features: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return features


def clip_folder(model: str) -> Path:
    """Return the folder of a CLIP model: `model` itself, or the cached copy of a hub id.

    Raises:
        MissingFileError: neither is there; says how to get it.
    """
    if Path(model).is_dir():
        return Path(model)
    try:
        return Path(snapshot_download(model, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, HfHubHTTPError) as error:
        advice = (
            f"run: hf download {model}, or name a folder with its files (config.json, "
            "weights, preprocessor and tokenizer) with --clip"
        )
        raise MissingFileError(
            f"{model} is neither a folder nor in the Hugging Face cache; {advice}"
        ) from error


def open_clip(model: str) -> tuple[Any, Any]:
    """Return model and processor.

    Raises:
        MissingFileError: see `clip_folder`.
        ForeignFileError: the folder holds no CLIP model.
    """
    folder = clip_folder(model)
    try:
        # Some published copies have no safetensors; of a file of torch's, nothing but tensors is unpickled.
        network = ClipFeatures.from_pretrained(folder, local_files_only=True, weights_only=True).eval()
        return network, CLIPProcessor.from_pretrained(folder, local_files_only=True)
    except UnpicklingError as error:
        raise ForeignFileError(
            f"{folder} holds no CLIP model (a file has Python objects beside tensors); download it again"
        ) from error
    except (OSError, ValueError, RuntimeError, EOFError) as error:
        raise ForeignFileError(
            f"{folder} holds no CLIP model ({str(error).strip().splitlines()[0]}); download it again"
        ) from error
