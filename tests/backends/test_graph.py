"""Whole denoisers as compiled graphs: OpenVINO and torch's compiler against the exact reference."""

import copy
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tfmq
from tfmq.backends.backend import Coverage, Options
from tfmq.backends.execution import computed_alone, execute
from tfmq.backends.openvino import shared_core
from tfmq.kernels.halves import saturates
from tfmq.kernels.onednn import available
from tfmq.models.denoiser import Denoiser, Inputs
from tfmq.models.sampler import LoopSampler
from tfmq.nn.plan import packed_layers
from tfmq.numerics.errors import sqnr_db
from tfmq.numerics.operations import Convolution, TransposedConvolution
from tfmq.recipes import Recipe
from tfmq.recipes.recipe import Calibration
from tfmq.reconstruction.solvers import Rounding
from tfmq.storage.digest import tensor_digest

STEPS = 50
# From a calibrated timestep to one that is not: almost halfway to the next.
UNSEEN = 9


@pytest.fixture(scope="module")
def cached(sampler: Callable[..., LoopSampler]) -> tuple[nn.Module, Inputs]:
    """A denoiser in W8A8 whose temporal features come from tables, and a batch of two at a calibrated
    timestep: with a normalisation, a skip, attention and a transposed convolution.
    """
    return quantized(sampler("attending_upsampler"), "w8a8")


@pytest.fixture(scope="module")
def fast(sampler: Callable[..., LoopSampler]) -> tuple[nn.Module, Inputs]:
    """The same with one zero-point for all timesteps."""
    return quantized(sampler("attending_upsampler"), "fast_w8a8")


def quantized(made: LoopSampler, scheme: str) -> tuple[nn.Module, Inputs]:
    recipe = tfmq.scheme(scheme)
    tfmq.quantize(
        made,
        replace(
            recipe,
            calibration=Calibration(samples=2, steps=STEPS, interval=STEPS),
            weights=replace(recipe.weights, ranges="min_max"),
            activations=replace(recipe.activations, ranges="min_max"),
            rounding=Rounding(solver="nearest", inputs="full"),
            temporal=replace(recipe.temporal, learning=replace(recipe.temporal.learning, iterations=1)),
        ),
    )
    module, example = made.denoiser.module, made.example().resized(2)
    noise = torch.randn(example.sample.shape, generator=torch.Generator().manual_seed(0))
    conditions = {"class_labels": torch.tensor([3, 7])}
    return module, Inputs(noise, module.tfmq_steps.timesteps[[1, 1]].long(), conditions)


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


@dataclass(frozen=True)
class Converted:
    """A module that OpenVINO executes, what it computed, what the reference did before it, and the one file
    of the model it was converted to.
    """

    module: nn.Module
    inputs: Inputs
    coverage: Coverage
    exact: list[torch.Tensor]
    computed: list[torch.Tensor]
    file: Path


def converted(module: nn.Module, inputs: Inputs, cache: Path) -> Converted:
    """Execute a module in place, its model in a directory that was empty."""
    pytest.importorskip("openvino")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TFMQ_CACHE", str(cache))
        execute(module, "reference")
        exact = outputs(module, inputs)
        coverage = execute(module, "openvino")
        computed = outputs(module, inputs)
    (file,) = (cache / "openvino").glob("*.xml")
    return Converted(module, inputs, coverage, exact, computed, file)


@pytest.fixture(scope="module")
def converted_cached(cached: tuple[nn.Module, Inputs], tmp_path_factory: pytest.TempPathFactory) -> Converted:
    return converted(copy.deepcopy(cached[0]), cached[1], tmp_path_factory.mktemp("cached"))


@pytest.fixture(scope="module")
def converted_fast(fast: tuple[nn.Module, Inputs], tmp_path_factory: pytest.TempPathFactory) -> Converted:
    return converted(copy.deepcopy(fast[0]), fast[1], tmp_path_factory.mktemp("fast"))


def test_layers_of_a_compiled_model_are_simulated_where_they_are_called_alone(
    converted_fast: Converted,
) -> None:
    module = copy.deepcopy(converted_fast.module)
    assert computed_alone(module, "openvino") == "simulated"
    execute(module, "reference")
    assert computed_alone(module, "reference") == "reference"


