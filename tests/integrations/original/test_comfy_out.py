"""Quantized files of ComfyUI, written: what comfy-kitchen makes of them is what the model has."""

import json
from dataclasses import replace
from pathlib import Path

import published
import pytest
import torch
from kitchen import (
    MAKERS,
    PREFIX,
    QuantizedTensor,
    TensorWiseINT8Layout,
    call,
    denoiser_of,
    opened,
    theirs,
    without_t5,
)
from torch import Tensor

import tfmq
from tfmq.cli.commands import run
from tfmq.integrations.diffusers.original.comfy_out import comfy_tensors, export_comfy
from tfmq.integrations.diffusers.original.single_file import open_single_file
from tfmq.nn.operation import operation_of
from tfmq.nn.packed_layer import PackedLayer
from tfmq.nn.plan import packed_layers
from tfmq.nn.swap import replace_module
from tfmq.numerics.grids import IntegerFormat
from tfmq.recipes.recipe import Calibration
from tfmq.storage.atomic import read_tensors, write_tensors


def weights_of(tensors: dict[str, Tensor]) -> dict[str, QuantizedTensor]:
    """Return the layers of a file as ComfyUI's loader builds them."""
    found = {}
    for name in [name for name in tensors if name.endswith(".comfy_quant")]:
        layer, described = name.removesuffix(".comfy_quant"), json.loads(bytes(tensors[name].tolist()))
        assert described.pop("format") == "int8_tensorwise"
        codes = tensors[f"{layer}.weight"]
        params = TensorWiseINT8Layout.Params(
            scale=tensors[f"{layer}.weight_scale"],
            orig_dtype=torch.float32,
            orig_shape=tuple(codes.shape),
            **{key: value for key, value in described.items() if key.startswith("convrot")},
        )
        found[layer] = QuantizedTensor(codes, "TensorWiseINT8Layout", params)
    return found


