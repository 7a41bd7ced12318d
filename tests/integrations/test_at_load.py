"""Quantization while diffusers loads a model."""

import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DiffusionPipeline, PipelineQuantizationConfig, UNet2DModel
from safetensors.torch import load_file, save_file
from torch import nn

import tfmq
from tfmq.backends.caching import model_key
from tfmq.models.denoiser import Denoiser, Inputs
from tfmq.nn.plan import packed_layers
from tfmq.numerics.errors import sqnr_db
from tfmq.numerics.operations import Linear
from tfmq.targets import SHELVES

Build = Callable[[str], tuple[Denoiser, Inputs]]
# dB that random models of these sizes have at least.
LEAST = {"w8a8": 30, "w8a32": 32, "w4a8": 9, "w4a32": 9}


def config(bits: str | None = "w8a8", backend: str = "simulated") -> tfmq.TFMQConfig:
    return tfmq.TFMQConfig(bits=bits, backend=backend)


def output(model: Any, denoiser: Denoiser, inputs: Inputs) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(**denoiser.arguments(inputs)).sample
    return result


@pytest.fixture
def stored(build: Build, tmp_path: Path) -> Callable[..., tuple[Any, Denoiser, Inputs]]:
    """Return a function that saves a model of conftest.py, and returns its class, and how it is called."""

    def make(name: str, **options: Any) -> tuple[Any, Denoiser, Inputs]:
        denoiser, inputs = build(name)
        model: Any = denoiser.module
        model.save_pretrained(tmp_path / "stock", **options)
        return type(model), denoiser, inputs

    return make


@pytest.mark.parametrize("bits", LEAST)
@pytest.mark.parametrize("name", ["conditional", "dit"])
def test_a_model_in_shards_is_quantized_saved_and_loaded_again(
    stored: Callable[..., Any], tmp_path: Path, name: str, bits: str
) -> None:
    kind, denoiser, inputs = stored(name, max_shard_size="20KB")
    assert len([*(tmp_path / "stock").glob("*.safetensors")]) > 2
    quantized = kind.from_pretrained(tmp_path / "stock", quantization_config=config(bits))
    layers = packed_layers(quantized)
    widths = [layer.format.bits for layer in layers.values()]
    assert {*widths} <= {8, int(bits[1])} and widths[0] == widths[-1] == 8
    dynamic = {type(layer.operation) for layer in layers.values() if layer.input_quantizer is not None}
    assert dynamic == ({Linear} if bits.endswith("a8") else set())
    full = output(denoiser.module, denoiser, inputs)
    found = output(quantized, denoiser, inputs)
    assert LEAST[bits] < sqnr_db(full, found) < 80
    quantized.save_pretrained(tmp_path / "again")
    manifest = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    assert manifest["provenance"]["at_load"] == {"bits": bits} and "bits" not in manifest
    again = kind.from_pretrained(tmp_path / "again", quantization_config=config(None))
    assert torch.equal(output(again, denoiser, inputs), found)
    size = sum(path.stat().st_size for path in (tmp_path / "again").glob("*.safetensors"))
    assert size < 0.6 * sum(path.stat().st_size for path in (tmp_path / "stock").glob("*.safetensors"))


@pytest.mark.skipif(sys.platform != "linux", reason="the system does not say which files are mapped")
def test_nothing_keeps_a_shard_in_memory(stored: Callable[..., Any], tmp_path: Path) -> None:
    """A bias that stays as it was read would keep the whole file mapped."""
    kind, denoiser, _ = stored("conditional", max_shard_size="20KB")

    def mapped() -> bool:
        return str(tmp_path / "stock") in Path("/proc/self/maps").read_text()

    stock = kind.from_pretrained(tmp_path / "stock")
    assert mapped(), "or there is nothing to let go of"
    del stock
    model = kind.from_pretrained(tmp_path / "stock", quantization_config=config())
    gc.collect()
    assert not mapped()
    kept = {name: tensor for name, tensor in denoiser.module.state_dict().items() if name.endswith("bias")}
    assert kept and all(torch.equal(model.state_dict()[name], tensor) for name, tensor in kept.items())


def test_no_layer_is_left_in_floating_point(stored: Callable[..., Any], tmp_path: Path) -> None:
    kind, denoiser, _ = stored("conditional")
    quantized = kind.from_pretrained(tmp_path / "stock", quantization_config=config())
    stock = {
        name for name, module in denoiser.module.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)
    }
    assert packed_layers(quantized).keys() == stock
    biases = {name: tensor for name, tensor in denoiser.module.named_parameters() if name.endswith(".bias")}
    assert biases and all(torch.equal(quantized.get_parameter(name), biases[name]) for name in biases)


