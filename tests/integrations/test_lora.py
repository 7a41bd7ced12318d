"""LoRA beside integers: peft's arithmetic around packed layers, at any strength, on and off, by backends."""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor

import tfmq
from tfmq.backends.execution import backend_names, execute
from tfmq.models.denoiser import Denoiser
from tfmq.models.sampler import LoopSampler
from tfmq.nn.plan import packed_layers
from tfmq.numerics.errors import sqnr_db
from tfmq.recipes import Calibration
from tfmq.storage.digest import tensor_digest

pytestmark = pytest.mark.filterwarnings("default")

# Attention, and convolutions with and without a stride.
TARGETS = ["to_q", "to_v", "conv1", "downsamplers.0.conv", "ff.net.2"]
SAMPLE = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(7))


def loop(unet: Any) -> LoopSampler:
    from diffusers import DDIMScheduler

    conditions = {"encoder_hidden_states": torch.ones(1, 5, 8)}
    return LoopSampler(Denoiser(unet), DDIMScheduler(), shape=(4, 8, 8), conditions=conditions)


def recipe(rank: int = 0) -> tfmq.Recipe:
    base = tfmq.scheme("rtn_w8a8")
    return replace(
        base,
        weights=replace(base.weights, ranges="min_max", rank=rank),
        activations=replace(base.activations, ranges="min_max"),
        calibration=Calibration(samples=1, steps=2, interval=1, batch_size=1, judged=0.0),
    )


@pytest.fixture
def quantized(build: Any) -> UNet2DConditionModel:
    made = loop(build("conditional")[0].module)
    tfmq.quantize(made, recipe())
    unet: UNet2DConditionModel = made.denoiser.module  # type: ignore[assignment]
    return unet


@pytest.fixture
def weights(build: Any) -> dict[str, Tensor]:
    """The state of an adapter as diffusers saves it, made on a full-precision model."""
    from peft.utils import get_peft_model_state_dict

    unet: UNet2DConditionModel = build("conditional")[0].module
    torch.manual_seed(3)
    unet.add_adapter(LoraConfig(r=2, lora_alpha=3, init_lora_weights=False, target_modules=TARGETS), "a")
    state: dict[str, Tensor] = get_peft_model_state_dict(unet, adapter_name="a")
    return {f"unet.{name}": value.detach().clone() for name, value in state.items()}


@torch.no_grad()
def predicted(unet: Any, timestep: int = 500, **cross_attention: Any) -> Tensor:
    conditions = {
        "encoder_hidden_states": torch.ones(2, 5, 8),
        "cross_attention_kwargs": cross_attention or None,
    }
    output: Tensor = unet(SAMPLE, timestep, **conditions).sample
    return output


def load(unet: Any, weights: dict[str, Tensor], name: str = "a") -> None:
    unet.load_lora_adapter(weights, prefix="unet", adapter_name=name)


@torch.no_grad()
def test_each_layer_adds_the_adapter_to_what_it_computes(
    quantized: UNet2DConditionModel, weights: dict[str, Tensor]
) -> None:
    """The sum is that of the formula, term by term, for what the layer reads."""
    load(quantized, weights)
    adapters = {name: m for name, m in quantized.named_modules() if isinstance(m, LoraLayer)}
    assert {name.rpartition(".")[2] for name in adapters} == {"to_q", "to_v", "conv1", "conv", "2"}
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    handles = [
        m.register_forward_hook(lambda _, args, out, name=name: seen.__setitem__(name, (args[0], out)))
        for name, m in adapters.items()
    ]
    predicted(quantized)
    for handle in handles:
        handle.remove()
    assert seen.keys() == adapters.keys()
    for name, (x, found) in seen.items():
        base, a, b = (
            packed_layers(quantized)[name],
            weights[f"unet.{name}.lora_A.weight"],
            weights[f"unet.{name}.lora_B.weight"],
        )
        scaling = adapters[name].scaling["a"]
        if a.ndim == 2:
            beside = F.linear(F.linear(x, a), b)
        else:
            options = base.operation
            beside = F.conv2d(F.conv2d(x, a, None, options.stride, options.padding), b)  # type: ignore[attr-defined]
        assert torch.equal(found, base(x) + beside * scaling)


