"""The registry, and the variants that need torch alone, in this process."""

from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tfmq
import tfmq.evaluation.cost.variants
from tfmq.evaluation.cost import variant
from tfmq.evaluation.cost.flat import Flat, flat_tensors
from tfmq.evaluation.cost.source import Source, dequantized, fitted
from tfmq.evaluation.cost.variant import VARIANTS, Setting, absent, names_of
from tfmq.models.denoiser import Denoiser, Inputs
from tfmq.models.module_file import ModuleFile
from tfmq.models.sampler import LoopSampler
from tfmq.nn.plan import packed_embeddings, packed_layers
from tfmq.nn.size import state_bytes
from tfmq.numerics.errors import sqnr_db
from tfmq.recipes.recipe import Calibration

Make = Callable[..., LoopSampler]


@pytest.fixture(scope="module")
def source(sampler: Make, tmp_path_factory: pytest.TempPathFactory) -> Source:
    """Return a tiny model and its W8A8 twin on disk, with calls at two calibrated timesteps; tests add files
    of their own at most.
    """
    tmp_path = tmp_path_factory.mktemp("source")
    reference, quantized = sampler(), sampler()
    recipe = replace(
        tfmq.scheme("rtn_w8a8"), calibration=Calibration(samples=2, steps=4, interval=2, batch_size=2)
    )
    made = tfmq.quantize(quantized, recipe)
    made.model.save_pretrained(str(tmp_path / "quantized"))
    example = reference.example()
    calls = [Inputs(torch.randn_like(example.sample), torch.tensor([step])) for step in (250, 750)]
    source = Source(quantized=tmp_path / "quantized", folder=tmp_path / "source")
    source.write(reference.denoiser.module, calls)
    return source


def setting(source: Source, batch: int = 2) -> Setting:
    return Setting(source=source, folder=source.folder, batch=batch, threads=1)


def test_names() -> None:
    assert names_of("backend") == (
        "simulated",
        "reference",
        "torch",
        "torch-compile",
        "openvino",
        "cuda",
        "cuda-compile",
    )
    assert set(names_of("peer")) == {
        *("fp32", "fp32-channels-last", "fp32-compile", "openvino-fp32", "openvino-nncf"),
        *("onnxruntime-int8", "torchao-pt2e", "sdnq-int8", "quanto-int8"),
    }
    with pytest.raises(ValueError, match="registered already"):
        variant.add("fp32", "peer", VARIANTS["fp32"])


def test_an_absent_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere(name: str) -> Any:
        if name.startswith("optimum"):
            raise ModuleNotFoundError(name)
        return None

    monkeypatch.setattr(variant, "find_spec", nowhere)
    assert absent("fp32") == ""
    assert (
        absent("quanto-int8") == "quanto-int8 needs optimum-quanto; install with: pip install 'tfmq[bench]'"
    )
    assert "openvino and nncf" in absent("openvino-nncf")


@pytest.mark.parametrize("name", ["fp32", "fp32-channels-last", "simulated", "reference", "torch"])
def test_variants_compute_the_step(source: Source, name: str) -> None:
    prepared, full = (VARIANTS[each].prepare(setting(source)) for each in (name, "fp32"))
    assert (prepared.disk_bytes < full.disk_bytes) == (name in names_of("backend"))
    for call in source.calls(2):
        with torch.no_grad():
            assert sqnr_db(full.step(call), prepared.step(call)) > 15


def test_a_source_survives_json_and_fits_calls(source: Source) -> None:
    assert Source.from_json(source.to_json()) == source
    assert [len(call) for call in source.calls(3)] == [3, 3]
    assert [float(call.timestep[2]) for call in source.calls(3)] == [250, 750]
    call = Inputs(
        torch.arange(2.0)[:, None],
        torch.tensor([1, 2]),
        {"class_labels": torch.tensor([5, 6]), "scale": torch.tensor(2.0)},
    )
    wide = fitted(call, 5)
    assert wide.sample[:, 0].tolist() == [0, 1, 0, 1, 0] and wide.conditions["class_labels"].tolist() == [
        5,
        6,
        5,
        6,
        5,
    ]
    assert wide.conditions["scale"].ndim == 0 and len(fitted(call, 1)) == 1


