"""Whole denoisers as compiled graphs: OpenVINO and torch's compiler against the exact reference."""

import copy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tfmq
from tfmq.backends.backend import Options
from tfmq.backends.execution import execute
from tfmq.backends.openvino import shared_core
from tfmq.kernels.onednn import available
from tfmq.models.denoiser import Denoiser, Inputs
from tfmq.models.sampler import LoopSampler
from tfmq.nn.plan import packed_layers
from tfmq.numerics.errors import sqnr_db
from tfmq.recipes.recipe import Calibration
from tfmq.storage.digest import tensor_digest


@pytest.fixture(scope="module")
def cached(sampler: Callable[..., LoopSampler]) -> tuple[nn.Module, Inputs]:
    """A plain denoiser in W8A8 whose temporal features come from tables, and a batch of two at a calibrated timestep."""
    return quantized(sampler("plain"), "w8a8")


@pytest.fixture(scope="module")
def fast(sampler: Callable[..., LoopSampler]) -> tuple[nn.Module, Inputs]:
    """The same with one zero-point for all timesteps."""
    return quantized(sampler("plain"), "fast_w8a8")


def quantized(made: LoopSampler, scheme: str) -> tuple[nn.Module, Inputs]:
    recipe = tfmq.scheme(scheme)
    recipe = replace(recipe, calibration=replace(recipe.calibration, steps=3, samples=2), learning=replace(recipe.learning, iterations=0))
    tfmq.quantize(made, replace(recipe, temporal=replace(recipe.temporal, learning=replace(recipe.temporal.learning, iterations=1))))
    module = made.denoiser.module
    noise = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    return module, Inputs(noise, module.tfmq_steps.timesteps[[1, 1]].long())


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TFMQ_CACHE", str(tmp_path))
    return tmp_path / "openvino"


@torch.no_grad()
def of_two(module: nn.Module, inputs: Inputs) -> list[torch.Tensor]:
    """What a module computes for a batch at one timestep, and for mixed timesteps."""
    denoiser, steps = Denoiser(module), module.tfmq_steps.timesteps
    return [denoiser(inputs), denoiser(Inputs(inputs.sample, steps[[0, 2]].long(), inputs.conditions))]


@torch.no_grad()
def outputs(module: nn.Module, inputs: Inputs) -> list[torch.Tensor]:
    """The same, and for one sample."""
    return [*of_two(module, inputs), Denoiser(module)(inputs.rows(0, 1))]