def test_strength_zero_and_off_are_the_model_before_to_the_bit(
    quantized: UNet2DConditionModel, weights: dict[str, Tensor]
) -> None:
    before, digest = predicted(quantized), tensor_digest(quantized.state_dict())
    load(quantized, weights)
    full = predicted(quantized)
    assert not torch.equal(full, before)
    quantized.set_adapters("a", 0.0)
    assert torch.equal(predicted(quantized), before)
    quantized.set_adapters("a", 0.5)
    half = predicted(quantized)
    assert not torch.equal(half, full) and not torch.equal(half, before)
    quantized.disable_lora()
    assert torch.equal(predicted(quantized), before)
    quantized.enable_lora()
    quantized.set_adapters("a", 1.0)
    assert torch.equal(predicted(quantized), full)
    load(quantized, {name: 2 * value for name, value in weights.items()}, "b")
    quantized.set_adapters(["a", "b"], [1.0, 0.0])
    assert torch.equal(predicted(quantized), full)
    quantized.delete_adapters("b")
    quantized.unload_lora()
    assert torch.equal(predicted(quantized), before) and tensor_digest(quantized.state_dict()) == digest
    assert not any(isinstance(child, LoraLayer) for child in quantized.modules())


# All are compared with `simulated`.
@pytest.mark.parametrize("backend", [name for name in backend_names() if name != "simulated"], indirect=True)
def test_backends_compute_adapters_and_come_back(
    backend: str, quantized: UNet2DConditionModel, weights: dict[str, Tensor]
) -> None:
    load(quantized, weights)
    expected = predicted(quantized)
    quantized.unload_lora()
    tfmq.execute(quantized, backend)
    before = predicted(quantized)
    load(quantized, weights)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = predicted(quantized)
        predicted(quantized)
    said = [str(warning.message) for warning in caught if "LoRA" in str(warning.message)]
    # Graphs are those without the adapter: another way computes, and says so once.
    assert len(said) == (backend == "openvino") or backend == "auto"
    assert all("graphs do not hold: torch computes it layer by layer" in text for text in said)
    # `float` does not round the inputs of layers.
    assert sqnr_db(expected, found) > (15 if backend == "float" else 35)
    quantized.unload_lora()
    assert torch.equal(predicted(quantized), before)