def kinds_of(layer_type: str, file: Path) -> list[str]:
    """Return the types in which the plug-in computes the layers of a type; skips where this processor has no
    integer products.
    """
    core = shared_core()
    if "INT8" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this processor has no integer products")
    compiled = core.compile_model(core.read_model(file), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    info = [node.get_rt_info() for node in compiled.get_runtime_model().get_ops()]
    return [
        str(entry["runtimePrecision"].astype(str))
        for entry in info
        if entry["layerType"].astype(str) == layer_type
    ]


def test_openvino_computes_what_the_reference_does(
    cached: tuple[nn.Module, Inputs], converted_cached: Converted
) -> None:
    made = converted_cached
    assert made.coverage.integer and not made.coverage.floating
    for expected, through in zip(made.exact, made.computed, strict=True):
        assert sqnr_db(expected, through) > 40
    assert tensor_digest(made.module.state_dict()) == tensor_digest(cached[0].state_dict())


def test_a_converted_model_is_read_by_the_next_process_whatever_the_batch(
    cached: tuple[nn.Module, Inputs], converted_cached: Converted, own_cache: Path
) -> None:
    made, module = converted_cached, copy.deepcopy(cached[0])
    shutil.copytree(made.file.parent, own_cache)
    file = own_cache / made.file.name
    before = file.stat().st_mtime_ns
    # Here it is a second executor.
    execute(module, "openvino")
    with torch.no_grad():
        assert sqnr_db(made.exact[2], Denoiser(module)(made.inputs.rows(0, 1))) > 40
    assert [path.stat().st_mtime_ns for path in own_cache.glob("*.xml")] == [before]


def test_a_compiled_model_is_read_by_the_next_process_and_made_again_where_it_is_damaged(
    cached: tuple[nn.Module, Inputs],
    converted_cached: Converted,
    own_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made, compiled = converted_cached, list[Any]()
    shutil.copytree(made.file.parent, own_cache)
    compile_model = type(shared_core()).compile_model
    monkeypatch.setattr(
        type(shared_core()),
        "compile_model",
        lambda *given, **named: compiled.append(given) or compile_model(*given, **named),
    )

    def again() -> torch.Tensor:
        module = copy.deepcopy(cached[0])
        execute(module, "openvino")
        with torch.no_grad():
            return Denoiser(module)(made.inputs.rows(0, 1))

    assert torch.equal(again(), made.computed[2]) and not compiled
    files = sorted(own_cache.glob("*.compiled"))
    # One for each batch. A file that is too short, one that was changed, none.
    assert len(files) == 2 and not list(own_cache.glob("*.blob"))
    whole = [file.read_bytes() for file in files]
    damages = (lambda data: data[:-1000], lambda data: b"x" * (len(data) - 8) + data[-8:], None)
    for number, damage in enumerate(damages, start=1):
        for file, data in zip(files, whole, strict=True):
            file.unlink(missing_ok=True)
            if damage is not None:
                file.write_bytes(damage(data))
        assert torch.equal(again(), made.computed[2]) and len(compiled) == number


def test_a_full_disk_leaves_no_compiled_model_and_no_part_of_one(
    cached: tuple[nn.Module, Inputs],
    converted_cached: Converted,
    own_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(converted_cached.file.parent, own_cache)
    for file in own_cache.glob("*.compiled"):
        file.unlink()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    module = copy.deepcopy(cached[0])
    execute(module, "openvino")
    monkeypatch.setattr("os.replace", full)
    with torch.no_grad():
        found = Denoiser(module)(converted_cached.inputs.rows(0, 1))
    assert torch.equal(found, converted_cached.computed[2])
    assert not [file for file in own_cache.iterdir() if "compiled" in file.name]


def test_openvino_executes_the_grids_of_tokens_in_integers(
    sampler: Callable[..., LoopSampler], quick: Callable[..., Recipe], tmp_path: Path
) -> None:
    pytest.importorskip("openvino")
    made = sampler("dit")
    del made.denoiser.module.transformer_blocks[1:]
    tfmq.quantize(made, quick("rtn_w8a8", tokens="dynamic"))
    module, example = made.denoiser.module, made.example().resized(2)
    found = converted(
        module,
        Inputs(torch.randn(2, 4, 8, 8), module.tfmq_steps.timesteps[[1, 1]].long(), example.conditions),
        tmp_path,
    )
    assert found.coverage.integer and not found.coverage.floating
    for expected, through in zip(found.exact, found.computed, strict=True):
        assert sqnr_db(expected, through) > 40
    assert set(kinds_of("FullyConnected", found.file)) <= {"u8", "i8"}


def test_openvino_executes_every_convolution_in_integers(converted_cached: Converted) -> None:
    nodes = [node.get_type_name() for node in shared_core().read_model(converted_cached.file).get_ops()]
    operations = [layer.operation for layer in packed_layers(converted_cached.module).values()]
    for kind, name, executed in (
        (Convolution, "Convolution", "Convolution"),
        (TransposedConvolution, "ConvolutionBackpropData", "Deconvolution"),
    ):
        expected = sum(isinstance(operation, kind) for operation in operations)
        assert expected and nodes.count(name) >= expected
        kinds = kinds_of(executed, converted_cached.file)
        assert kinds and set(kinds) <= {"u8", "i8"}
    assert not {"Sin", "Cos"} & set(nodes), (
        "the sinusoid of the timestep is gone with the layers behind the tables"
    )


def shifted(file: Path) -> int:
    """Return how many operations of a model have a term subtracted from what they put out, or from what two
    put out that are halves of one.
    """
    model, kinds = shared_core().read_model(file), ("Convolution", "MatMul")

    def readers(node: Any) -> list[Any]:
        return [target.get_node() for target in node.output(0).get_target_inputs()]

    def sums(node: Any) -> bool:
        sources = [value.get_node().get_type_name() for value in node.input_values()]
        return node.get_type_name() == "Add" and all(kind in kinds for kind in sources)

    products = [node for node in model.get_ops() if node.get_type_name() in kinds]
    behind = {reader for node in products for reader in readers(node)}
    behind |= {reader for node in behind if sums(node) for reader in readers(node)}
    return sum(node.get_type_name() == "Subtract" for node in behind)


def test_a_shared_zero_point_leaves_a_rescale_behind_each_operation(
    converted_cached: Converted, converted_fast: Converted
) -> None:
    assert shifted(converted_cached.file) > 3 and shifted(converted_fast.file) == 0


def test_every_backend_computes_the_same_with_shared_zero_points(
    fast: tuple[nn.Module, Inputs], converted_fast: Converted
) -> None:
    module, inputs, exact = copy.deepcopy(fast[0]), fast[1], converted_fast.exact
    found = {"openvino": (exact, converted_fast.computed)}
    backends = [("simulated", Options()), ("operators", Options())]
    if available():
        backends += [("torch", Options()), ("torch", Options(weights="packed"))]
    for backend, options in backends:
        execute(module, backend, options=options)
        found[f"{backend} {options.weights}"] = exact, outputs(module, inputs)
    if available():
        execute(module, "torch", options=Options(compile=True))
        # Torch's compiler takes many seconds for each batch: that of two is for the tests below.
        with torch.no_grad():
            found["torch compiled"] = exact[2:], [Denoiser(module)(inputs.rows(0, 1))]
    for name, (wanted, computed) in found.items():
        for expected, through in zip(wanted, computed, strict=True):
            assert sqnr_db(expected, through) > (35 if name.startswith("simulated") else 40), name


@pytest.mark.skipif(saturates(), reason="without VNNI products of activations stay in floating point")
def test_attention_products_are_integer_products_where_zero_points_are_shared(
    converted_fast: Converted,
) -> None:
    model = shared_core().read_model(converted_fast.file)
    operands = [
        [value.get_node() for value in node.input_values()]
        for node in model.get_ops()
        if node.get_type_name() == "MatMul"
    ]

    def quantizer(node: Any) -> bool:
        """Whether a node puts out what a quantizer did, transposed at most."""
        return node.get_type_name() == "FakeQuantize" or (
            node.get_type_name() == "Transpose" and quantizer(node.input_value(0).get_node())
        )

    assert [[quantizer(node) for node in pair] for pair in operands] == [[True, True]] * 2


SIGNAL_AFTER_TWO_MODELS = """
import signal
from tfmq.backends.openvino import shared_core
import openvino
from openvino import opset13

def compiled():
    x = opset13.parameter([1, 4])
    return shared_core().compile_model(openvino.Model([opset13.relu(x)], [x]), "CPU")

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
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SIGNAL_AFTER_TWO_MODELS],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ended.returncode, ended.stdout.strip()) == (0, "interrupted"), ended.stderr


COMPILED = [("openvino", Options()), ("operators", Options(compile=True))]
COMPILED += [("torch", Options(compile=True))] if available() else []


@pytest.fixture(scope="module", params=COMPILED, ids=[name for name, _ in COMPILED])
def compiled(
    request: pytest.FixtureRequest, cached: tuple[nn.Module, Inputs], tmp_path_factory: pytest.TempPathFactory
) -> nn.Module:
    """The cached module, executed by a backend that compiles."""
    backend, options = request.param
    if backend == "openvino":
        return request.getfixturevalue("converted_cached").module
    module = copy.deepcopy(cached[0])
    execute(module, backend, options=options)
    return module


def test_a_compiled_backend_computes_what_the_reference_does(
    compiled: nn.Module, cached: tuple[nn.Module, Inputs]
) -> None:
    module = copy.deepcopy(cached[0])
    execute(module, "reference")
    for expected, through in zip(of_two(module, cached[1]), of_two(compiled, cached[1]), strict=True):
        assert sqnr_db(expected, through) > 40


def test_a_whole_trajectory_ends_in_the_same_samples(
    compiled: nn.Module, cached: tuple[nn.Module, Inputs], own_cache: Path
) -> None:
    """By a small model, with latents: for the embedded one torch's compiler would take minutes."""
    from diffusers import DDIMScheduler

    exact, found = copy.deepcopy(cached[0]), []
    execute(exact, "reference")
    for module in (exact, compiled):
        sampler = LoopSampler(
            Denoiser(module),
            DDIMScheduler(clip_sample=False),
            shape=tuple(cached[1].sample.shape[1:]),
            conditions={"class_labels": torch.tensor([3])},
        )
        sampler.to_images = nn.Identity()
        found.append(sampler.run(range(2), steps=STEPS, seed=0))
    # A few roundings, 120 dB and more, unless one of them moves an activation to another code.
    assert sqnr_db(*found) >= 40


@torch.no_grad()
def unseen_outputs(module: nn.Module, inputs: Inputs) -> list[torch.Tensor]:
    """What a module computes for a batch at one timestep that no table knows, and for one of these beside a
    calibrated one.
    """
    denoiser, mixed = Denoiser(module), inputs.timestep.clone()
    mixed[1] += UNSEEN
    return [
        denoiser(Inputs(inputs.sample, timestep, inputs.conditions))
        for timestep in (inputs.timestep + UNSEEN, mixed)
    ]


@pytest.mark.filterwarnings("ignore:.*was not calibrated")
def test_a_timestep_that_no_table_knows_runs_compiled(
    compiled: nn.Module, cached: tuple[nn.Module, Inputs], own_cache: Path
) -> None:
    module, inputs = copy.deepcopy(cached[0]), cached[1]
    simulated = unseen_outputs(module, inputs)
    execute(module, "reference")
    exact = unseen_outputs(module, inputs)
    unseen_outputs(compiled, inputs)
    calls: list[str] = []
    hooks = [
        child.register_forward_hook(lambda *_, name=name: calls.append(name))  # type: ignore[misc]
        for name, child in packed_layers(compiled).items()
    ]
    computed = unseen_outputs(compiled, inputs)
    for hook in hooks:
        hook.remove()
    for through, expected, plain in zip(computed, exact, simulated, strict=True):
        assert sqnr_db(expected, through) > 40
        assert sqnr_db(plain, through) > 35
    assert not calls, "layer by layer, or features twice"


@pytest.mark.filterwarnings("ignore:.*was not calibrated")
def test_features_of_an_unseen_timestep_are_those_of_the_layers(
    compiled: nn.Module, cached: tuple[nn.Module, Inputs], own_cache: Path
) -> None:
    known, unseen = of_two(compiled, cached[1])[0], unseen_outputs(compiled, cached[1])[0]
    # The timestep itself matters, and not the nearest calibrated one alone, which the grids belong to.
    assert sqnr_db(known, unseen) < 30


def test_nan_passes_a_compiled_graph(converted_cached: Converted) -> None:
    inputs = converted_cached.inputs
    broken = Inputs(inputs.sample.clone(), inputs.timestep, inputs.conditions)
    broken.sample[1, 0, 3, 3] = torch.nan
    with torch.no_grad():
        y = Denoiser(converted_cached.module)(broken)
    assert y[1].isnan().all() and torch.equal(y[0], converted_cached.computed[0][0])


def test_a_damaged_cache_is_made_anew(
    cached: tuple[nn.Module, Inputs], converted_cached: Converted, own_cache: Path
) -> None:
    made, module = converted_cached, copy.deepcopy(cached[0])
    shutil.copytree(made.file.parent, own_cache)
    file = own_cache / made.file.name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    execute(module, "openvino")
    with torch.no_grad():
        assert sqnr_db(made.computed[0], Denoiser(module)(made.inputs)) > 40
