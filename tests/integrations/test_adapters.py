"""LoRA: fused before quantization, and into codes; refused where it stands beside layers that are to be
quantized.
"""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel

import tfmq
from tfmq.models.denoiser import Denoiser
from tfmq.models.sampler import LoopSampler
from tfmq.recipes import Calibration
from tfmq.recipes.recipe import Temporal
from tfmq.reconstruction.learning import Learning

pytestmark = pytest.mark.filterwarnings("default")


def adapted(build: Any) -> UNet2DConditionModel:
    """Return a UNet with an adapter that changes what it predicts."""
    from peft import LoraConfig

    unet: UNet2DConditionModel = build("conditional")[0].module
    unet.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_v"]))
    return unet


def loop(unet: UNet2DConditionModel) -> LoopSampler:
    return LoopSampler(
        Denoiser(unet),
        DDIMScheduler(),
        shape=(4, 8, 8),
        conditions={"encoder_hidden_states": torch.ones(1, 5, 8)},
    )


RTN = tfmq.scheme("rtn_w8a8")
QUICK = replace(
    RTN,
    weights=replace(RTN.weights, ranges="min_max"),
    activations=replace(RTN.activations, ranges="min_max"),
    calibration=Calibration(samples=1, steps=2, interval=1, batch_size=1),
)


def test_a_fused_adapter_is_quantized_with_the_weights(build: Any, tmp_path: Path) -> None:
    unet, plain = adapted(build), loop(build("conditional")[0].module)
    unet.fuse_lora()
    unet.unload_lora()
    fused = loop(unet)
    expected, without = (sampler.run(range(1), steps=2, seed=0) for sampler in (fused, plain))
    tfmq.quantize(fused, QUICK, output_dir=tmp_path / "q")
    images = loop(tfmq.load(tmp_path / "q", backend="simulated")).run(range(1), steps=2, seed=0)
    assert float((images - expected).square().mean()) < 0.25 * float((without - expected).square().mean())


def test_an_adapter_beside_the_layers_is_refused_with_advice(build: Any) -> None:
    with pytest.raises(ValueError, match=r"UNet2DConditionModel carries LoRA adapters.*fuse_lora\(\)"):
        tfmq.quantize(loop(adapted(build)), QUICK)


def carrying(
    build: Any,
    strength: float,
    targets: tuple[str, ...] = ("to_q", "to_v", "conv1", "time_emb_proj", "ff.net.2"),
) -> UNet2DConditionModel:
    """Return a UNet with an adapter on attention, convolutions, feed-forward and the temporal path, of the
    given strength.
    """
    from peft import LoraConfig

    unet: UNet2DConditionModel = build("conditional")[0].module
    unet.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=list(targets)))
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "lora_B" in name:
                parameter.mul_(strength)
    return unet


def predictions(unet: Any) -> torch.Tensor:
    sample = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        return torch.cat(
            [
                unet(sample, timestep, encoder_hidden_states=torch.ones(2, 5, 8)).sample
                for timestep in (0, 500)
            ]
        )


def test_a_lora_is_fused_into_the_quantized_model(build: Any) -> None:
    target, reference = loop(build("conditional")[0].module), loop(carrying(build, 0.2))
    tfmq.quantize(
        target, replace(QUICK, temporal=Temporal(maintenance="cache", learning=Learning(iterations=1)))
    )
    before, plain = predictions(target.denoiser.module), predictions(build("conditional")[0].module)
    untouched = {
        name: tensor for name, tensor in target.denoiser.module.state_dict().items() if "conv2" in name
    }
    tfmq.fuse_lora(target, reference)
    after, expected = predictions(target.denoiser.module), predictions(reference.denoiser.module)
    assert not getattr(reference.denoiser.module, "peft_config", None)
    effect = float((expected - plain).square().mean())
    assert float((after - expected).square().mean()) < 0.1 * min(
        effect, float((before - expected).square().mean())
    )
    assert all(
        torch.equal(tensor, target.denoiser.module.state_dict()[name]) for name, tensor in untouched.items()
    )


def test_the_drift_of_a_strong_lora_is_warned_about_with_its_figures(build: Any, tmp_path: Path) -> None:
    target = loop(build("conditional")[0].module)
    tfmq.quantize(target, QUICK)
    with pytest.warns(
        UserWarning,
        match=(
            r"the LoRA leaves the calibrated range of \d+ layers, furthest "
            r".* by \d+% of its range.*quantize the fused"
        ),
    ):
        found = tfmq.fuse_lora(target, loop(carrying(build, 20.0)))
    assert found[0].excess > 0.5 and list(found) == sorted(found, key=lambda entry: -entry.excess)
    # What comes before the first adapter reads what it always did.
    assert "conv_in" not in {entry.name for entry in found}
    target.denoiser.module.save_pretrained(tmp_path)
    loaded = UNet2DConditionModel.from_pretrained(tmp_path)
    tfmq.execute(loaded, "simulated")
    provenance = loaded.config.quantization_config.to_dict()["provenance"]
    assert provenance["lora"]["scale"] == 1.0 and provenance["lora"]["drift"][0]["excess"] == found[0].excess
    assert torch.equal(predictions(loaded), predictions(target.denoiser.module))


def test_a_weak_lora_is_fused_in_silence(build: Any) -> None:
    target = loop(build("conditional")[0].module)
    tfmq.quantize(target, QUICK)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the LoRA")
        assert all(entry.excess <= 0.05 for entry in tfmq.fuse_lora(target, loop(carrying(build, 0.01))))


def test_what_cannot_be_fused_is_refused(build: Any) -> None:
    target, plain = loop(build("conditional")[0].module), loop(build("conditional")[0].module)
    with pytest.raises(ValueError, match="takes a quantized model"):
        tfmq.fuse_lora(plain, loop(carrying(build, 1.0)))
    tfmq.quantize(target, QUICK)
    with pytest.raises(ValueError, match="carries no LoRA"):
        tfmq.fuse_lora(target, plain)
