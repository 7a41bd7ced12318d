"""Quantized files of ComfyUI, read: the same codes, scales and rotations, and the arithmetic of
comfy-kitchen.
"""

import importlib
import json
from collections.abc import Callable
from pathlib import Path

import published
import pytest
import torch
import torch.nn.functional as F
from kitchen import (
    MAKERS,
    PREFIX,
    QuantizedTensor,
    TensorWiseINT8Layout,
    call,
    denoiser_of,
    is_linear,
    marked,
    opened,
    theirs,
    without_t5,
)
from torch import Tensor

import tfmq
from tfmq.integrations.diffusers.original.single_file import open_single_file
from tfmq.nn.packed_layer import KernelExecution, PackedLayer
from tfmq.nn.plan import packed_layers
from tfmq.numerics.grids import IntegerFormat
from tfmq.numerics.rotation import rotate
from tfmq.storage.atomic import write_tensors
from tfmq.storage.comfy import Int8Layer, encoded

eager = importlib.import_module("comfy_kitchen.backends.eager.quantization")


@pytest.mark.parametrize("flat", [False, True], ids=["convrot", "tensorwise"])
@pytest.mark.parametrize("maker", MAKERS)
def test_layers_have_the_codes_scales_and_rotations_of_the_file(
    maker: str, flat: bool, tmp_path: Path
) -> None:
    parts, tensors = MAKERS[maker](tmp_path)
    changed, layers = theirs(without_t5(tensors), flat=flat)
    model = denoiser_of(opened(tmp_path, maker, changed, parts))
    packed = packed_layers(model)
    assert len(packed) >= len(layers) > 0
    # Their weights, dequantized by comfy-kitchen and put into a stock model by the same names, are ours.
    plain = {**tensors, **{f"{name}.weight": layer.dequantize() for name, layer in layers.items()}}
    stock = denoiser_of(opened(tmp_path, maker, without_t5(plain), parts))
    for name, layer in packed.items():
        weight = stock.get_submodule(name).weight
        assert isinstance(layer, PackedLayer) and (layer.rotated == 0) == (flat or weight.shape[1] % 64 > 0)
        if layer.rotated:
            # Both undo the rotation in float32, in another order.
            assert (layer.stock_weight - weight).abs().max() <= 4e-6 * weight.abs().max()
        else:
            assert torch.equal(layer.stock_weight, weight)
        assert layer.input_quantizer is not None and layer.input_quantizer.describe()["dynamic"] == "token"
    for name, tensor in stock.state_dict().items():
        if name.removesuffix(".weight") not in packed and not name.endswith("bias"):
            assert torch.equal(model.state_dict()[name], tensor)


def test_every_backend_computes_it_and_it_loads_again(tmp_path: Path) -> None:
    maker = "flux"
    parts, tensors = MAKERS[maker](tmp_path)
    changed, _ = theirs(tensors)
    pipeline = opened(tmp_path, maker, changed, parts)
    pipeline.save_pretrained(str(tmp_path / "saved"))
    outputs = {}
    for backend in ("simulated", "reference", "torch", "openvino"):
        if backend == "openvino":
            pytest.importorskip("openvino")
        model = denoiser_of(tfmq.load(tmp_path / "saved", backend=backend))
        with torch.no_grad():
            outputs[backend] = call(model)
    exact = outputs["reference"]
    with torch.no_grad():
        stock = denoiser_of(opened(tmp_path, maker, tensors, parts))
        full = call(stock)
    noise = float((exact - full).norm() / full.norm())
    # The rounding of eight bits is seen. Engines differ by less: an input that falls to the neighbouring code
    # in one layer takes some in the next ones along.
    assert 1e-4 < noise < 0.1
    for output in outputs.values():
        assert float((output - exact).norm() / exact.norm()) < noise


