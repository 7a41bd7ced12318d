import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tfmq.calibration.store import CalibrationStore
from tfmq.calibration.trajectory import CalibrationError
from tfmq.jobs.job import Job, stage_seed
from tfmq.jobs.workflow import Outcome, quantize_denoiser
from tfmq.models.denoiser import Denoiser, Inputs
from tfmq.models.sampler import LoopSampler
from tfmq.nn.layer import CalibratedLayer
from tfmq.nn.plan import activation_sites, packed_embeddings, packed_layers
from tfmq.nn.structure import assemble, describe
from tfmq.nn.temporal import CachedFeature, SkippedLayer, without_tables
from tfmq.numerics.errors import sqnr_db
from tfmq.recipes.presets import scheme
from tfmq.recipes.recipe import Activations, Calibration, Recipe, Rule, Temporal, Weights
from tfmq.recipes.yaml import to_dict
from tfmq.reconstruction.learning import Learning
from tfmq.storage import tensor_digest
from tfmq.storage.errors import JobMismatchError
from tfmq.storage.journal import Journal

Sampling = Callable[..., LoopSampler]
Made = Callable[[str, str], tuple[LoopSampler, Outcome, Path]]
FEW = Learning(iterations=3, learning_rate=1e-2, batch_size=4)


def quick(name: str, **changes: Any) -> Recipe:
    """A scheme with a calibration of 3 images, in two batches, of 3 steps and a handful of iterations."""
    recipe = scheme(name)
    learning = replace(FEW, iterations=min(3, recipe.learning.iterations))
    temporal = replace(changes.pop("temporal", recipe.temporal), learning=FEW)
    calibration = Calibration(
        samples=changes.pop("samples", 3), steps=changes.pop("steps", 3), interval=3, batch_size=2
    )
    return replace(recipe, learning=learning, temporal=temporal, calibration=calibration, **changes)


def quantize(
    sampler: LoopSampler,
    recipe: Recipe,
    directory: Path,
    *,
    seed: int = 0,
    resume: bool = False,
    **options: Any,
) -> Outcome:
    journal = Journal(directory / "job", {"recipe": to_dict(recipe), "seed": seed}, resume=resume)
    store = CalibrationStore(directory / "calls")
    return quantize_denoiser(
        Job(sampler=sampler, recipe=recipe, seed=seed, store=store, journal=journal, **options)
    )


def digest(sampler: LoopSampler) -> str:
    return tensor_digest(sampler.denoiser.module.state_dict())


VARIANTS = {
    **{name: quick(name) for name in ("w4a8", "w8a8", "w4a32", "rtn_w4a8", "rtn_w8a8", "brecq_w4a8", "w3a6")},
    "selected": quick("w4a8", temporal=Temporal(maintenance="selected")),
    "selected per feature, half table": quick(
        "w4a8", temporal=Temporal(maintenance="selected", scope="feature", table="float16")
    ),
    "block": quick("w4a8", temporal=Temporal(maintenance="block")),
    "fast_w8a8": quick("fast_w8a8"),
}
# Scope of per-timestep grids -> rows that a quantizer may have after calibration on three timesteps.
ROWS = {"all": {3}, "measured": {1, 3}, "none": {1}}


