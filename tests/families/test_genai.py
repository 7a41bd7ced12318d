"""Exported pipelines that OpenVINO GenAI draws with, in a process without torch, to the images of tfmq; and
which ones it cannot draw with.
"""

import json
from collections import Counter
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_leaves

from tfmq.backends.execution import quantized_modules
from tfmq.evaluation.paired import psnr
from tfmq.export.directory import DESCRIPTION
from tfmq.export.genai.kinds import KINDS, kind_of
from tfmq.export.genai.scheduler import scheduler_config
from tfmq.export.network import Decoder, TextEncoder
from tfmq.integrations.diffusers.pipelines import find_denoisers
from tfmq.kernels.halves import saturates, terms
from tfmq.nn.plan import packed_layers
from tfmq.numerics.errors import sqnr_db

pytestmark = [
    pytest.mark.filterwarnings("default"),
    pytest.mark.filterwarnings("ignore:.*was not calibrated"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]
needs_genai = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("openvino", "openvino_genai", "openvino_tokenizers")),
    reason="OpenVINO GenAI is not installed",
)
PROMPTS = ("a b", "red house on a hill")
# dB. Images of a small trained model are 47 apart (docs/log.md); other guidance is less than 30.
NEAR = 40.0


@pytest.fixture(scope="module")
def bench(script: Callable[[str], ModuleType]) -> ModuleType:
    """The script that has GenAI draw in a process of its own."""
    return script("benchmarks/genai.py")


def integers(path: Path) -> int:
    """Return how many constants of signed bytes a model on disk has: parts of quantized weights."""
    import openvino

    nodes = openvino.Core().read_model(path).get_ordered_ops()
    found = Counter(
        node.get_element_type().to_string() for node in nodes if node.get_type_name() == "Constant"
    )
    return found["i8"]


def parts(module: Any) -> int:
    """Return how many parts the weights of quantized layers have: for each segment of the input one, or two
    where this processor needs halves.
    """
    return sum(
        len(terms(values))
        for layer in packed_layers(module).values()
        for values, _ in layer.integer_weight().parts()
    )


@needs_genai
@pytest.mark.parametrize("name", ["sd2", "sd3_without_t5"])
def test_genai_draws_the_images_of_tfmq(
    family: Callable[[str], Any], bench: ModuleType, tmp_path: Path, name: str
) -> None:
    from tfmq.export.genai.directory import export_pipeline

    sampler = family(name).sampler(family(name).quantized)
    pipeline = sampler.pipeline
    described = export_pipeline(sampler, tmp_path)
    kind = KINDS[type(pipeline).__name__]
    assert json.loads((tmp_path / DESCRIPTION).read_text()) == described
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index[kind.denoiser][1] == kind.denoiser_class and index["vae"][1] == "AutoencoderKL"
    assert "quantization_config" not in (tmp_path / kind.denoiser / "config.json").read_text()
    # The layers behind tables compute timesteps that these do not know, so that all are in the graph.
    assert integers(tmp_path / kind.denoiser / "openvino_model.xml") >= parts(sampler.denoiser.module) > 0
    networks = quantized_modules(pipeline)
    for folder, module in {
        "vae_decoder": pipeline.vae.decoder,
        "text_encoder": pipeline.text_encoder,
    }.items():
        assert module in networks
        assert integers(tmp_path / folder / "openvino_model.xml") == parts(module) > 0

    rng = np.random.default_rng(0)
    latents = rng.standard_normal((2, *sampler.example().sample.shape[1:])).astype(np.float32)
    # Three steps are not those of the calibration: features of other timesteps are computed in the graph.
    options = {"num_inference_steps": 3, "guidance_scale": 3.0}
    # The other library passes as many tokens for a missing T5 as the first encoder has.
    short = {"max_sequence_length": 8} if name == "sd3_without_t5" else {}
    own = bench.tfmq_images(pipeline, PROMPTS, latents, options=options | short)
    drawn = bench.genai_images(tmp_path, PROMPTS, latents, options=options)
    assert drawn.dtype == np.uint8 and psnr(own, drawn).mean() > NEAR
    # Guidance, prompt and latents matter.
    assert psnr(own, drawn[::-1]).mean() < NEAR - 10


