"""What images are asked to show, and the CLIP score: how well an image fits its text, by torchmetrics."""

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import torch

from tfmq.errors import require
from tfmq.evaluation.sampling import Images
from tfmq.models.sampler import Sampler

# The CLIP model behind the scores in the papers' tables.
CLIP = "openai/clip-vit-base-patch16"
ClipScore = Callable[[Images, Sequence[str]], float]


@runtime_checkable
class Asking(Protocol):
    """A sampler that says in words what each image is asked to show: its prompt, or the name of its class;
    None where it has no words.
    """

    def asked(self, indices: range) -> list[str] | None:
        """Return what each of the images `indices` is asked to show; None where there are no words."""


def clip_score(model: str = CLIP) -> ClipScore:
    """Build the metric: `100 max(cos(image, text), 0)` (Hessel et al., 2021), the mean over a batch of
    images.

    Raises:
        MissingFileError, ForeignFileError: the model is not there; see `tfmq.integrations.clip`.
        MissingExtraError: torchmetrics or transformers is not installed.
    """
    require("transformers", extra="diffusers")
    from tfmq.integrations.clip import open_clip

    library = require("torchmetrics.functional.multimodal", extra="eval")
    loaded = open_clip(model)

    @torch.no_grad()
    def score(images: Images, prompts: Sequence[str]) -> float:
        return float(
            library.clip_score(
                list(torch.from_numpy(images).permute(0, 3, 1, 2)), list(prompts), lambda: loaded
            )
        )

    return score


def draws_from_text(sampler: Sampler) -> bool:
    """Whether images are drawn from prompts."""
    require("diffusers", extra="diffusers")
    from tfmq.integrations.diffusers.pipelines import PipelineSampler

    return isinstance(sampler, PipelineSampler) and sampler.takes_prompts


def prompts_of(sampler: Sampler, indices: range) -> list[str]:
    """Return the texts that images are drawn from.

    Raises:
        ValueError: the sampler does not draw from text.
    """
    if not draws_from_text(sampler):
        raise ValueError(
            "the clip score is for text-to-image models, and this one does "
            "not draw from text; leave clip out of --metrics"
        )
    return sampler.prompts_of(indices)  # type: ignore[attr-defined]


def asked_of(sampler: Sampler, indices: range) -> list[str]:
    """Return what images are asked to show, in words.

    Raises:
        ValueError: the sampler has no words for it.
    """
    asked = sampler.asked(indices) if isinstance(sampler, Asking) else None
    if asked is None:
        raise ValueError(
            "adherence is for models that draw from prompts or from named classes; leave it out of --metrics"
        )
    return asked
