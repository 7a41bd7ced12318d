"""Write a quantized pipeline as OpenVINO GenAI and optimum-intel lay one out."""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import openvino as ov
import torch
from torch import Tensor

from tfmq.export.directory import DESCRIPTION, description, keyed_call, output_names
from tfmq.export.fake_quantize import graph_kernels
from tfmq.export.genai.kinds import T5, Kind, encoders_of, fitting, kind_of, token_limits, tokenizer_of
from tfmq.export.genai.models import denoiser_model, network_model
from tfmq.export.genai.scheduler import scheduler_config
from tfmq.export.genai.tokenizer import write_tokenizer
from tfmq.export.network import Decoder, Network, TextEncoder
from tfmq.kernels.halves import wanted
from tfmq.models.denoiser import Denoiser, Inputs
from tfmq.storage.atomic import write_json

MODEL = "openvino_model.xml"
NOTHING = [None, None]


class Drawing(Protocol):
    """What is exported: a pipeline of diffusers, the name of its quantized component and what calls that as
    a denoiser, its prompts, and what it draws with beside them.
    """

    pipeline: Any
    component: str
    denoiser: Denoiser
    prompts: tuple[str, ...]
    options: dict[str, Any]
    spacing: str | None

    def example(self) -> Inputs:
        """Return the inputs of one call of the denoiser."""


def export_pipeline(drawing: Drawing, directory: Path, *, halved: bool | None = None) -> dict[str, Any]:
    """Write a pipeline to an existing `directory`: models of its denoiser, text encoders and decoder, for any
    batch, its tokenizers, and the configurations of all.

    What is quantized computes in integers; what is not stays in floating point. The temporal table is inside
    of the denoiser's graph, keyed by the timestep. Sizes other than the batch are those of the pipeline's
    default image.

    Args:
        drawing: a sampler of a pipeline of a kind in `KINDS` whose denoiser is quantized by tfmq.
        directory: takes the files.
        halved: as in `tfmq.export.directory.export`.

    Returns:
        What `tfmq_export.json` holds.

    Raises:
        ValueError: GenAI cannot draw with such a pipeline; says what is missing.
    """
    pipeline, denoiser = drawing.pipeline, drawing.denoiser
    kind = kind_of(pipeline, drawing.component)
    schedule = scheduler_config(pipeline.scheduler)
    _warn_of_options(drawing)
    example = fitting(kind, pipeline, drawing.example())
    graph, call = keyed_call(denoiser, example)
    halved = wanted(halved)
    with torch.no_grad(), graph_kernels(denoiser.module, halved=halved):
        outputs = output_names(graph, call)
        model = denoiser_model(graph, call, outputs, timestep=kind.timestep)
    _write_model(directory / kind.denoiser, model, denoiser.module)
    texts = example.conditions["encoder_hidden_states"].shape[1]
    for name, limit in token_limits(kind, pipeline, texts).items():
        encoder = _encoder(pipeline, name, kind, limit)
        _write_model(directory / name, network_model(*encoder, halved=halved), pipeline.components[name])
        tokenizer = tokenizer_of(name)
        write_tokenizer(
            pipeline.components[tokenizer], directory / tokenizer, limit=limit, texts=drawing.prompts
        )
    latents = torch.zeros(1, pipeline.vae.config.latent_channels, *example.sample.shape[2:])
    decoder = network_model(Decoder(pipeline.vae), latents, halved=halved)
    _write_model(directory / "vae_decoder", decoder, pipeline.vae)
    (directory / "scheduler").mkdir()
    write_json(directory / "scheduler" / "scheduler_config.json", schedule)
    write_json(directory / "model_index.json", _index(pipeline, kind))
    files = sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())
    written = description(denoiser.module, files=files, inputs=_ports(model), outputs=outputs, halved=halved)
    write_json(directory / DESCRIPTION, written)
    return written


def _warn_of_options(drawing: Drawing) -> None:
    """Warn where the model was calibrated for steps that GenAI does not take."""
    eta = drawing.options.get("eta") or 0
    if drawing.spacing or eta:
        asked = f"spacing={drawing.spacing}" if drawing.spacing else f"eta={eta}"
        warnings.warn(
            f"the model was calibrated with {asked}, and OpenVINO GenAI takes the scheduler's own steps "
            "without noise; quantize it for those, or call tfmq.rebake",
            stacklevel=3,
        )


def _ports(model: ov.Model) -> list[dict[str, Any]]:
    """Return name, dtype and shape of each input of a model of any batch."""
    return [
        {
            "name": port.get_any_name(),
            "dtype": port.get_element_type().to_dtype().name,
            "shape": ["batch", *(size.get_length() for size in list(port.partial_shape)[1:])],
        }
        for port in model.inputs
    ]


def _encoder(pipeline: Any, name: str, kind: Kind, limit: int) -> tuple[Network, Tensor]:
    """Return a text encoder and tokens for it."""
    encoder, tokenizer = (pipeline.components[part] for part in (name, tokenizer_of(name)))
    tokens = tokenizer(
        ["a", "b"], padding="max_length", max_length=limit, truncation=True, return_tensors="pt"
    ).input_ids
    every_layer = kind.hidden_states and kind.encoders[name] != T5
    return TextEncoder(encoder, tokens, hidden_states=every_layer), tokens


def _write_model(directory: Path, model: ov.Model, component: Any) -> None:
    """Write a model and the configuration of the component that it computes."""
    directory.mkdir()
    ov.save_model(model, directory / MODEL, compress_to_fp16=False)
    owner = component if hasattr(component, "to_json_string") else component.config
    config = json.loads(owner.to_json_string())
    config.pop("quantization_config", None)
    write_json(directory / "config.json", config)


def _index(pipeline: Any, kind: Kind) -> dict[str, Any]:
    """Return the list of components: what is not written is not there."""
    encoders = encoders_of(kind, pipeline)
    written = {kind.denoiser, "vae", "scheduler", *encoders, *map(tokenizer_of, encoders)}
    config: Mapping[str, Any] = pipeline.config
    index: dict[str, Any] = {"_class_name": type(pipeline).__name__}
    for name, value in config.items():
        if name == "_diffusers_version" or not name.startswith("_"):
            absent = name in pipeline.components and name not in written
            index[name] = NOTHING if absent else value
    return index
