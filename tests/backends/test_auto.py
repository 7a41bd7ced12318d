"""The choice of a backend by measuring, with planted backends and a clock that only their calls advance; and
what engines cannot do.
"""

import copy
import json
import logging
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DiffusionPipeline, PipelineQuantizationConfig, UNet2DModel
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import tfmq
from tfmq.backends import measuring
from tfmq.backends.auto import CANDIDATES, decide
from tfmq.backends.backend import BACKENDS, Coverage, EngineError, Options
from tfmq.backends.execution import computed_by, execute
from tfmq.backends.measuring import MARGIN, race, ranked
from tfmq.errors import MissingExtraError
from tfmq.evaluation.cost.source import dequantized
from tfmq.export.fake_quantize import graph_kernels
from tfmq.models.denoiser import Denoiser, Inputs
from tfmq.models.sampler import LoopSampler
from tfmq.nn.embedding import KeptRows, PackedEmbedding
from tfmq.nn.packed_layer import StockExecution
from tfmq.nn.plan import packed_layers
from tfmq.nn.submodules import submodules
from tfmq.nn.swap import plain_forward
from tfmq.numerics.errors import sqnr_db
from tfmq.quantizers.part import Held
from tfmq.recipes import Recipe
from tfmq.storage.digest import tensor_digest


@dataclass
class Planted:
    """A backend that computes in simulated arithmetic, takes `seconds` a row on the clock, and fails where
    `fails` says so.
    """

    clock: list[float]
    seconds: Callable[[int], float]
    fails: Callable[[int], Exception | None] = lambda batch: None
    attaching: Exception | None = None
    rows: list[int] = field(default_factory=list)

    def missing(self) -> str:
        return ""

    def attach(self, module: nn.Module, options: Options) -> Coverage:
        if self.attaching is not None:
            raise self.attaching
        module.tfmq_executor = self  # type: ignore[assignment]
        return Coverage(integer=(), floating={})

    def __deepcopy__(self, memo: dict[int, Any]) -> "Planted":
        return self

    def __call__(self, module: nn.Module, arguments: Mapping[str, Any]) -> Any:
        batch = len(next(iter(arguments.values())))
        if (error := self.fails(batch)) is not None:
            raise error
        self.rows.append(batch)
        self.clock[0] += self.seconds(batch)
        return plain_forward(module, arguments)


Plant = Callable[..., dict[str, Planted]]
Make = Callable[..., LoopSampler]
Quick = Callable[..., Recipe]


@pytest.fixture(autouse=True)
def _unmeasured() -> None:
    """Measure, unlike the other tests."""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TFMQ_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr("tfmq.stopwatch.clock", lambda: now[0])
    return now


@pytest.fixture
def plant(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> Plant:
    """Return a function that makes backends the only candidates, from seconds of a row by name, the baseline
    first.
    """

    def make(**seconds: float | Callable[[int], float]) -> dict[str, Planted]:
        made = {}
        for name, each in seconds.items():
            cost = each if callable(each) else (lambda batch, each=each: batch * each)
            made[name] = Planted(clock, cost)
            monkeypatch.setitem(BACKENDS, name, made[name])
        monkeypatch.setitem(CANDIDATES, "cpu", tuple(seconds))
        return made

    return make


@pytest.fixture(scope="module")
def quantized(sampler: Callable[..., LoopSampler], quick: Quick) -> nn.Module:
    made = sampler("plain_rgb")
    tfmq.quantize(made, quick("rtn_w8a8"))
    return made.denoiser.module


@pytest.fixture
def module(quantized: nn.Module) -> nn.Module:
    return copy.deepcopy(quantized)


def call(batch: int = 1, timestep: int = 333) -> Inputs:
    return Inputs(
        torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(batch)),
        torch.tensor([timestep] * batch),
    )


@torch.no_grad()
def run(module: nn.Module, inputs: Inputs) -> Tensor:
    return Denoiser(module)(inputs)


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "tfmq"]