@torch.no_grad()
@pytest.mark.parametrize("form", ["stock", "quantized"])
def test_networks_beside_the_denoiser_are_what_they_are_for_any_batch(
    family: Callable[[str], Any], form: str
) -> None:
    openvino = pytest.importorskip("openvino")
    from tfmq.export.genai.models import network_model

    pipeline = family("sd1").sampler(getattr(family("sd1"), form)).pipeline
    tokens = torch.tensor([[52, 1, 53, 53, 53, 53, 53, 53]])
    encoder = TextEncoder(pipeline.text_encoder, tokens, hidden_states=True)
    assert encoder.outputs == (
        "last_hidden_state",
        "pooler_output",
        *(f"hidden_states.{i}" for i in range(3)),
    )
    # The text ends elsewhere than in the example, which decides where the pooled output is read.
    others = torch.tensor([[52, 7, 9, 30, 53, 53, 53, 53], [52, 2, 3, 4, 5, 6, 7, 53]])
    expected = pipeline.text_encoder(others, output_hidden_states=True)
    images = pipeline.vae.decode(latents := torch.randn(3, 4, 8, 8)).sample
    for model, given, wanted in (
        (network_model(encoder, tokens, halved=saturates()), others, expected.to_tuple()),
        (
            network_model(Decoder(pipeline.vae), torch.zeros(1, 4, 8, 8), halved=saturates()),
            latents,
            (images,),
        ),
    ):
        compiled = openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        found = [torch.from_numpy(value) for value in compiled([given.numpy()]).values()]
        for one, two in zip(tree_leaves(wanted), found, strict=True):
            assert sqnr_db(one, two) > 40


@needs_genai
def test_texts_are_cut_as_transformers_cuts_them(family: Callable[[str], Any], tmp_path: Path) -> None:
    import openvino

    from tfmq.export.genai.tokenizer import write_tokenizer

    tokenizer = family("sd1").reference.pipeline.tokenizer
    texts = ["", "a", "a b c d e f", "a b c d e f g h i j"]
    write_tokenizer(tokenizer, tmp_path / "tokenizer", limit=8, texts=texts)
    model = openvino.Core().compile_model(tmp_path / "tokenizer" / "openvino_tokenizer.xml", "CPU")
    for text in texts:
        expected = tokenizer(text, max_length=8, truncation=True).input_ids
        assert model([text])["input_ids"].tolist() == [expected], text
    with pytest.warns(UserWarning, match=r"reads 1 of the prompts otherwise than CLIPTokenizer, such as 'é'"):
        write_tokenizer(tokenizer, tmp_path / "again", limit=8, texts=["a", "é"])


@pytest.mark.parametrize("name", ["dit", "flux"])
def test_a_pipeline_that_genai_cannot_draw_with_is_refused(family: Callable[[str], Any], name: str) -> None:
    pipeline = family(name).reference.pipeline
    with pytest.raises(ValueError, match=f"GenAI draws no {type(pipeline).__name__}; it draws StableDiff"):
        kind_of(pipeline, "transformer")


def test_what_a_pipeline_lacks_is_named(
    family: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = family("sd1").reference.pipeline
    assert kind_of(pipeline, next(iter(find_denoisers(pipeline)))).timestep == "int64"
    with pytest.raises(ValueError, match="runs the unet, and the vae is quantized"):
        kind_of(pipeline, "vae")
    monkeypatch.setattr(pipeline, "tokenizer", None)
    with pytest.raises(ValueError, match="needs a tokenizer beside the text_encoder, which this lacks"):
        kind_of(pipeline, "unet")
    monkeypatch.setattr(pipeline, "vae", torch.nn.Identity())
    monkeypatch.setattr(pipeline, "text_encoder", None)
    with pytest.raises(
        ValueError, match=r"needs a CLIPTextModel as text_encoder of .*, and this one has none"
    ):
        kind_of(pipeline, "unet")


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("rescaled", [False, True])
def test_noise_levels_come_as_a_list_that_diffusers_reads_to_the_same(schedule: str, rescaled: bool) -> None:
    made = diffusers.DDIMScheduler(
        beta_schedule=schedule, rescale_betas_zero_snr=rescaled, clip_sample=False, num_train_timesteps=40
    )
    config = json.loads(json.dumps(scheduler_config(made)))
    again = diffusers.DDIMScheduler.from_config(config)
    assert len(config["trained_betas"]) == 40 and torch.equal(made.alphas_cumprod, again.alphas_cumprod)


def test_a_scheduler_that_genai_lacks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"GenAI has no UniPCMultistepScheduler; it has DDIMScheduler, "):
        scheduler_config(diffusers.UniPCMultistepScheduler())
    with pytest.raises(ValueError, match="DDIMScheduler does not compute with clip_sample=True"):
        scheduler_config(diffusers.DDIMScheduler())
    with pytest.raises(ValueError, match="does not compute with use_karras_sigmas=True"):
        scheduler_config(diffusers.EulerDiscreteScheduler(use_karras_sigmas=True))