@pytest.mark.parametrize(("rotated", "per_row"), [(0, False), (0, True), (16, True), (64, True), (256, True)])
def test_arithmetic_is_that_of_comfy_kitchen(rotated: int, per_row: bool, tmp_path: Path) -> None:
    """Sums of integers are equal to the bit wherever the codes of the input are, and these are where the
    rotation is exact: of integers, in a power of two. Of other inputs a code in ten thousand may fall to the
    neighbour, because the one multiplies by a reciprocal and rotates by sums and differences where the other
    divides and multiplies by a matrix.
    """
    generator = torch.Generator().manual_seed(rotated + per_row)
    rotation = {"convrot": True, "convrot_groupsize": rotated} if rotated else {}
    weight = torch.randn(48, 512, generator=generator)
    bias = torch.randn(48, generator=generator)
    codes, params = TensorWiseINT8Layout.quantize(weight, per_channel=per_row, **rotation)
    theirs = QuantizedTensor(codes, "TensorWiseINT8Layout", params)
    layer = built(codes, params.scale, rotated, bias)
    assert layer.input_quantizer is not None and layer.kernel is not None
    whole = torch.randint(-500, 500, (7, 512), generator=generator).float()
    for x, exact in ((whole, True), (torch.randn(64, 512, generator=generator), False)):
        turned = eager._rotate_activation(x, eager._build_hadamard(rotated), rotated) if rotated else x
        expected, scale = eager.quantize_int8_rowwise(turned)
        ours = rotate(x, rotated) if rotated else x
        rows = layer.input_quantizer.rows(ours)
        found = (ours * rows.scale.reciprocal()).round().clamp(-128, 127).to(torch.int8)
        off = (found.int() - expected.int()).abs()
        assert int(off.max()) <= 1 and float(off.float().mean()) <= (0.0 if exact else 1e-4)
        sums = eager.mm_int8(expected, codes.T.contiguous())
        # One code more or less of the input changes the output by at most a step of both grids.
        bound = (off.sum(-1, keepdim=True) * 127 * scale) * params.scale.reshape(1, -1)
        result = F.linear(x, theirs, bias)
        size = (sums.abs().float() * scale * params.scale.reshape(1, -1)) + bias.abs()
        # The rotation's own rounding moves the largest value of a token, which is its scale.
        rounding = 4e-7 if exact or not rotated else 2e-6
        assert bool(((layer(x) - result).abs() <= bound + rounding * size).all())
        if exact:
            assert torch.equal(reference_sums(layer, x), sums)


def built(codes: Tensor, scale: Tensor, rotated: int, bias: Tensor) -> PackedLayer:
    """Return a layer of exact integers with these codes."""
    from tfmq.kernels.reference import ReferenceKernel
    from tfmq.numerics.operations import Linear
    from tfmq.quantizers.dynamic import DynamicQuantizer

    grid = IntegerFormat(8, True)
    layer = PackedLayer(
        Linear(),
        grid,
        tuple(codes.shape),
        bias=torch.float32,
        input_quantizer=DynamicQuantizer(grid),
        rotated=rotated,
    )
    layer.packed.copy_((codes.int() + 128).to(torch.uint8))
    layer.scale.copy_(scale.reshape(-1, 1).expand(len(codes), 1))
    assert layer.bias is not None
    layer.bias.data.copy_(bias)
    layer.execute(KernelExecution(ReferenceKernel(layer.integer_weight(), grid.levels)))
    return layer


def reference_sums(layer: PackedLayer, x: Tensor) -> Tensor:
    """Return the integer sums of a layer: what it computes with all scales one and no bias."""
    from tfmq.kernels.reference import integers

    turned = layer.transformed(x)
    assert layer.input_quantizer is not None
    rows = layer.input_quantizer.rows(turned)
    codes = integers(turned, rows.scale[..., 0], rows.zero_point[..., 0], rows.levels)
    return F.linear(codes, layer.integer_weight().values.double()).to(torch.int32)