def test_the_fastest_computes_and_one_line_says_why(
    module: nn.Module, plant: Plant, caplog: pytest.LogCaptureFixture
) -> None:
    planted = plant(plain=0.003, quick=0.0014, slow=0.0436)
    expected = run(module, call())
    coverage = execute(module, "auto")
    assert coverage.integer == () and set(coverage.floating.values()) == {
        "what computes it is measured at the first call"
    }
    assert not any(backend.rows for backend in planted.values()), "nothing is measured before a call comes"
    with caplog.at_level(logging.INFO, "tfmq"):
        assert torch.equal(run(module, call()), expected)
    assert computed_by(module) == "quick"
    assert (
        lines(caplog)[-1]
        == "auto: quick computes PlainDenoiser at batch 1: 1.4 ms a call; against plain 3.0, slow 43.6"
    )
    counts = {name: len(backend.rows) for name, backend in planted.items()}
    run(module, call(timestep=666))
    assert {name: len(backend.rows) - counts[name] for name, backend in planted.items()} == {
        "plain": 0,
        "quick": 1,
        "slow": 0,
    }


def test_what_could_be_installed_is_named(
    module: nn.Module, plant: Plant, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def missing() -> str:
        raise MissingExtraError("this needs abacus; install it with: pip install 'tfmq[abacus]'")

    planted = plant(plain=0.003, abacus=0.001)
    monkeypatch.setattr(planted["abacus"], "missing", missing)
    execute(module, "auto")
    with caplog.at_level(logging.INFO, "tfmq"):
        run(module, call())
    assert computed_by(module) == "plain"
    (line,) = lines(caplog)
    assert (
        "plain computes" in line
        and "abacus was not tried: this needs abacus; install it with: pip install 'tfmq[abacus]'" in line
    )


@given(
    st.dictionaries(st.sampled_from(["a", "b", "c", "float"]), st.floats(1e-4, 10), min_size=1),
    st.sampled_from(["a", "b", None]),
)
def test_nothing_is_chosen_that_is_slower_than_the_baseline_by_more_than_the_margin(
    seconds: dict[str, float], held: str | None
) -> None:
    seconds.setdefault("float", 1.0)
    order = ranked(seconds, "float", held)
    assert order[-1] == "float" and len(set(order)) == len(order)
    assert seconds[order[0]] <= (1 + MARGIN) * min(seconds.values())


def test_who_is_far_behind_is_called_a_few_times_and_the_whole_is_bounded(clock: list[float]) -> None:
    calls: dict[str, int] = dict.fromkeys(("base", "near", "far"), 0)
    cost = {"base": 0.5, "near": 0.4, "far": 3.0}
    left = []

    def enter(name: str) -> Callable[[], None]:
        def one() -> None:
            calls[name] += 1
            clock[0] += cost[name]

        return one

    found = race(tuple(cost), enter, left.append)
    assert found.seconds == pytest.approx(cost) and left == ["far"] and calls["far"] == 2
    assert clock[0] < 3 * measuring.SECONDS


def test_noise_on_single_calls_does_not_decide(clock: list[float]) -> None:
    """Of every seventh call the machine does something else; the medians do not see it."""
    count = 0

    def enter(name: str) -> Callable[[], None]:
        def one() -> None:
            nonlocal count
            count += 1
            clock[0] += {"base": 0.010, "near": 0.009}[name] * (20 if count % 7 == 0 else 1)

        return one

    found = race(("base", "near"), enter, lambda name: pytest.fail(f"{name} left"))
    assert found.seconds == pytest.approx({"base": 0.010, "near": 0.009})


def test_another_process_reads_the_choice_and_another_setting_is_measured_anew(
    quantized: nn.Module, plant: Plant, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    planted = plant(plain=0.003, quick=0.001)

    def measured(batch: int = 1, options: Options | None = None) -> int:
        """Load the model as another process does, run it, and return how often the baseline was called."""
        module = copy.deepcopy(quantized)
        execute(module, "auto", options=options)
        before = len(planted["plain"].rows)
        run(module, call(batch))
        assert computed_by(module) == "quick"
        return len(planted["plain"].rows) - before

    assert measured() > 0 and measured() == 0
    assert measured(batch=2) > 0 and measured(batch=2) == 0
    assert measured(options=Options(threads=3)) > 0
    files = sorted((cache / "auto").glob("*.json"))
    assert len(files) == 3
    for path in files:
        path.write_text('{"milliseconds": {"quick": NaN, "plain": 1}, "failed": {}}')
    with caplog.at_level(logging.INFO, "tfmq"):
        assert measured() > 0 and measured() == 0
    assert "measured before" in lines(caplog)[-1] and str(cache) in lines(caplog)[-1]
    other = copy.deepcopy(quantized)
    other.entry.bias.add_(1)  # type: ignore[operator, union-attr]
    before = len(planted["plain"].rows)
    execute(other, "auto")
    run(other, call())
    assert len(planted["plain"].rows) > before, "another model"


def test_a_cache_that_cannot_be_written_is_no_error(module: nn.Module, plant: Plant, cache: Path) -> None:
    cache.write_text("no folder")
    plant(plain=0.003, quick=0.001)
    execute(module, "auto")
    run(module, call())
    assert computed_by(module) == "quick"


def test_batches_have_choices_of_their_own(module: nn.Module, plant: Plant) -> None:
    expected = [run(module, call(batch)) for batch in (1, 4)]
    plant(plain=0.003, narrow=lambda batch: 0.001 * batch**2, wide=lambda batch: 0.002)
    execute(module, "auto")
    state = tensor_digest(module.state_dict())
    for _ in range(2):
        for batch, name, output in ((1, "narrow", expected[0]), (4, "wide", expected[1])):
            assert torch.equal(run(module, call(batch)), output) and computed_by(module) == name
    assert tensor_digest(module.state_dict()) == state


def test_backends_that_are_swapped_leave_nothing_of_each_other(
    module: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real ones of every machine, chosen by batch: each computes what it computes alone."""
    alone = {}
    for name in ("float", "reference", "simulated"):
        execute(module, name)
        alone[name] = run(module, call(4))
    assert not torch.equal(alone["float"], alone["reference"])
    choice = {1: "reference", 2: "float", 4: "reference"}
    monkeypatch.setitem(CANDIDATES, "cpu", ("float", "reference"))

    def settled(names: Any, enter: Any, leave: Any) -> Any:
        return measuring.Race({name: 1.0 if name == choice[batch] else 2.0 for name in names})

    monkeypatch.setattr("tfmq.backends.auto.race", settled)
    execute(module, "auto")
    for batch in (1, 2, 4, 2, 4):
        output = run(module, call(batch))
        assert computed_by(module) == choice[batch]
    assert torch.equal(output, alone["reference"])
    x = call(4).sample.requires_grad_()
    y = Denoiser(module)(Inputs(x, call(4).timestep))
    assert computed_by(module) == "simulated" and torch.equal(y, alone["simulated"])
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert bool(gradient.abs().sum() > 0)
    assert torch.equal(run(module, call(4)), alone["reference"])


def test_a_copy_computes_the_same(module: nn.Module, plant: Plant) -> None:
    planted = plant(plain=0.003, quick=0.001)
    execute(module, "auto")
    expected = run(module, call())
    other, before = copy.deepcopy(module), len(planted["plain"].rows)
    execute(module, "reference")
    assert torch.equal(run(other, call()), expected) and computed_by(other) == "quick"
    assert len(planted["plain"].rows) == before, "it takes over the choice"


def test_nothing_is_measured_while_somebody_watches_layers(module: nn.Module, plant: Plant) -> None:
    planted = plant(plain=0.003, quick=0.001)
    execute(module, "auto")
    seen = []
    handle = module.entry.register_forward_hook(lambda *_: seen.append(1))  # type: ignore[operator, union-attr]
    run(module, call())
    assert len(seen) == 1 and not planted["plain"].rows
    handle.remove()
    run(module, call())
    assert computed_by(module) == "quick"


def test_the_measurement_draws_nothing(module: nn.Module, plant: Plant) -> None:
    class Drawing(Planted):
        def __call__(self, module: nn.Module, arguments: Mapping[str, Any]) -> Any:
            torch.rand(5)
            return super().__call__(module, arguments)

    planted = plant(plain=0.003, quick=0.001)
    planted["plain"].__class__ = Drawing
    execute(module, "auto")
    state = torch.get_rng_state()
    run(module, call())
    assert torch.equal(torch.get_rng_state(), state)


def test_long_calls_are_measured_on_one_row(
    module: nn.Module, plant: Plant, caplog: pytest.LogCaptureFixture
) -> None:
    planted = plant(plain=1.0, quick=0.5)
    execute(module, "auto")
    with caplog.at_level(logging.INFO, "tfmq"):
        run(module, Inputs(call(8).sample, torch.tensor([333, 0] * 4)))
    assert (
        set(planted["plain"].rows) == {1}
        and planted["quick"].rows[-1] == 8
        and set(planted["quick"].rows[:-1]) == {1}
    )
    assert "measured on 1 of 8 rows" in lines(caplog)[-1]


def test_what_does_not_fit_into_memory_is_not_tried(
    module: nn.Module, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = run(module, call())
    monkeypatch.setattr("tfmq.backends.auto.free_bytes", lambda: 1000)
    execute(module, "auto")
    with caplog.at_level(logging.INFO, "tfmq"):
        assert torch.equal(run(module, call()), expected)
    assert computed_by(module) == "simulated" and not submodules(module, Held)
    assert "float was not tried: it takes 0.0 GB, and 0.0 GB are free" in lines(caplog)[-1]


def test_a_verb_that_judges_does_not_judge_the_float_model(
    module: nn.Module, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CANDIDATES, "cpu", ("float", "reference"))
    tried: list[str] = []

    def first(names: Any, enter: Any, leave: Any) -> Any:
        tried.extend(names)
        return measuring.Race({name: 1.0 + index for index, name in enumerate(names)})

    monkeypatch.setattr("tfmq.backends.auto.race", first)
    with warnings.catch_warnings():
        # An example's timestep is not one of the calibrated, and stands in for one.
        warnings.simplefilter("error")
        assert decide(Denoiser(module), call(2, timestep=1), Options(), judged=True) == "simulated"
        assert decide(Denoiser(module), call(2, timestep=1), Options(), judged=False) == "float"
    assert tried == ["simulated", "reference", "float", "reference"] and module.tfmq_executor is None


# The float backend.


@pytest.mark.parametrize("name", ["unet", "dit", "conditional"])
def test_float_is_the_model_of_the_dequantized_weights(sampler: Make, rounded: Make, name: str) -> None:
    original, made = sampler(name), rounded(name)
    module, example = made.denoiser.module, made.example()
    inputs = Inputs(
        torch.randn(2, *example.sample.shape[1:]), torch.tensor([333, 0]), example.resized(2).conditions
    )
    full, simulated = run(original.denoiser.module, inputs), run(module, inputs)
    stock = dequantized(module).eval()
    for options in (Options(), Options(weights="packed")):
        coverage = execute(module, "float", options=options)
        assert coverage.integer == () and set(coverage.floating.values()) == {"float"}
        output = run(module, inputs)
        assert sqnr_db(run(stock, inputs), output) > 100
        assert sqnr_db(full, output) > sqnr_db(full, simulated)
        # What a stock layer does, and nothing that small models would feel.
        direct = options == Options()
        for layer in packed_layers(module).values():
            assert isinstance(layer.execution, StockExecution)
            assert (layer.execution.weight is not None) == direct
        tables = submodules(module, PackedEmbedding).values()
        assert all(isinstance(table.execution, KeptRows) == direct for table in tables)
    execute(module, "simulated")
    assert torch.equal(run(module, inputs), simulated)
    assert all(table.execution is None for table in tables)


class Counted(TorchDispatchMode):
    """Counts operations on tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["unet", "dit", "conditional"])
def test_float_does_what_the_full_precision_model_does_and_little_more(
    sampler: Make, rounded: Make, name: str
) -> None:
    """On small models each operation counts: more of them is how `float` would be slower. What a call adds
    looks up its bins, and for NaN.
    """
    original, made = sampler(name), rounded(name)
    execute(made.denoiser.module, "float")
    example = made.example()
    counts = []
    for module in (original.denoiser.module, made.denoiser.module):
        inputs = Inputs(example.sample, torch.tensor([333]), example.conditions)
        run(module, inputs)
        with Counted() as counted:
            run(module, inputs)
        counts.append(counted.count)
    assert counts[1] - counts[0] <= 25


def test_a_graph_of_a_model_in_float_is_that_of_the_quantized_model(module: nn.Module) -> None:
    graphs, outputs = [], []
    for backend in ("simulated", "float"):
        execute(module, backend)
        before = run(module, call())
        with graph_kernels(module):
            graphs.append(run(module, call()))
        outputs.append(run(module, call()))
        assert torch.equal(outputs[-1], before)
    assert torch.equal(*graphs) and not torch.equal(*outputs)


# from_pretrained.


@pytest.fixture(scope="module")
def saved(build: Callable[..., Any], quick: Quick, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved") / "q"
    pipeline = DDIMPipeline(build("unet")[0].module, DDIMScheduler())
    tfmq.quantize(pipeline, quick("rtn_w8a8"), output_dir=directory)
    return directory


def test_from_pretrained_executes_like_load(saved: Path, plant: Plant) -> None:
    planted = plant(plain=0.003, quick=0.001)
    outputs = []
    for opened in (
        tfmq.load(saved).unet,
        DiffusionPipeline.from_pretrained(saved).unet,
        UNet2DModel.from_pretrained(saved / "unet"),
    ):
        assert computed_by(opened) is None
        outputs.append(run(opened, call()))
        assert computed_by(opened) == "quick"
    assert (
        torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2]) and planted["quick"].rows
    )


def test_a_config_chooses_the_backend_and_is_not_saved(saved: Path, tmp_path: Path) -> None:
    config = tfmq.TFMQConfig(backend="reference")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        component = UNet2DModel.from_pretrained(saved / "unet", quantization_config=config)
        pipeline = DiffusionPipeline.from_pretrained(
            saved, quantization_config=PipelineQuantizationConfig(quant_mapping={"unet": config})
        )
    for unet in (component, pipeline.unet):
        assert {type(layer.kernel).__name__ for layer in packed_layers(unet).values()} == {"ReferenceKernel"}
    component.save_pretrained(tmp_path / "again")
    stored, again = (
        json.loads((folder / "config.json").read_text()) for folder in (saved / "unet", tmp_path / "again")
    )
    assert again["quantization_config"] == stored["quantization_config"]
    simulated = UNet2DModel.from_pretrained(
        saved / "unet", quantization_config=tfmq.TFMQConfig(backend="simulated")
    )
    assert torch.equal(run(simulated, call()), run(tfmq.load(saved, backend="simulated").unet, call()))
    with pytest.raises(ValueError, match="no backend 'abacus'"):
        UNet2DModel.from_pretrained(saved / "unet", quantization_config=tfmq.TFMQConfig(backend="abacus"))


# Engines that fail.


def test_an_engine_that_cannot_compile_is_replaced_by_the_next_in_a_line(
    module: nn.Module, plant: Plant
) -> None:
    planted = plant(broken=0.001)["broken"]
    planted.fails = lambda batch: (
        EngineError("broken cannot compile the layer mid_block.norm") if batch != 4 else None
    )
    expected = run(module, call())
    execute(module, "broken")
    with pytest.warns(
        UserWarning,
        match=(
            r"^broken cannot run this model: broken cannot compile the layer "
            r"mid_block.norm; (torch|simulated) computes.*Choose"
        ),
    ):
        output = run(module, call())
    assert sqnr_db(expected, output) > 35 and computed_by(module) in ("torch", "simulated")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(run(module, call()), output)
        run(module, call(4))
        assert computed_by(module) == "broken", "other batches work, and go on to"
        assert torch.equal(run(module, call()), output)


def test_a_bare_error_of_an_engine_is_caught_too_and_one_of_attaching(
    module: nn.Module, plant: Plant
) -> None:
    planted = plant(broken=0.001)["broken"]
    planted.fails = lambda batch: RuntimeError("Layout rank can't be larger than tensor rank")
    execute(module, "broken")
    with pytest.warns(UserWarning, match="Layout rank"):
        run(module, call())
    planted.attaching = EngineError("broken has no such processor")
    with pytest.warns(UserWarning, match="no such processor"):
        execute(module, "broken")
    run(module, call())


def test_auto_goes_on_without_an_engine_that_fails_and_does_not_try_it_again(
    quantized: nn.Module, plant: Plant, caplog: pytest.LogCaptureFixture
) -> None:
    planted = plant(plain=0.003, broken=0.001, quick=0.002)
    tried: list[int] = []

    def fail(batch: int) -> Exception:
        tried.append(batch)
        return EngineError("broken cannot compile the layer mid_block.norm")

    planted["broken"].fails = fail
    said = []
    for _ in range(2):
        module = copy.deepcopy(quantized)
        execute(module, "auto")
        with caplog.at_level(logging.INFO, "tfmq"), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run(module, call())
        assert (
            computed_by(module) == "quick"
            and "broken failed: broken cannot compile the layer mid_block.norm" in lines(caplog)[-1]
        )
        said += [str(warning.message).partition(";")[0] for warning in caught]
    assert said == [
        "broken cannot run this model: broken cannot compile the layer mid_block.norm"
    ] and tried == [1]


def test_an_engine_that_fails_after_it_was_chosen_hands_over_to_the_next(
    module: nn.Module, plant: Plant
) -> None:
    planted = plant(plain=0.003, quick=0.001, second=0.002)
    execute(module, "auto")
    expected = run(module, call())
    planted["quick"].fails = lambda batch: RuntimeError("out of handles")
    with pytest.warns(UserWarning, match="quick cannot run this model: out of handles; second computes"):
        assert torch.equal(run(module, call()), expected)
    assert computed_by(module) == "second"


@pytest.mark.parametrize("backend", ["auto", "broken"])
def test_a_mistake_of_the_call_is_the_models_own_error(module: nn.Module, plant: Plant, backend: str) -> None:
    plant(plain=0.003, broken=0.001)
    execute(module, backend)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            with pytest.raises(RuntimeError, match="channels"):
                run(module, Inputs(torch.randn(1, 5, 8, 8), torch.tensor([333])))
        run(module, call())
    assert computed_by(module) == "broken" and math.isfinite(float(run(module, call()).sum()))


def test_a_model_in_a_dtype_that_an_engine_lacks_runs_by_the_next_with_a_word(module: nn.Module) -> None:
    """OpenVINO's arrays are numpy's, which has no bfloat16."""
    pytest.importorskip("openvino")
    module.to(torch.bfloat16)
    inputs = call(2)
    inputs = Inputs(inputs.sample.bfloat16(), inputs.timestep)
    expected = run(module, inputs)
    execute(module, "openvino")
    with pytest.warns(UserWarning, match="openvino cannot run this model.*computes such calls instead"):
        found = run(module, inputs)
    assert found.dtype == torch.bfloat16 and sqnr_db(expected, found) > 20
