"""GGUF files, read and written: what the package `gguf` and diffusers make of them is what the model has."""

import json
from pathlib import Path
from typing import Any

import published
import pytest
import torch
from blocks import PREFIX, architecture, dequantized, floating, is_linear, kinds, opened, originals, write
from torch import Tensor

import tfmq
from tfmq.cli.commands import run
from tfmq.integrations.diffusers.original.gguf_out import FILE, export_gguf, gguf_tensors
from tfmq.integrations.diffusers.original.single_file import open_single_file
from tfmq.nn.branch import SideBranch
from tfmq.nn.operation import operation_of
from tfmq.nn.packed_layer import PackedLayer
from tfmq.nn.plan import packed_layers
from tfmq.nn.swap import replace_module
from tfmq.numerics.grids import Grid, IntegerFormat, table
from tfmq.quantizers.dynamic import DynamicQuantizer
from tfmq.storage.atomic import read_json


@pytest.mark.parametrize(
    ("maker", "kind"),
    [("flux", "Q8_0"), ("flux", "Q4_0"), ("sd3", "Q4_0"), ("sd1", "Q8_0")],
)
def test_weights_are_those_of_the_file_to_the_bit(maker: str, kind: str, tmp_path: Path) -> None:
    _, tensors = originals(tmp_path, maker)
    write(tmp_path / "f.gguf", tensors, kind)
    model = opened(tmp_path / "f.gguf")
    stock = floating(tmp_path / "f.safetensors", dequantized(tmp_path / "f.gguf"))
    packed = packed_layers(model)
    assert len(packed) >= sum(is_linear(*item) for item in tensors.items()) > 4
    for name, layer in packed.items():
        assert torch.equal(layer.stock_weight, stock.get_submodule(name).weight)
        assert layer.input_quantizer is None and layer.format.bits == int(kind[1])
    for name, tensor in stock.state_dict().items():
        if name.removesuffix(".weight") not in packed:
            assert torch.equal(model.state_dict()[name], tensor)


def call(model: Any) -> Tensor:
    generator = torch.Generator().manual_seed(2)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    t = torch.tensor([0.5])
    with torch.no_grad():
        if "pos_embed_max_size" in model.config:
            return model(noise(1, 16, 8, 8), noise(1, 8, 64), noise(1, 128), 1000 * t)[0]
        places = torch.zeros(4, 3), torch.zeros(8, 3)
        return model(noise(1, 4, 64), noise(1, 8, 64), noise(1, 64), t, *places, t)[0]