@pytest.fixture(scope="module")
def quantized(sampler: Sampling, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Return a function that gives a model quantized by a variant, what that did, and its directory: made
    once for all who only read it.
    """

    @cache
    def make(model: str, variant: str) -> tuple[LoopSampler, Outcome, Path]:
        drawn, directory = sampler(model), tmp_path_factory.mktemp("quantized")
        return drawn, quantize(drawn, VARIANTS[variant], directory), directory

    return make


# Model -> first layer, last layer, number of temporal features, number of layers that only feed them.
SHAPES = {"plain": ("entry", "exit", 2, 1), "unet": ("conv_in", "conv_out", 8, 2)}
CASES = [("plain", variant) for variant in VARIANTS] + [("unet", "w4a8")]


@pytest.mark.parametrize(("model", "variant"), CASES)
def test_every_variant_ends_packed_with_the_bits_of_its_recipe(
    sampler: Sampling, quantized: Made, model: str, variant: str
) -> None:
    recipe, (drawn, outcome, _) = VARIANTS[variant], quantized(model, variant)
    first, last, features, inner = SHAPES[model]
    weighted = {
        name
        for name, child in sampler(model).denoiser.module.named_modules()
        if isinstance(child, torch.nn.Linear | torch.nn.Conv2d)
    }
    module = drawn.denoiser.module
    packed = packed_layers(module)
    assert set(packed) == weighted and not any(
        isinstance(child, CalibratedLayer) for child in module.modules()
    )
    for name, layer in packed.items():
        assert layer.format.bits == (8 if name in (first, last) and recipe.rules else recipe.weights.bits)
        assert (layer.input_quantizer is None) is (recipe.activations.bits is None)
    rows = {site.scale.shape[0] for site in activation_sites(module).values()}
    assert rows == (ROWS[recipe.activations.per_step] if recipe.activations.bits else set())
    tables = [child for child in module.modules() if isinstance(child, CachedFeature)]
    assert len(tables) == (features if recipe.temporal.maintenance in ("cache", "selected") else 0)
    skipped = sum(isinstance(child, SkippedLayer) for child in module.modules())
    assert skipped == (inner if tables and all(table.everywhere for table in tables) else 0)
    assert recipe.temporal.maintenance != "cache" or skipped == inner
    assert (
        outcome.units[0].name == (first if recipe.temporal.maintenance != "none" else "embed")
        and outcome.units[-1].name == last
    )
    assert len(outcome.disturbance.relative_error) == features
    assert all(len(error) == 3 for error in outcome.disturbance.relative_error.values())
    images = drawn.run(range(2), steps=3, seed=5)
    assert torch.isfinite(images).all() and images.std() > 0


@pytest.mark.parametrize("name", ["own_attention", "class_conditional", "dit", "sd3", "upsampler"])
def test_every_architecture_runs_through(sampler: Sampling, tmp_path: Path, name: str) -> None:
    drawn = sampler(name)
    full = drawn.run(range(2), steps=3, seed=5)
    recipe = quick(
        "w8a8",
        samples=2,
        temporal=Temporal(maintenance="selected"),
        weights=Weights(bits=8, ranges="min_max"),
    )
    quantize(drawn, recipe, tmp_path)
    assert sqnr_db(full, drawn.run(range(2), steps=3, seed=5)) > 15
    embeddings = {
        key
        for key, child in sampler(name).denoiser.module.named_modules()
        if isinstance(child, torch.nn.Embedding)
    }
    assert set(packed_embeddings(drawn.denoiser.module)) == embeddings


def test_transposed_convolutions_and_embeddings_are_quantized_and_the_rest_is_named(
    sampler: Sampling, tmp_path: Path
) -> None:
    drawn = sampler("upsampler")
    recipe = quick("w4a8", rules=(Rule(match="exit", weights={"bits": None}, activations={"bits": None}),))
    outcome = quantize(drawn, recipe, tmp_path)
    module = drawn.denoiser.module
    assert (
        packed_layers(module)["up"].input_quantizer is not None
        and packed_layers(module)["up"].format.bits == 4
    )
    assert {name: layer.format.bits for name, layer in packed_embeddings(module).items()} == {"labels": 8}
    assert any("up" in unit.name for unit in outcome.units) and not any(
        "labels" in unit.name for unit in outcome.units
    )
    assert [(entry.name, entry.kind, entry.bytes) for entry in outcome.floating] == [
        ("exit", "Conv2d", 4 * (2 * 10 * 9 + 2)),
        ("norm", "GroupNorm", 4 * 16),
        ("", "Upsampler", 4 * 4),
    ]
    assert [entry.reason for entry in outcome.floating] == [
        "rule of the recipe",
        "norm",
        "tensors of its own",
    ]


class Tabled(torch.nn.Module):
    """A denoiser whose time embedding is a learned table of timesteps."""

    def __init__(self) -> None:
        super().__init__()
        self.times = torch.nn.Embedding(1000, 16)
        self.inner = torch.nn.Linear(16, 16)
        self.shift = torch.nn.Linear(16, 4)
        self.entry = torch.nn.Conv2d(2, 4, 3, padding=1)
        self.exit = torch.nn.Conv2d(4, 2, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        shift = self.shift(torch.relu(self.inner(self.times(t))))
        return self.exit(torch.relu(self.entry(x) + shift[:, :, None, None]))


def test_a_table_of_timesteps_is_quantized_behind_the_tables_of_its_features(tmp_path: Path) -> None:
    from diffusers import DDIMScheduler

    module = Tabled().eval()
    drawn = LoopSampler(Denoiser(module), DDIMScheduler(), shape=(2, 8, 8))
    full = copy.deepcopy(module)
    quantize(drawn, quick("w8a8"), tmp_path)
    assert set(packed_embeddings(module)) == {"times"}
    assert isinstance(module.shift, CachedFeature) and isinstance(module.inner, SkippedLayer)
    with torch.no_grad():
        expected = full.shift(torch.relu(full.inner(full.times(module.tfmq_steps.timesteps.long()))))
        assert sqnr_db(expected, module.shift.table(torch.arange(3))) > 40
        for inputs in CalibrationStore(tmp_path / "calls"):
            assert sqnr_db(Denoiser(full)(inputs), drawn.denoiser(inputs)) > 25
            with without_tables(module):
                assert sqnr_db(Denoiser(full)(inputs), drawn.denoiser(inputs)) > 25


def test_a_rule_keeps_an_embedding_or_gives_it_other_bits(sampler: Sampling, tmp_path: Path) -> None:
    for bits in (None, 3):
        drawn = sampler("upsampler")
        quantize(
            drawn,
            quick("w4a8", rules=(Rule(match="labels", weights={"bits": bits}, activations={"bits": None}),)),
            tmp_path / str(bits),
        )
        assert {layer.format.bits for layer in packed_embeddings(drawn.denoiser.module).values()} == (
            {bits} if bits else set()
        )


@pytest.mark.parametrize("name", ["unet", "plain"])
def test_at_eight_bits_the_output_is_close_at_every_calibrated_timestep(
    sampler: Sampling, quantized: Made, name: str
) -> None:
    stock, (drawn, _, directory) = sampler(name), quantized(name, "w8a8")
    for inputs in CalibrationStore(directory / "calls"):
        with torch.no_grad():
            assert sqnr_db(stock.denoiser(inputs), drawn.denoiser(inputs)) > 25


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_stay_in_half_precision(
    sampler: Sampling, tmp_path: Path, dtype: torch.dtype
) -> None:
    drawn = sampler("unet")
    drawn.denoiser.module.to(dtype)
    full = drawn.run(range(2), steps=3, seed=5)
    quantize(drawn, quick("w8a8", samples=2, weights=Weights(bits=8, ranges="min_max")), tmp_path)
    assert {parameter.dtype for parameter in drawn.denoiser.module.parameters()} == {dtype}
    assert sqnr_db(full, drawn.run(range(2), steps=3, seed=5)) > 20
    fresh = sampler("unet", seed=1)
    fresh.denoiser.module.to(dtype)
    assemble(fresh.denoiser.module, describe(drawn.denoiser.module))
    fresh.denoiser.module.load_state_dict(drawn.denoiser.module.state_dict())
    assert torch.equal(fresh.run(range(2), steps=3, seed=5), drawn.run(range(2), steps=3, seed=5))


def test_a_batch_of_mixed_timesteps_equals_its_samples_one_by_one(quantized: Made) -> None:
    drawn, _, _ = quantized("unet", "w4a8")
    sample, timesteps = torch.randn(4, 3, 8, 8), torch.tensor([666, 0, 333, 666])
    with torch.no_grad():
        together = drawn.denoiser(Inputs(sample, timesteps))
        alone = torch.cat([drawn.denoiser(Inputs(sample[i : i + 1], timesteps[i : i + 1])) for i in range(4)])
        shifted = drawn.denoiser(Inputs(sample, timesteps.roll(1)))
    # Convolutions may sum in another order for another batch, which moves single codes; a wrong timestep
    # moves far more.
    assert sqnr_db(alone, together) > 40 > sqnr_db(alone, shifted)


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(
    sampler: Sampling, quantized: Made, tmp_path: Path
) -> None:
    found = [digest(quantized("plain", "w4a8")[0])]
    for number, seed in enumerate((0, 1, 2**32)):
        drawn = sampler("plain")
        quantize(drawn, quick("w4a8"), tmp_path / str(number), seed=seed)
        found.append(digest(drawn))
    assert found[0] == found[1] and len(set(found)) == 3


def test_every_stage_of_every_seed_draws_its_own() -> None:
    seeds = {
        stage_seed(seed, name) % 2**32
        for seed in (0, 1, 256, 2**32)
        for name in ("calibration", "temporal", "conv_in")
    }
    assert len(seeds) == 12, "generators look at the low 32 bits"


class Interrupted(Exception):
    """Stands for a killed process."""


@contextmanager
def stopping(description: str, total: int, *, stage: str, after: int) -> Iterator[Any]:
    """A progress that breaks off after a number of advances in one stage."""
    done = 0

    def advance(amount: int = 1) -> None:
        nonlocal done
        done += amount
        if description == stage and done > after:
            raise Interrupted

    if description == stage and after < 0:
        raise Interrupted
    yield advance


STAGES = {
    "before anything": ("calibration: sampling", -1),
    "while sampling": ("calibration: sampling", 4),
    "before ranges": ("calibration: values of activations", -1),
    "while seeing activations": ("calibration: values of activations", 4),
    "while fitting ranges": ("calibration: activation ranges", 2),
    "before TIAR": ("temporal block: TIAR", -1),
    "in TIAR": ("temporal block: TIAR", 1),
    "before units": ("units: reconstruction", -1),
    "in the first unit": ("units: reconstruction", 1),
    "after the first unit": ("units: reconstruction", 3),
    "in the last unit": ("units: reconstruction", 6),
}


@pytest.fixture(scope="module")
def uninterrupted() -> dict[str, str]:
    return {}


@pytest.mark.parametrize("when", STAGES)
def test_an_interrupted_job_resumes_to_the_same_bytes(
    sampler: Sampling, tmp_path: Path, uninterrupted: dict[str, str], when: str
) -> None:
    recipe = quick("w4a8", temporal=Temporal(maintenance="selected"))
    if not uninterrupted:
        drawn = sampler("plain")
        store = CalibrationStore(tmp_path / "whole")
        quantize_denoiser(
            Job(sampler=drawn, recipe=recipe, seed=3, store=store, journal=Journal(None, {}, resume=False))
        )
        uninterrupted["digest"] = digest(drawn)
    stage, after = STAGES[when]
    with pytest.raises(Interrupted):
        quantize(
            sampler("plain"),
            recipe,
            tmp_path,
            seed=3,
            progress=lambda text, total: stopping(text, total, stage=stage, after=after),
        )
    resumed = sampler("plain")
    quantize(resumed, recipe, tmp_path, seed=3, resume=True)
    assert digest(resumed) == uninterrupted["digest"]


def test_a_finished_job_is_read_back_without_sampling_or_learning(
    sampler: Sampling, quantized: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn, first, directory = quantized("plain", "w4a8")
    again = sampler("plain")
    monkeypatch.setattr(again, "run", lambda *_, **__: pytest.fail("sampled again"))
    monkeypatch.setattr(torch.optim, "Adam", lambda *_, **__: pytest.fail("learned again"))
    second = quantize(again, VARIANTS["w4a8"], directory, resume=True)
    assert digest(again) == digest(drawn) and second.units == first.units


@pytest.mark.parametrize(
    ("recipe", "seed", "message"),
    [
        (quick("w4a8"), 1, "seed was 0 and is 1"),
        (quick("w3a8"), 0, r"recipe\.name was 'tfmq_w4a8'"),
        (
            replace(quick("w4a8"), learning=replace(FEW, penalty=0.5)),
            0,
            r"recipe\.learning\.penalty was 0\.01 and is 0\.5",
        ),
    ],
)
def test_a_changed_job_is_not_resumed(
    sampler: Sampling, tmp_path: Path, recipe: Recipe, seed: int, message: str
) -> None:
    with pytest.raises(Interrupted):
        quantize(
            sampler("plain"),
            quick("w4a8"),
            tmp_path,
            progress=lambda text, total: stopping(text, total, stage="temporal block: TIAR", after=0),
        )
    with pytest.raises(JobMismatchError, match=message):
        quantize(sampler("plain"), recipe, tmp_path, seed=seed, resume=True)


@pytest.mark.parametrize("name", ["w4a8", "rtn_w4a8"])
def test_every_bar_of_a_whole_run_fills_up(sampler: Sampling, tmp_path: Path, name: str) -> None:
    bars: dict[str, list[int]] = {}

    @contextmanager
    def progress(description: str, total: int) -> Iterator[Any]:
        bars[description] = [total, 0]

        def advance(amount: int = 1) -> None:
            bars[description][1] += amount

        yield advance

    for resume in (False, True):
        bars.clear()
        quantize(sampler("plain"), quick(name), tmp_path, resume=resume, progress=progress)
        assert all(total == done for total, done in bars.values()), bars
        assert ("units: reconstruction" in bars) == (name != "rtn_w4a8"), "nearest codes need no run"
        assert resume or "calibration: sampling" in bars


@pytest.mark.parametrize("maintenance", ["none", "block", "cache", "selected"])
def test_a_schedule_of_one_step_works(sampler: Sampling, tmp_path: Path, maintenance: Any) -> None:
    drawn = sampler("plain")
    quantize(drawn, quick("w4a8", steps=1, temporal=Temporal(maintenance=maintenance)), tmp_path)
    assert len(drawn.denoiser.module.tfmq_steps.timesteps) == 1
    assert torch.isfinite(drawn.run(range(2), steps=1, seed=0)).all()


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_schedules_between_integers_are_calibrated_at_their_own_timesteps(
    sampler: Sampling, tmp_path: Path
) -> None:
    from diffusers import EulerDiscreteScheduler

    drawn = sampler("plain", scheduler=EulerDiscreteScheduler(num_train_timesteps=1000))
    outcome = quantize(drawn, quick("w8a8", steps=5), tmp_path)
    timesteps = drawn.denoiser.module.tfmq_steps.timesteps
    assert len(timesteps) == 5 and float(timesteps[1]) == 249.75
    assert outcome.disturbance.max_relative_error < 0.02, (
        "tables hold the features of these timesteps, not of rounded ones"
    )
    drawn.run(range(1), steps=5, seed=0)  # warns, hence fails, where a timestep were not a calibrated one


def test_other_schedules_run_with_one_warning(quantized: Made) -> None:
    drawn, _, _ = quantized("plain", "w4a8")
    with pytest.warns(UserWarning, match="was not calibrated") as caught:
        images = drawn.run(range(2), steps=7, seed=0)
    assert len(caught) == 1 and torch.isfinite(images).all()


def test_ranges_of_few_values_are_those_of_neighbouring_timesteps_with_a_word(
    sampler: Sampling, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three images of 8 by 8 pixels and 2 channels; temporal layers see one value, which is exact."""
    layers, pooled = [*SHAPES["plain"][:2], "embed", "stages.0.shift", "stages.1.shift"], {}
    for fewest in (0, 384, 385):
        caplog.clear()
        monkeypatch.setattr("tfmq.jobs.calibration.FEWEST_VALUES", fewest)
        with caplog.at_level("INFO", logger="tfmq"):
            recipe = quick("rtn_w8a8", activations=Activations(), steps=8)
            found = quantize(sampler("plain"), recipe, tmp_path / str(fewest)).pooled
        pooled[fewest] = {
            name: found[site] for name in layers if (site := f"{name}.input_quantizer") in found
        }
        assert ("up to 3 timesteps together" in caplog.text) == bool(found)
    assert pooled == {0: {}, 384: {}, 385: {"entry": 3}}


@pytest.mark.parametrize("name", ["down_blocks.1.resnets.0.conv2", "time_embedding.linear_2"])
def test_a_broken_layer_is_named_with_the_timestep(sampler: Sampling, tmp_path: Path, name: str) -> None:
    drawn = sampler("unet")
    drawn.denoiser.module.get_submodule(name).weight[0, 0] = torch.nan
    with pytest.raises(CalibrationError, match=rf"{name.replace('.', '[.]')} .*timestep 666\b"):
        quantize(drawn, quick("w4a8"), tmp_path)


def test_rules_keep_layers_in_full_precision_even_behind_a_table(sampler: Sampling, tmp_path: Path) -> None:
    rules = (
        Rule(match="stages.0.*", weights={"bits": None}),
        Rule(match="*.block", weights={"bits": 2}, activations={"bits": None}),
    )
    drawn = sampler("plain")
    before = drawn.denoiser.module.stages[0].block.weight.clone()
    quantize(drawn, quick("w4a8", rules=rules), tmp_path)
    packed = packed_layers(drawn.denoiser.module)
    assert packed and not any(name.startswith("stages.0.") for name in packed)
    assert torch.equal(drawn.denoiser.module.stages[0].block.weight, before)
    assert isinstance(drawn.denoiser.module.stages[0].shift, CachedFeature)
    assert packed["stages.1.block"].format.bits == 2 and packed["stages.1.block"].input_quantizer is None
    assert torch.isfinite(drawn.run(range(2), steps=3, seed=0)).all()


def test_calibration_and_evaluation_draw_other_noise(quantized: Made) -> None:
    drawn, _, directory = quantized("plain", "w4a8")
    calibrated = next(iter(CalibrationStore(directory / "calls"))).sample[0]
    seen: list[torch.Tensor] = []
    handle = drawn.denoiser.module.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["x"][0]), with_kwargs=True
    )
    drawn.run(range(1), steps=3, seed=0)
    handle.remove()
    assert not torch.equal(seen[0], calibrated)