@pytest.mark.parametrize("maker", MAKERS)
def test_what_was_read_is_written_to_the_bit(maker: str, tmp_path: Path) -> None:
    parts, tensors = MAKERS[maker](tmp_path)
    changed, layers = theirs(without_t5(tensors))
    model = denoiser_of(opened(tmp_path, maker, changed, parts))
    result = export_comfy(model, tmp_path)
    written, _ = read_tensors(tmp_path / result["files"][0])
    assert result["int8"] == len(layers) and result["left_out"] == []
    assert written.keys() == {name for name in changed if name.startswith(PREFIX)}
    for name, tensor in written.items():
        expected = changed[name]
        exact = (
            expected if expected.dtype in (torch.int8, torch.uint8) or "_scale" in name else expected.half()
        )
        assert tensor.dtype == exact.dtype and torch.equal(tensor, exact), name


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A rotated transformer and its tables, of four bits, quantized by tfmq and saved."""
    folder = tmp_path_factory.mktemp("learned")
    parts, _ = published.sd3(folder)
    parts = {name: part for name, part in parts.items() if name != "text_encoder_3"}
    pipeline = published.diffusers.StableDiffusion3Pipeline(
        **parts,
        text_encoder_3=None,
        tokenizer=published.tokenizer(folder / "one"),
        tokenizer_2=published.tokenizer(folder / "two"),
        tokenizer_3=None,
        scheduler=published.diffusers.FlowMatchEulerDiscreteScheduler(),
    )
    recipe = tfmq.scheme("rtn_w4a8")
    recipe = replace(
        recipe,
        rescaling=replace(recipe.rescaling, rotation=64),
        calibration=Calibration(samples=1, steps=2, interval=1, batch_size=1),
    )
    tfmq.quantize(pipeline, recipe, prompts=("a b",), components="denoiser", output_dir=folder / "low")
    return folder / "low"


def test_learned_codes_are_opened_by_comfy_kitchen(learned: Path, tmp_path: Path) -> None:
    model = tfmq.load(learned, backend="float").transformer
    result = export_comfy(model, tmp_path)
    tensors, _ = read_tensors(tmp_path / result["files"][0])
    layers = weights_of(tensors)
    packed = packed_layers(model)
    halves = {name for names in comfy_tensors(model)[1].dequantized.values() for name in names}
    # Among them are q, k and v, which the layout joins.
    assert halves == {"pos_embed.proj"}
    assert result["int8"] == len(layers) > 10 and any(layer.rotated for layer in packed.values())
    assert any("grids of each token" in line for line in result["left_out"])
    # Dequantized by comfy-kitchen and read as a file of floats, it is the model in floating point.
    plain = {
        name: tensor.float() for name, tensor in tensors.items() if not name.endswith(("_scale", "_quant"))
    }
    plain |= {f"{name}.weight": layer.dequantize() for name, layer in layers.items()}
    write_tensors(tmp_path / "plain.safetensors", plain)
    stock = denoiser_of(open_single_file(tmp_path / "plain.safetensors", base=learned))
    for name, layer in packed.items():
        weight, own = stock.get_submodule(name).weight, layer.stock_weight
        assert (weight - own).abs().max() <= 1e-3 * own.abs().max()
        if name not in halves:
            assert (weight - own).abs().max() <= 4e-6 * own.abs().max()
    with torch.no_grad(), pytest.warns(UserWarning, match="timestep 500 was not calibrated"):
        # There its tables are not used.
        expected = call(model)
        assert (call(stock) - expected).norm() < 2e-3 * expected.norm()
    # What is read back has the same integers.
    again = packed_layers(denoiser_of(open_single_file(tmp_path / result["files"][0], base=learned)))
    for name, layer in again.items():
        assert torch.equal(layer.integer_weight().values, packed[name].integer_weight().values)
        assert torch.equal(layer.scale, packed[name].scale) and layer.rotated == packed[name].rotated


def test_the_verbs(learned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["export", str(learned), "--to", "comfy", "--output-dir", str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    assert "matrices of int8, the rest in float16" in text and "left out: " in text
    arguments = ["import", str(tmp_path / "out" / "denoiser.safetensors"), "--base", str(learned), "--json"]
    assert run([*arguments, "--output-dir", str(tmp_path / "back")]) == 0
    assert json.loads(capsys.readouterr().out)["quantized"] == ["transformer"]
    tfmq.load(tmp_path / "back", backend="reference")


def test_what_the_format_cannot_hold_is_listed(tmp_path: Path) -> None:
    """A UNet with quantized convolutions, rescaled and split inputs and asymmetric codes of eight bits."""
    net = published.unet(
        cross_attention_dim=64, block_out_channels=(32, 64), attention_head_dim=8, **published.ENDS
    )
    packed = {}
    for name, module in list(net.named_modules()):
        if (operation := operation_of(module)) is None or not name.startswith(
            ("mid_block", "time_embedding")
        ):
            continue
        place = len(packed)
        bits = 8 if "ff" in name else 4
        layer = PackedLayer(
            operation,
            IntegerFormat(bits),
            tuple(module.weight.shape),
            bias=torch.float32 if module.bias is not None else None,
            rescaled="to_q" in name,
        )
        generator = torch.Generator().manual_seed(place)
        layer.packed.copy_(torch.randint(256, layer.packed.shape, generator=generator))
        layer.scale.uniform_(1e-3, 2e-3, generator=generator)
        assert layer.zero_point is not None
        layer.zero_point.fill_(3)
        packed[name] = layer
    for name, layer in packed.items():
        replace_module(net, name, layer)
    tensors, lost = comfy_tensors(net)
    reasons = {reason: set(names) for reason, names in lost.dequantized.items()}
    convolutions = {name for name in packed if "conv" in name or name.endswith(("proj_in", "proj_out"))}
    assert reasons["no linear layer"] == convolutions
    assert reasons["its input is rescaled"] == {name for name in packed if "to_q" in name}
    # Codes 0 to 255 less 3 need nine bits.
    assert reasons["its integers need more than eight bits"] == {name for name in packed if ".ff." in name}
    held = packed.keys() - set().union(*reasons.values())
    assert held and len(weights_of(tensors)) == len(held)
    layer = packed["time_embedding.linear_1"]
    assert torch.equal(weights_of(tensors)[f"{PREFIX}time_embed.0"].dequantize(), layer.stock_weight)
    conv = packed["mid_block.resnets.0.conv1"].stock_weight
    assert torch.equal(tensors[f"{PREFIX}middle_block.0.in_layers.2.weight"], conv.half())
    with torch.no_grad():
        net.conv_out.bias.fill_(1e5)
    assert comfy_tensors(net)[0][f"{PREFIX}out.2.bias"].dtype == torch.bfloat16
    with pytest.raises(ValueError, match="UNet2DModel has no layout that other loaders open"):
        comfy_tensors(published.diffusers.UNet2DModel(block_out_channels=(32, 32, 32, 32)))