FORMS: dict[str, Callable[[Tensor, str], tuple[dict[str, Tensor], dict[str, str]]]] = {
    "described": lambda values, name: (
        {
            f"{name}.weight": values,
            f"{name}.weight_scale": torch.tensor(0.25),
            f"{name}.comfy_quant": marked({"format": "float8_e4m3fn"}),
            f"{name}.input_scale": torch.tensor(2.0),
        },
        {},
    ),
    "bytes": lambda values, name: (
        {
            f"{name}.weight": values.view(torch.uint8),
            f"{name}.weight_scale": torch.tensor(0.25),
            f"{name}.comfy_quant": marked({"format": "float8_e4m3fn"}),
        },
        {},
    ),
    "in the header": lambda values, name: (
        {f"{name}.weight": values, f"{name}.weight_scale": torch.tensor(0.25)},
        {
            "_quantization_metadata": json.dumps(
                {"format_version": "1.0", "layers": {name: {"format": "float8_e4m3fn"}}}
            )
        },
    ),
    "of 2025": lambda values, name: (
        {
            f"{name}.weight": values,
            f"{name}.scale_weight": torch.tensor(0.25),
            f"{name}.scale_input": torch.ones(()),
            f"{PREFIX}scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn),
        },
        {},
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_small_floats_keep_their_values(form: str, tmp_path: Path) -> None:
    _, tensors = published.stable_diffusion(tmp_path)
    layer = f"{PREFIX}middle_block.1.transformer_blocks.0.ff.net.2"
    values = tensors[f"{layer}.weight"].mul(100).to(torch.float8_e4m3fn)
    changed, metadata = FORMS[form](values, layer)
    path = tmp_path / "fp8.safetensors"
    write_tensors(
        path,
        {**{name: t.half() for name, t in tensors.items() if t.is_floating_point()}, **changed},
        metadata=metadata,
    )
    unet = open_single_file(path, tokenizer=str(tmp_path / "tokenizer")).unet
    found = unet.mid_block.attentions[0].transformer_blocks[0].ff.net[2].weight
    assert found.dtype == torch.float32 and torch.equal(found, values.float() * 0.25)


def test_float8_without_scales_and_inputs_left_as_they_come(tmp_path: Path) -> None:
    _, tensors = published.stable_diffusion(tmp_path)
    layer = f"{PREFIX}middle_block.1.transformer_blocks.0.ff.net.2"
    path, tokens = tmp_path / "model.safetensors", str(tmp_path / "tokenizer")
    narrow = {
        name: t.to(torch.float8_e5m2) if is_linear(name, t) else t.to(torch.bfloat16)
        for name, t in tensors.items()
        if t.is_floating_point()
    }
    write_tensors(path, narrow)
    unet = open_single_file(path, tokenizer=tokens).unet
    found = unet.mid_block.attentions[0].transformer_blocks[0].ff.net[2].weight
    assert found.dtype == torch.bfloat16 and torch.equal(found.float(), narrow[f"{layer}.weight"].float())
    codes, params = TensorWiseINT8Layout.quantize(tensors[f"{layer}.weight"], per_channel=True)
    full = encoded(Int8Layer(codes, params.scale, full_input=True))
    write_tensors(path, {**tensors, **{f"{layer}{suffix}": t for suffix, t in full.items()}})
    (packed,) = packed_layers(open_single_file(path, tokenizer=tokens).unet).values()
    assert isinstance(packed, PackedLayer) and packed.input_quantizer is None


def test_a_file_of_halves_and_integers_draws(tmp_path: Path) -> None:
    """Parts of one pipeline compute with each other's tensors."""
    _, tensors = published.stable_diffusion(tmp_path)
    changed, _ = theirs(tensors)
    halves = {
        name: t.half() if t.is_floating_point() and not name.endswith("_scale") else t
        for name, t in changed.items()
    }
    opened(tmp_path, "sd1", halves, {}).save_pretrained(str(tmp_path / "saved"))
    pipeline = tfmq.load(tmp_path / "saved", backend="simulated")
    assert {part.dtype for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder)} == {torch.float32}
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("a b", num_inference_steps=2, output_type="latent", height=16, width=16).images
    assert torch.isfinite(image).all() and image.std() > 0