@pytest.mark.parametrize("rank", [0, 2])
def test_a_fused_adapter_is_part_of_the_branches_and_of_what_is_saved(
    build: Any, weights: dict[str, Tensor], tmp_path: Path, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tfmq.calibration.splitting import Split
    from tfmq.numerics.low_rank import truncated

    def split(reader: Any, *, rank: int, **_: Any) -> Split | None:
        layer = reader.layer
        matrix = layer.weight.flatten(1)[None]
        return Split(factors=truncated(matrix, None, rank)) if rank and layer.operation.groups == 1 else None

    monkeypatch.setattr("tfmq.jobs.weights.best_split", split)
    made = loop(build("conditional")[0].module)
    tfmq.quantize(made, recipe(rank))
    unet: Any = made.denoiser.module
    plain = predicted(unet)
    load(unet, weights)
    beside, count = predicted(unet), sum(isinstance(child, LoraLayer) for child in unet.modules())
    unet.fuse_lora()
    assert sqnr_db(beside, predicted(unet)) > 60
    unet.unfuse_lora()
    assert torch.equal(predicted(unet), beside)
    tfmq.fuse_lora(made)
    fused = predicted(unet)
    assert sqnr_db(beside, fused) > 60 > sqnr_db(beside, plain)
    branches = [layer.branch for layer in packed_layers(unet).values() if layer.branch is not None]
    assert sum(branch.rank == 2 + rank for branch in branches) == count
    unet.save_pretrained(tmp_path)
    loaded = UNet2DConditionModel.from_pretrained(tmp_path)
    tfmq.execute(loaded, "simulated")
    assert torch.equal(predicted(loaded), fused)


def test_rescaled_layers_take_adapters_as_they_come(
    build: Any, weights: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tfmq.nn.transform import Transform
    from tfmq.recipes.recipe import Rescaling

    def wild(readers: Any, **_: Any) -> Transform:
        layer, seen, _ = readers[0]
        width = layer.weight.shape[1] * layer.operation.groups
        return Transform(torch.exp2((torch.arange(width) % 3 - 1).float()), seen.group)

    monkeypatch.setattr("tfmq.jobs.weights.best_transform", wild)
    made = loop(build("conditional")[0].module)
    tfmq.quantize(made, replace(recipe(), rescaling=Rescaling(equalizers=("ranges",), rotation=4)))
    unet: Any = made.denoiser.module
    load(unet, weights)
    # On grids the last bit of a sum becomes a code.
    execute(unet, "float")
    beside = predicted(unet)
    unet.fuse_lora()
    execute(unet, "float")
    assert sqnr_db(beside, predicted(unet)) > 100


def test_what_cannot_stand_beside_is_refused(build: Any, weights: dict[str, Tensor]) -> None:
    made = loop(build("conditional")[0].module)
    tfmq.quantize(made, recipe())
    unet: Any = made.denoiser.module
    with pytest.raises(ValueError, match="unsupported variant"):
        unet.add_adapter(LoraConfig(r=2, use_dora=True, target_modules=["to_q"]))
    unet.unload_lora()
    with pytest.raises(ValueError, match="init_lora_weights='pissa' changes the weight"):
        unet.add_adapter(LoraConfig(r=2, init_lora_weights="pissa", target_modules=["to_q"]))
    unet.unload_lora()
    with pytest.raises(ValueError, match="no quantized model with a LoRA"):
        tfmq.fuse_lora(made)


def test_a_temporal_feature_behind_a_table_takes_no_adapter(build: Any) -> None:
    from peft.utils import get_peft_model_state_dict

    stock: Any = build("conditional")[0].module
    stock.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "time_emb_proj"]), "a")
    state = {
        f"unet.{name}": value for name, value in get_peft_model_state_dict(stock, adapter_name="a").items()
    }
    made = loop(build("conditional")[0].module)
    base = tfmq.scheme("rtn_w8a8")
    tfmq.quantize(
        made, replace(recipe(), temporal=replace(base.temporal, maintenance="cache", rounding=base.rounding))
    )
    unet: Any = made.denoiser.module
    before = predicted(unet)
    with pytest.raises(ValueError, match="temporal feature, whose output comes from a table"):
        load(unet, state)
    assert torch.equal(predicted(unet), before)
    assert not any(isinstance(child, LoraLayer) for child in unet.modules())


@torch.no_grad()
def test_the_verbs_of_a_pipeline_work_on_a_quantized_one(
    quantized: UNet2DConditionModel, weights: dict[str, Tensor]
) -> None:
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    parts: Any = dict.fromkeys(("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    pipeline: Any = StableDiffusionPipeline(
        **parts,
        unet=quantized,
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)

    def drawn() -> Tensor:
        images: Tensor = pipeline(
            prompt_embeds=torch.ones(1, 5, 8),
            negative_prompt_embeds=torch.zeros(1, 5, 8),
            latents=SAMPLE[:1],
            num_inference_steps=2,
            output_type="latent",
        ).images
        return images

    before = drawn()
    pipeline.load_lora_weights(weights, adapter_name="ink")
    full = drawn()
    assert pipeline.get_active_adapters() == ["ink"] and not torch.equal(full, before)
    # As pipelines pass a strength to the denoiser for one call.
    scaled = predicted(quantized, scale=0.25)
    assert torch.equal(drawn(), full)
    pipeline.set_adapters("ink", 0.25)
    assert torch.equal(predicted(quantized), scaled) and not torch.equal(drawn(), full)
    pipeline.set_adapters("ink", 0.0)
    assert torch.equal(drawn(), before)
    pipeline.set_adapters("ink")
    pipeline.disable_lora()
    assert torch.equal(drawn(), before)
    pipeline.enable_lora()
    pipeline.fuse_lora(components=["unet"])
    assert sqnr_db(full, drawn()) > 60
    pipeline.unfuse_lora(components=["unet"])
    assert torch.equal(drawn(), full)
    pipeline.unload_lora_weights()
    assert torch.equal(drawn(), before)