def kinds_of(layer_type: str, cache: Path) -> list[str]:
    """Return the types in which the plug-in computes the layers of a type, in the one model of the cache."""
    core = shared_core()
    compiled = core.compile_model(core.read_model(next(cache.glob("*.xml"))), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    info = [node.get_rt_info() for node in compiled.get_runtime_model().get_ops()]
    return [str(entry["runtimePrecision"].astype(str)) for entry in info if entry["layerType"].astype(str) == layer_type]


def test_openvino_computes_what_the_reference_does(cached: tuple[nn.Module, Inputs], own_cache: Path) -> None:
    pytest.importorskip("openvino")
    module, inputs = copy.deepcopy(cached[0]), cached[1]
    digest = tensor_digest(module.state_dict())
    execute(module, "reference")
    exact = outputs(module, inputs)
    coverage = execute(module, "openvino")
    assert coverage.integer and not coverage.floating
    for expected, through in zip(exact, outputs(module, inputs), strict=True):
        assert sqnr_db(expected, through) > 40
    assert tensor_digest(module.state_dict()) == digest
    (model,) = own_cache.glob("*.xml")
    # A second process, here a second executor, reads the converted model, whatever the batch.
    before = model.stat().st_mtime_ns
    execute(module, "openvino")
    assert sqnr_db(exact[0], outputs(module, inputs)[0]) > 40
    assert [path.stat().st_mtime_ns for path in own_cache.glob("*.xml")] == [before]


def test_openvino_executes_the_grids_of_tokens_in_integers(sampler: Callable[..., LoopSampler], own_cache: Path) -> None:
    pytest.importorskip("openvino")
    made = sampler("dit")
    recipe = replace(tfmq.scheme("rtn_w8a8"), calibration=Calibration(samples=1, steps=3))
    tfmq.quantize(made, replace(recipe, activations=replace(recipe.activations, tokens="dynamic")))
    module, example = made.denoiser.module, made.example().resized(2)
    inputs = Inputs(torch.randn(2, 4, 8, 8), module.tfmq_steps.timesteps[[1, 1]].long(), example.conditions)
    execute(module, "reference")
    exact = outputs(module, inputs)
    coverage = execute(module, "openvino")
    assert coverage.integer and not coverage.floating
    for expected, through in zip(exact, outputs(module, inputs), strict=True):
        assert sqnr_db(expected, through) > 40
    if "INT8" not in shared_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this processor has no integer matrix product")
    assert set(kinds_of("FullyConnected", own_cache)) <= {"u8", "i8"}


def test_openvino_executes_transposed_convolutions_in_integers(sampler: Callable[..., LoopSampler], own_cache: Path) -> None:
    pytest.importorskip("openvino")
    module, inputs = quantized(sampler("upsampler"), "w8a8")
    inputs = replace(inputs, conditions={"class_labels": torch.tensor([3, 7])})
    execute(module, "reference")
    exact = outputs(module, inputs)
    assert not execute(module, "openvino").floating
    for expected, through in zip(exact, outputs(module, inputs), strict=True):
        assert sqnr_db(expected, through) > 40
    if "INT8" not in shared_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this processor has no integer convolution")
    kinds = kinds_of("Deconvolution", own_cache)
    assert kinds and set(kinds) <= {"u8", "i8"}


def test_openvino_executes_every_convolution_in_integers(cached: tuple[nn.Module, Inputs], own_cache: Path) -> None:
    pytest.importorskip("openvino")
    module, inputs = copy.deepcopy(cached[0]), cached[1]
    execute(module, "openvino")
    outputs(module, inputs)
    core = shared_core()
    model = core.read_model(next(own_cache.glob("*.xml")))
    nodes = [node.get_type_name() for node in model.get_ops()]
    convolutions = [name for name, layer in module.named_modules() if type(layer).__name__ == "PackedLayer" and len(layer.shape) == 4]
    assert nodes.count("Convolution") >= len(convolutions)
    assert not {"Sin", "Cos"} & set(nodes), "the sinusoid of the timestep is gone with the layers behind the tables"
    if "INT8" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this processor has no integer convolution")
    kinds = kinds_of("Convolution", own_cache)
    assert kinds and set(kinds) <= {"u8", "i8"}


def shifted(cache: Path) -> int:
    """Return how many operations of the one model of the cache have a term subtracted from what they put out."""
    model = shared_core().read_model(next(cache.glob("*.xml")))
    products = [node for node in model.get_ops() if node.get_type_name() in ("Convolution", "MatMul")]
    return sum(target.get_node().get_type_name() == "Subtract" for node in products for target in node.output(0).get_target_inputs())


def test_a_shared_zero_point_leaves_a_rescale_behind_each_operation(
    cached: tuple[nn.Module, Inputs], fast: tuple[nn.Module, Inputs], own_cache: Path
) -> None:
    pytest.importorskip("openvino")
    found = []
    for module, inputs in (cached, fast):
        module = copy.deepcopy(module)
        execute(module, "openvino")
        outputs(module, inputs)
        found.append(shifted(own_cache))
        for path in own_cache.glob("*.xml"):
            path.unlink()
    assert found[0] > 3 and found[1] == 0


def test_every_backend_computes_the_same_with_shared_zero_points(fast: tuple[nn.Module, Inputs], own_cache: Path) -> None:
    pytest.importorskip("openvino")
    module, inputs = copy.deepcopy(fast[0]), fast[1]
    execute(module, "reference")
    exact = outputs(module, inputs)
    backends = [("simulated", Options()), ("operators", Options()), ("openvino", Options())]
    if available():
        backends += [("torch", Options()), ("torch", Options(weights="packed")), ("torch", Options(compile=True))]
    for backend, options in backends:
        execute(module, backend, options=options)
        # Torch's compiler takes many seconds for each batch: that of one sample is for the test below.
        through = of_two(module, inputs) if options.compile else outputs(module, inputs)
        for expected, computed in zip(exact[: len(through)], through, strict=True):
            assert sqnr_db(expected, computed) > (35 if backend == "simulated" else 40), backend


def test_attention_products_are_integer_products_where_zero_points_are_shared(fast: tuple[nn.Module, Inputs], own_cache: Path) -> None:
    pytest.importorskip("openvino")
    module, inputs = copy.deepcopy(fast[0]), fast[1]
    execute(module, "openvino")
    outputs(module, inputs)
    model = shared_core().read_model(next(own_cache.glob("*.xml")))
    operands = [[value.get_node() for value in node.input_values()] for node in model.get_ops() if node.get_type_name() == "MatMul"]

    def quantizer(node: Any) -> bool:
        """Whether a node puts out what a quantizer did, transposed at most."""
        return node.get_type_name() == "FakeQuantize" or (node.get_type_name() == "Transpose" and quantizer(node.input_value(0).get_node()))

    assert [[quantizer(node) for node in pair] for pair in operands] == [[True, True]] * 2


SIGNAL_AFTER_TWO_MODELS = """
import signal, torch
from torch import nn
from tfmq.backends.openvino import shared_core
import openvino

def compiled():
    return shared_core().compile_model(openvino.convert_model(nn.Linear(4, 4), example_input=torch.zeros(1, 4)), "CPU")

first, second = compiled(), compiled()
del first
del second
signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    print("interrupted")
"""


def test_ctrl_c_after_two_compiled_models_is_no_segmentation_fault() -> None:
    pytest.importorskip("openvino")
    ended = subprocess.run([sys.executable, "-W", "ignore", "-c", SIGNAL_AFTER_TWO_MODELS], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout.strip()) == (0, "interrupted"), ended.stderr


@pytest.mark.skipif(not available(), reason="this torch has no integer operators of oneDNN")
def test_the_compiled_torch_backend_equals_the_eager_one(cached: tuple[nn.Module, Inputs]) -> None:
    module, inputs = copy.deepcopy(cached[0]), cached[1].rows(0, 1)
    execute(module, "torch")
    with torch.no_grad():
        eager = Denoiser(module)(inputs)
    execute(module, "torch", options=Options(compile=True))
    with torch.no_grad():
        assert sqnr_db(eager, Denoiser(module)(inputs)) > 40


COMPILED = [("openvino", Options()), ("operators", Options(compile=True))]
COMPILED += [("torch", Options(compile=True))] if available() else []


@torch.no_grad()
def unseen_outputs(module: nn.Module, inputs: Inputs) -> list[torch.Tensor]:
    """What a module computes for a batch at one timestep that no table knows, and for one of these beside a calibrated one."""
    denoiser, mixed = Denoiser(module), inputs.timestep.clone()
    mixed[1] += 1
    return [denoiser(Inputs(inputs.sample, timestep, inputs.conditions)) for timestep in (inputs.timestep + 1, mixed)]


@pytest.mark.parametrize(("backend", "options"), COMPILED, ids=[name for name, _ in COMPILED])
@pytest.mark.filterwarnings("ignore:.*was not calibrated")
def test_a_timestep_that_no_table_knows_runs_compiled(
    cached: tuple[nn.Module, Inputs], own_cache: Path, monkeypatch: pytest.MonkeyPatch, backend: str, options: Options
) -> None:
    if backend == "openvino":
        pytest.importorskip("openvino")
    module, inputs = copy.deepcopy(cached[0]), cached[1]
    simulated = unseen_outputs(module, inputs)
    execute(module, "reference")
    exact = unseen_outputs(module, inputs)
    execute(module, backend, options=options)
    unseen_outputs(module, inputs)
    calls: list[str] = []
    for name, child in packed_layers(module).items():
        child.register_forward_hook(lambda *_, name=name: calls.append(name))  # type: ignore[misc]
    for through, expected, plain in zip(unseen_outputs(module, inputs), exact, simulated, strict=True):
        assert sqnr_db(expected, through) > 40
        assert sqnr_db(plain, through) > 35
    assert not calls, "layer by layer"


@pytest.mark.parametrize(("backend", "options"), COMPILED, ids=[name for name, _ in COMPILED])
@pytest.mark.filterwarnings("ignore:.*was not calibrated")
def test_features_of_an_unseen_timestep_are_those_of_the_layers(
    cached: tuple[nn.Module, Inputs], own_cache: Path, backend: str, options: Options
) -> None:
    if backend == "openvino":
        pytest.importorskip("openvino")
    module, inputs = copy.deepcopy(cached[0]), cached[1]
    execute(module, backend, options=options)
    known, unseen = outputs(module, inputs)[0], unseen_outputs(module, inputs)[0]
    # The timestep itself matters, and not the nearest calibrated one alone, which the grids belong to.
    assert sqnr_db(known, unseen) < 30


def test_nan_passes_a_compiled_graph(cached: tuple[nn.Module, Inputs], own_cache: Path) -> None:
    pytest.importorskip("openvino")
    module, inputs = copy.deepcopy(cached[0]), cached[1]
    execute(module, "openvino")
    expected = outputs(module, inputs)[0]
    broken = Inputs(inputs.sample.clone(), inputs.timestep, inputs.conditions)
    broken.sample[1, 0, 3, 3] = torch.nan
    with torch.no_grad():
        y = Denoiser(module)(broken)
    assert y[1].isnan().all() and torch.equal(y[0], expected[0])


def test_a_damaged_cache_is_made_anew(cached: tuple[nn.Module, Inputs], own_cache: Path) -> None:
    pytest.importorskip("openvino")
    module, inputs = copy.deepcopy(cached[0]), cached[1]
    execute(module, "openvino")
    expected = outputs(module, inputs)[0]
    (model,) = own_cache.glob("*.xml")
    model.write_bytes(model.read_bytes()[: model.stat().st_size // 2])
    execute(module, "openvino")
    assert sqnr_db(expected, outputs(module, inputs)[0]) > 40
