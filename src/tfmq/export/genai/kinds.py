"""Which pipelines OpenVINO GenAI draws with, and what it reads of each: read in its sources
of August 2026 (`src/cpp/src/image_generation`), run with 2026.4.1.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from tfmq.models.denoiser import Inputs

CLIP, PROJECTED, T5 = "CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel"


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A class of pipelines: its denoiser, the text encoders by component and class, those of them that may be
    left out, whether hidden states of every layer are read, and the dtype in which timesteps come.
    """

    denoiser: str
    denoiser_class: str
    encoders: Mapping[str, str]
    optional: tuple[str, ...] = ()
    hidden_states: bool
    timestep: str


_DIFFUSION = Kind(
    denoiser="unet",
    denoiser_class="UNet2DConditionModel",
    encoders={"text_encoder": CLIP},
    hidden_states=False,
    timestep="int64",
)
KINDS: dict[str, Kind] = {
    "StableDiffusionPipeline": _DIFFUSION,
    "LatentConsistencyModelPipeline": _DIFFUSION,
    "StableDiffusionXLPipeline": Kind(
        denoiser="unet",
        denoiser_class="UNet2DConditionModel",
        encoders={"text_encoder": CLIP, "text_encoder_2": PROJECTED},
        hidden_states=True,
        timestep="int64",
    ),
    "StableDiffusion3Pipeline": Kind(
        denoiser="transformer",
        denoiser_class="SD3Transformer2DModel",
        encoders={"text_encoder": PROJECTED, "text_encoder_2": PROJECTED, "text_encoder_3": T5},
        optional=("text_encoder_3",),
        hidden_states=True,
        timestep="float32",
    ),
}
DECODER = "AutoencoderKL"


def tokenizer_of(encoder: str) -> str:
    """Return the component that makes tokens for a text encoder.

    >>> tokenizer_of("text_encoder_2")
    'tokenizer_2'
    """
    return encoder.replace("text_encoder", "tokenizer")


def kind_of(pipeline: Any, denoiser: str) -> Kind:
    """Return the kind of a pipeline whose component `denoiser` is quantized.

    Raises:
        ValueError: GenAI cannot draw with it, for the reason in the message.
    """
    name = type(pipeline).__name__
    if name not in KINDS:
        raise ValueError(f"OpenVINO GenAI draws no {name}; it draws {', '.join(KINDS)}")
    kind, components = KINDS[name], pipeline.components
    if denoiser != kind.denoiser:
        raise ValueError(
            f"of a {name} OpenVINO GenAI runs the {kind.denoiser}, and the {denoiser} is quantized"
        )
    wanted = {kind.denoiser: kind.denoiser_class, **kind.encoders, "vae": DECODER}
    for component, expected in wanted.items():
        found = components.get(component)
        if found is None and component in kind.optional:
            continue
        if type(found).__name__ != expected:
            has = "has none" if found is None else f"has a {type(found).__name__}"
            raise ValueError(
                f"OpenVINO GenAI needs a {expected} as {component} of a {name}, and this one {has}"
            )
        if component in kind.encoders and components.get(tokenizer_of(component)) is None:
            raise ValueError(
                f"OpenVINO GenAI needs a {tokenizer_of(component)} beside the {component}, which this lacks"
            )
    return kind


def token_limits(kind: Kind, pipeline: Any, texts: int) -> dict[str, int]:
    """Return the number of tokens that each text encoder of a pipeline reads, where the denoiser reads hidden
    states of `texts` tokens: CLIP has its own, T5 what that leaves beside the first CLIP.
    """
    limits: dict[str, int] = {}
    for name in encoders_of(kind, pipeline):
        own: int | None = getattr(pipeline.components[name].config, "max_position_embeddings", None)
        limits[name] = own or texts - limits["text_encoder"]
    return limits


def fitting(kind: Kind, pipeline: Any, example: Inputs) -> Inputs:
    """Return an example of a denoiser's inputs with as many tokens as GenAI passes: in the place of a T5 that
    a pipeline lacks it passes zeros for as many as the first CLIP has, where diffusers takes more.
    """
    if encoders_of(kind, pipeline) == tuple(kind.encoders):
        return example
    states = example.conditions["encoder_hidden_states"]
    limit = pipeline.components["text_encoder"].config.max_position_embeddings
    return replace(
        example, conditions={**example.conditions, "encoder_hidden_states": states[:, : 2 * limit]}
    )


def encoders_of(kind: Kind, pipeline: Any) -> tuple[str, ...]:
    """Return the text encoders that a pipeline of a kind has, in order."""
    return tuple(name for name in kind.encoders if pipeline.components.get(name) is not None)