@pytest.mark.parametrize("options", [{"device_map": {"": "cpu"}}, {"torch_dtype": torch.bfloat16}])
def test_options_of_diffusers(stored: Callable[..., Any], tmp_path: Path, options: dict[str, Any]) -> None:
    kind, denoiser, inputs = stored("unet")
    quantized = kind.from_pretrained(tmp_path / "stock", quantization_config=config(), **options)
    dtype = options.get("torch_dtype", torch.float32)
    with torch.no_grad():
        found = quantized(inputs.sample.to(dtype), inputs.timestep).sample
    assert found.dtype == dtype and sqnr_db(output(denoiser.module, denoiser, inputs), found.float()) > 25


def test_a_pipeline_takes_it_for_a_component_and_backends_agree(build: Build, tmp_path: Path) -> None:
    denoiser, inputs = build("unet")
    assert isinstance(denoiser.module, UNet2DModel)
    DDPMPipeline(unet=denoiser.module, scheduler=DDIMScheduler()).save_pretrained(tmp_path)
    outputs = []
    for backend in ("simulated", "torch"):
        mapping = PipelineQuantizationConfig(quant_mapping={"unet": config(backend=backend)})
        pipeline = DiffusionPipeline.from_pretrained(tmp_path, quantization_config=mapping)
        outputs.append(output(pipeline.unet, denoiser, inputs))
    assert sqnr_db(*outputs) > 40


def test_a_single_file_is_quantized_while_it_is_opened(stored: Callable[..., Any], tmp_path: Path) -> None:
    kind, denoiser, inputs = stored("conditional")
    (path,) = (tmp_path / "stock").glob("*.safetensors")
    single = tmp_path / "single.safetensors"
    save_file(load_file(path), single, metadata={"format": "pt"})
    found = kind.from_single_file(str(single), config=str(tmp_path / "stock"), quantization_config=config())
    whole = kind.from_pretrained(tmp_path / "stock", quantization_config=config())
    assert packed_layers(found).keys() == packed_layers(whole).keys() != set()
    assert torch.equal(output(found, denoiser, inputs), output(whole, denoiser, inputs))


@pytest.mark.filterwarnings("ignore:.*torch_dtype:FutureWarning")
def test_a_pipeline_of_half_precision_draws_when_it_is_loaded_again(tmp_path: Path) -> None:
    """Diffusers opens its own models in float32, transformers opens an encoder in the precision it has."""
    mapping = PipelineQuantizationConfig(quant_mapping={"unet": config()})
    options = {"quantization_config": mapping, "torch_dtype": torch.float16}
    DiffusionPipeline.from_pretrained(SHELVES[0] / "text", **options).save_pretrained(tmp_path / "half")
    pipeline = tfmq.load(tmp_path / "half", backend="simulated")
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("a red seven", num_inference_steps=1, output_type="pt").images
    assert image.isfinite().all() and pipeline.text_encoder.dtype == torch.float32


def test_what_cannot_be_quantized_is_refused(stored: Callable[..., Any], tmp_path: Path) -> None:
    kind, _, _ = stored("unet")
    with pytest.raises(ValueError, match="bits='w3a8' is not one of w8a8, w4a8"):
        config("w3a8")
    with pytest.raises(ValueError, match="is not quantized by tfmq: quantize it while it loads"):
        kind.from_pretrained(tmp_path / "stock", quantization_config=config(None))
    (path,) = (tmp_path / "stock").glob("*.safetensors")
    tensors = load_file(path)
    tensors["conv_in.weight"][0, 0, 0, 0] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"conv_in\.weight holds NaN or infinity"):
        kind.from_pretrained(tmp_path / "stock", quantization_config=config())


def test_bits_of_a_quantized_model_are_its_own(stored: Callable[..., Any], tmp_path: Path) -> None:
    kind, _, _ = stored("unet")
    kind.from_pretrained(tmp_path / "stock", quantization_config=config()).save_pretrained(tmp_path / "low")
    with pytest.warns(UserWarning, match="bits='w4a8' has no effect: the model is quantized already"):
        found = kind.from_pretrained(tmp_path / "low", quantization_config=config("w4a8"))
    assert found.config["quantization_config"].manifest["provenance"]["at_load"] == {"bits": "w8a8"}


def test_the_same_tensors_read_otherwise_have_another_key(stored: Callable[..., Any], tmp_path: Path) -> None:
    """Inputs on the grid of each token leave no tensor behind; a cache must tell them apart all the same."""
    kind, _, _ = stored("unet")
    models = [
        kind.from_pretrained(tmp_path / "stock", quantization_config=config(bits))
        for bits in ("w8a8", "w8a32", "w8a8")
    ]
    states = [model.state_dict() for model in models]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    keys = [model_key(model) for model in models]
    assert keys[0] != keys[1] and keys[0] == keys[2]
