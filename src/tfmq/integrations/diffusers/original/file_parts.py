"""The tensors of a published single file, sorted into the parts of a pipeline."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from tfmq.integrations.diffusers.original import encoders
from tfmq.integrations.diffusers.original.families import Encoder, denoiser_prefix, family_of
from tfmq.integrations.diffusers.original.files import ILL_FITTING
from tfmq.integrations.diffusers.original.reading import reader_of

AUTOENCODERS = ("first_stage_model.", "vae.")
# What trainings keep beside a model: noise schedules, averages, losses, marks of what is predicted.
KEPT_BESIDE = (
    "alphas_cumprod",
    "betas",
    "cond_stage_model.logit_scale",
    "denoiser.sigmas",
    "log_one_minus_alphas_cumprod",
    "logvar",
    "lvlb_weights",
    "model_ema.",
    "posterior_",
    "sqrt_",
    "v_pred",
    "ztsnr",
)


class SingleFile:
    """The tensors of a file, sorted into the parts of a pipeline.

    Raises:
        CheckpointError: it is no safetensors or GGUF file, or a damaged one.
        ValueError: it is of no layout that is read here.
    """

    def __init__(self, path: Path) -> None:
        self.path, reader = path, reader_of(path)
        self.source = {"format": reader.format, "file": path.name}
        self.tensors, layers = reader.read(path)
        with named_file(path):
            self.prefix = denoiser_prefix(self.tensors)
            if elsewhere := [name for name in layers if not name.startswith(self.prefix)]:
                raise ValueError(f"{elsewhere[0]} is quantized, which layers of the denoiser alone may be")
            self.layers = {name.removeprefix(self.prefix): layer for name, layer in layers.items()}
            self.denoiser = self.below(self.prefix)
            self.family = family_of(encoders.shapes_of(self.denoiser), self.tensors)

    def below(self, *prefixes: str) -> dict[str, Tensor]:
        """Return the tensors below the first of `prefixes` that has any, without it."""
        for prefix in prefixes:
            found = {
                name.removeprefix(prefix): tensor
                for name, tensor in self.tensors.items()
                if name.startswith(prefix)
            }
            if found:
                return found
        return {}

    def unused(self) -> list[str]:
        """Return the names of tensors that no part of a pipeline has."""
        used = (
            self.prefix,
            *AUTOENCODERS,
            *KEPT_BESIDE,
            *(prefix for encoder in self.family.encoders for prefix in _owned(encoder)),
        )
        return [] if not self.prefix else [name for name in self.tensors if not name.startswith(used)]


def _owned(encoder: Encoder) -> tuple[str, ...]:
    """Return the beginnings of an encoder's names, and of what stands beside them."""
    return tuple(prefix.rpartition(".transformer.")[0] or prefix for prefix in encoder.prefixes)


@contextmanager
def named_file(path: Path) -> Iterator[None]:
    """Name the file where something is wrong with what it holds."""
    try:
        yield
    except KeyError as error:
        raise ValueError(f"{path}: the checkpoint lacks {error.args[0]}") from error
    except ValueError as error:
        # Errors of a kind of their own name the file already.
        if type(error) is not ValueError:
            raise
        raise ValueError(f"{path}: {error}") from error
    except ILL_FITTING as error:
        raise ValueError(f"{path}: its tensors are not those of this layout: {error}") from error