def test_an_architecture_of_one_s_own(source: Source, sampler: Make, tmp_path: Path) -> None:
    original = source.original()
    lines = (
        "import tfmq",
        "from diffusers import DDIMScheduler, UNet2DModel",
        "def build():",
        "    net = tfmq.Denoiser(UNet2DModel(**CONFIG))",
    )
    (tmp_path / "own.py").write_text(
        "\n".join((*lines, "    return tfmq.LoopSampler(net, DDIMScheduler(), shape=(3, 8, 8))\n"))
    )
    config = {key: value for key, value in original.config.items() if not key.startswith("_")}
    with (tmp_path / "own.py").open("a") as file:
        file.write(f"\nCONFIG = {config!r}\n")
    own = replace(source, folder=tmp_path / "own", module=ModuleFile(tmp_path / "own.py", "build"))
    assert Source.from_json(own.to_json()) == own
    own.write(original, source.calls(1))
    call = source.calls(1)[0]
    with torch.no_grad():
        torch.testing.assert_close(Denoiser(own.original())(call), Denoiser(original)(call))
        ran, expected = (Denoiser(each.executed("simulated", tfmq.Options()))(call) for each in (own, source))
        assert sqnr_db(expected, ran) > 60


def test_dequantized_weights_are_those_of_the_quantized_model(source: Source) -> None:
    quantized = source.executed("simulated", tfmq.Options())
    stock = dequantized(quantized)
    assert type(stock) is type(source.original())
    for name, layer in packed_layers(quantized).items():
        assert torch.equal(stock.get_submodule(name).weight, layer.weight)
    call = source.calls(1)[0]
    with torch.no_grad():
        assert sqnr_db(Denoiser(source.original())(call), Denoiser(stock)(call)) > 20


def test_dequantized_embeddings_are_those_of_the_quantized_model(sampler: Callable[..., LoopSampler]) -> None:
    made = sampler("dit")
    tfmq.quantize(made, replace(tfmq.scheme("rtn_w8a8"), calibration=Calibration(samples=1, steps=2)))
    packed, stock = packed_embeddings(made.denoiser.module), dequantized(made.denoiser.module)
    assert packed
    for name, layer in packed.items():
        table = stock.get_submodule(name)
        assert isinstance(table, nn.Embedding) and torch.equal(table.weight, layer.weight)


@pytest.mark.parametrize("name", ["unet", "conditional", "sdxl", "dit", "plain"])
def test_a_flat_denoiser_is_the_denoiser(build: Callable[..., tuple[Denoiser, Inputs]], name: str) -> None:
    denoiser, inputs = build(name)
    flat = Flat(denoiser, inputs)
    with torch.no_grad():
        torch.testing.assert_close(flat(*flat_tensors(inputs)), denoiser(inputs))


def test_bytes_of_a_state(build: Callable[..., tuple[Denoiser, Inputs]]) -> None:
    module = build("plain")[0].module
    assert state_bytes(module) == sum(4 * tensor.numel() for tensor in module.state_dict().values())


@pytest.mark.skipif(find_spec("openvino") is None, reason="needs openvino")
def test_openvino_converts_and_computes(source: Source) -> None:
    VARIANTS["openvino-fp32"].build(setting(source))
    prepared, full = (VARIANTS[each].prepare(setting(source)) for each in ("openvino-fp32", "fp32"))
    for call in source.calls(2):
        assert sqnr_db(full.step(call), prepared.step(call)) > 80


def test_what_runs_in_torch_is_placed_on_the_device_and_its_output_comes_back(source: Source) -> None:
    call = source.calls(2)[0]
    module = source.original()
    expected = Denoiser(module)(call)
    assert torch.equal(variant.placed(module, setting(source))(call), expected)
    variant.placed(module, replace(setting(source), device="meta"))
    assert {parameter.device.type for parameter in module.parameters()} == {"meta"}