def test_verbs_and_backends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file goes in, computes as the stock model with its weights does, and comes out as it was."""
    parts, tensors = originals(tmp_path, "flux")
    write(tmp_path / "f.gguf", tensors, "Q8_0")
    base = published.flux_base(tmp_path, parts)
    arguments = ["import", str(tmp_path / "f.gguf"), "--output-dir", str(tmp_path / "saved"), "--json"]
    assert run(arguments) != 0
    capsys.readouterr()
    assert run([*arguments, "--base", str(base)]) == 0
    assert json.loads(capsys.readouterr().out)["quantized"] == ["transformer"]
    expected = call(floating(tmp_path / "f.safetensors", dequantized(tmp_path / "f.gguf")))
    for backend in ("float", "simulated", "reference", "torch"):
        model = tfmq.load(tmp_path / "saved", backend=backend).transformer
        assert torch.allclose(call(model), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    manifest = read_json(tmp_path / "saved" / "transformer" / "config.json")["quantization_config"]
    assert manifest["provenance"]["imported"] == {"format": "gguf", "file": "f.gguf"}
    widths = [sum(group["segments"]) for group in manifest["structure"]["layers"]]
    assert sorted(widths) == [128, 512, 640], "a group for each width"
    export = ["export", str(tmp_path / "saved"), "--to", "gguf", "--output-dir", str(tmp_path / "out")]
    assert run(export) == 0
    text = capsys.readouterr().out
    assert "of Q8_0" in text and "scales are rounded by 0.00% at most" in text and "left out" not in text
    before, after = dequantized(tmp_path / "f.gguf"), dequantized(tmp_path / "out" / FILE)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        kind = kinds(tmp_path / "out" / FILE)[name]
        assert torch.equal(after[name], tensor.half().float() if kind == "F16" else tensor), name


def prefixed(path: Path) -> dict[str, Any]:
    from diffusers.models.model_loading_utils import load_gguf_checkpoint

    return {f"{PREFIX}{name}": tensor for name, tensor in load_gguf_checkpoint(str(path)).items()}


@pytest.mark.parametrize(("maker", "kind"), [("sd3", "Q8_0"), ("sd3", "Q4_0"), ("sd1", "Q8_0")])
def test_diffusers_loads_the_same_weights(maker: str, kind: str, tmp_path: Path) -> None:
    """Its loader of FLUX takes the widths of the published model for granted, that of UNets the prefix. It
    multiplies scales and codes in half precision.
    """
    import diffusers
    from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor

    parts, tensors = originals(tmp_path, maker)
    write(tmp_path / "f.gguf", tensors, kind)
    ours = opened(tmp_path / "f.gguf")
    name = "unet" if "unet" in parts else "transformer"
    parts[name].save_config(str(tmp_path / "config"))
    export_gguf(ours, tmp_path)
    assert architecture(tmp_path / FILE) == maker
    for path in (tmp_path / "f.gguf", tmp_path / FILE):
        theirs = type(parts[name]).from_single_file(
            prefixed(path) if name == "unet" else str(path),
            config=str(tmp_path / "config"),
            quantization_config=diffusers.GGUFQuantizationConfig(compute_dtype=torch.float32),
            torch_dtype=torch.float32,
        )
        for layer, packed in packed_layers(ours).items():
            weight = theirs.get_submodule(layer).weight
            values = dequantize_gguf_tensor(weight) if hasattr(weight, "quant_type") else weight
            assert torch.equal(values, packed.stock_weight.to(values.dtype)), layer
        if maker == "sd3" and path.name == FILE:
            assert (call(theirs) - call(ours)).norm() < 1e-3 * call(ours).norm()


GRIDS: tuple[tuple[str, Grid, dict[str, Any]], ...] = (
    ("Q8_0", IntegerFormat(8, True), {}),
    ("Q8_0", IntegerFormat(8, True), {"segments": (32, 96)}),
    ("Q4_0", IntegerFormat(4, True), {}),
    ("Q4_0", IntegerFormat(3, True), {"segments": (64, 64)}),
    ("Q4_1", IntegerFormat(4), {}),
    ("Q4_1", IntegerFormat(4), {"group": 32}),
    ("Q8_0", IntegerFormat(4), {"group": 16}),
    ("Q4_0", IntegerFormat(4, True), {"group": 64}),
    ("Q8_0", table("e2m1") or IntegerFormat(4), {}),
    ("eight bits", IntegerFormat(8), {}),
    ("divide into blocks", IntegerFormat(8, True), {"segments": (48, 80)}),
    ("rescaled", IntegerFormat(8, True), {"rescaled": True}),
    ("rotated", IntegerFormat(8, True), {"rotated": 64}),
    ("a branch", IntegerFormat(8, True), {"branch": True}),
    ("beyond half precision", IntegerFormat(8, True), {"tiny": True}),
)


def filled(module: Any, grid: Grid, options: dict[str, Any], seed: int) -> PackedLayer:
    """Return a layer on a grid with random codes, some of whose rows are zero."""
    operation, shape, options = operation_of(module), tuple(module.weight.shape), dict(options)
    assert operation is not None
    branch = SideBranch(operation, shape, rank=1, dtype="float32") if options.pop("branch", 0) else None
    size = 1e-8 if options.pop("tiny", False) else 1e-3
    layer = PackedLayer(
        operation,
        grid,
        shape,
        bias=torch.float32 if module.bias is not None else None,
        input_quantizer=DynamicQuantizer(IntegerFormat(8))
        if seed % 2 and operation.channel_axis == -1 and not options.get("segments")
        else None,
        branch=branch,
        **options,
    )
    generator = torch.Generator().manual_seed(seed)
    layer.packed.copy_(torch.randint(256, layer.packed.shape, generator=generator))
    if isinstance(grid, IntegerFormat) and grid.bits == 3:
        assert layer.packed.shape[1] % 3 == 0
    if not isinstance(grid, IntegerFormat):
        layer.packed.copy_(layer.packed % 15 | (layer.packed // 15 % 15) << 4)
    layer.scale.uniform_(size, 2 * size, generator=generator)
    if layer.zero_point is not None:
        layer.zero_point.copy_(torch.randint(16, layer.zero_point.shape, generator=generator))
    if layer.multiplier is not None:
        layer.multiplier.copy_(torch.randint(1, 9, layer.multiplier.shape, generator=generator))
    return layer


def test_every_grid_goes_out_and_comes_back(tmp_path: Path) -> None:
    """Decoded by the package, weights are the model's but for the rounding of scales; read back, the integers
    are the same.
    """
    parts, _ = published.sd3(tmp_path)
    model = parts["transformer"]
    names = [
        name
        for name, module in model.named_modules()
        if "ff" in name and hasattr(module, "weight") and module.weight.shape[1] == 128
    ]
    names += [f"transformer_blocks.{n}.attn.to_out.0" for n in range(3)]
    names += ["transformer_blocks.0.attn2.to_out.0", "time_text_embed.timestep_embedder.linear_2"]
    names += [f"transformer_blocks.{n}.norm1.linear" for n in range(3)]
    names += ["norm_out.linear", "transformer_blocks.0.norm1_context.linear"]
    assert len(names) >= len(GRIDS)
    expected = dict(zip(names, GRIDS, strict=False))
    for seed, (name, (_, grid, options)) in enumerate(expected.items()):
        replace_module(model, name, filled(model.get_submodule(name), grid, options, seed))
    # Of three layers that the layout joins, one has other numbers, and takes the others along.
    joined = {f"transformer_blocks.1.attn.to_{part}": part for part in "qkv"}
    for name, part in joined.items():
        grid = IntegerFormat(8 if part == "k" else 4, True)
        replace_module(model, name, filled(model.get_submodule(name), grid, {}, 7))
    replace_module(model, "pos_embed.proj", filled(model.pos_embed.proj, IntegerFormat(4, True), {}, 9))
    result = export_gguf(model, tmp_path)
    written, stored = dequantized(tmp_path / FILE), kinds(tmp_path / FILE)
    packed = packed_layers(model)
    stock = floating(tmp_path / "f.safetensors", written)
    again = packed_layers(opened(tmp_path / FILE))
    lost = {name: reason for reason, names in gguf_tensors(model).lost.dequantized.items() for name in names}
    assert lost.pop("pos_embed.proj") == "no linear layer"
    for name, (kind, _, _) in [*expected.items(), *((name, ("Q8_0", 0, 0)) for name in joined)]:
        own, found = packed[name].stock_weight, stock.get_submodule(name).weight
        if not kind.startswith("Q"):
            assert kind in lost.pop(name) and name not in again
            assert (own - found).abs().max() <= 2**-11 * own.abs().max()
            continue
        share = 2**-11 if kind != "Q4_1" else 2**-7
        # Scales are of 0.001 and more, where half precision has all its bits.
        assert bool(((own - found).abs() <= share * own.abs()).all()), (name, kind)
        assert torch.equal(again[name].stock_weight, found)
        assert again[name].format.bits == int(kind[1])
        if "group" not in expected.get(name, (0, 0, {}))[2]:
            integers = [layer.grid.integers(layer.codes.float()) for layer in (again[name], packed[name])]
            assert torch.equal(*integers)
    assert not lost and 2**-11 < result["rounding"] <= 2**-7
    assert result["types"] == {kind: list(stored.values()).count(kind) for kind in set(stored.values())}
    assert any("inputs in full precision" in line for line in result["left_out"])
    assert {kind for name, kind in stored.items() if name.endswith("bias")} == {"F32"}


def test_blocks_of_a_convolution_are_refused_by_name(tmp_path: Path) -> None:
    _, tensors = originals(tmp_path, "sd1")
    name = "input_blocks.1.1.proj_in.weight"
    assert tensors[name].ndim == 4
    write(tmp_path / "f.gguf", {**tensors, name: tensors[name].flatten(1)}, "Q8_0")
    with pytest.raises(
        ValueError, match=r"f\.gguf: .*proj_in is quantized and a Conv2d; linear layers alone"
    ):
        open_single_file(tmp_path / "f.gguf")


def test_a_denoiser_without_a_layout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="UNet2DModel has no layout that other loaders open"):
        export_gguf(published.diffusers.UNet2DModel(block_out_channels=(32, 32, 32, 32)), tmp_path)
