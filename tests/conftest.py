"""Tiny random denoisers that the tests share, by name: stock diffusers models, a subclass with its own
attention, and a plain module.

Every test is seeded, hypothesis included. `TFMQ_TEST_SEED` is the seed, 0 if unset; `TFMQ_TEST_SEED=random`
draws one and prints it.
"""

import importlib.util
import os
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from xdist.scheduler import LoadScopeScheduling
from xdist.workermanage import WorkerController

from tfmq import stopwatch
from tfmq.errors import MissingExtraError
from tfmq.models.denoiser import Denoiser, Inputs
from tfmq.models.sampler import LoopSampler

# Triton reads it when a kernel is declared: kernels run in its interpreter, on the CPU.
os.environ.setdefault("TRITON_INTERPRET", "1")
# Torch's compiler reads these when it is imported. A graph compiles as fast without precompiled headers,
# whose making takes longer than a graph; that the C++ compiler knows what the processor does need not be
# tried out, and nobody debugs what it makes.
os.environ.setdefault("TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS", "0")
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
os.environ.setdefault("AOT_INDUCTOR_ENABLE_LINE_TABLES", "0")
# The models are so small that a second thread only waits, here and in the processes that tests start.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Every job foretells its time from calls that it repeats for so long. Here nobody waits for that.
stopwatch.LOOKED = 2**-6
hypothesis.settings.register_profile("tfmq", deadline=None, max_examples=40, derandomize=True)
hypothesis.settings.load_profile("tfmq")
# Written back, so that the workers of pytest-xdist take the seed that was drawn here.
if os.environ.get("TFMQ_TEST_SEED") == "random":
    os.environ["TFMQ_TEST_SEED"] = str(random.SystemRandom().randrange(2**31))
SEED = int(os.environ.get("TFMQ_TEST_SEED", "0"))

Build = Callable[..., tuple[Denoiser, Inputs]]
Script = Callable[[str], ModuleType]
ROOT = Path(__file__).resolve().parent.parent


class TorchGenerator:
    """torch's global generator as hypothesis wants it, which seeds and restores it around each example: a
    failing one fails when it is replayed.
    """

    def seed(self, seed: int) -> None:
        # `torch.manual_seed` sees to devices too, for longer than many an example takes.
        torch.default_generator.manual_seed(SEED + seed)

    def getstate(self) -> Tensor:
        return torch.get_rng_state()

    def setstate(self, state: Tensor) -> None:
        torch.set_rng_state(state)


TORCH = TorchGenerator()
hypothesis.register_random(TORCH)


@contextmanager
def seeded() -> Iterator[None]:
    """Seed the generators of torch, numpy and Python, and give them back as they were."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)
    # `tfmq bench` leaves another number: all tests after it would wait for it, and sums in threads have other
    # last bits.
    torch.set_num_threads(1)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[pytest.CollectReport]:
    """Seed what a file draws when it is imported, so that it does not depend on the files before it."""
    with seeded():
        return (yield)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if SEED:
        terminalreporter.write_line(f"TFMQ_TEST_SEED={SEED}")


# What takes most of the processor, most first: begun last, it would leave one worker of pytest-xdist alone.
SLOW = (
    *(
        "tests/quality",
        "tests/families",
        "tests/backends/test_graph",
        "tests/backends/test_trajectory",
        "tests/cluster",
        "tests/kernels/gpu/test_compile",
        "tests/test_memory",
    ),
    *("tests/cli", "tests/integrations", "tests/jobs"),
)
# Folders whose tests share what takes long to make: one worker makes it.
SHARED = ("tests/families", "tests/cluster")


class ByFile(LoadScopeScheduling):
    """Gives a worker a file at a time, or one of the folders `SHARED`.

    pytest-xdist 3.8 has `--dist loadgroup` for that. With pytest 9.2 it does nothing and does not say so.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return next((name for name in SHARED if file.startswith(name)), file)

    def _reschedule(self, node: WorkerController) -> None:
        # A worker begins a test once it has the next one. xdist gives one more file whenever a test ends; who
        # replaces a crashed worker would wait for ever, given a file that was done or that has one test.
        queued = -1
        while queued != len(self.workqueue):
            queued = len(self.workqueue)
            super()._reschedule(node)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    return ByFile(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Let workers begin with slow files; with another seed than 0 let hypothesis draw others than its own
    examples of a test.
    """
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: [*(item.nodeid.startswith(name) for name in SLOW), True].index(True))
    for item in items:
        if SEED and isinstance(item, pytest.Function) and hypothesis.is_hypothesis_test(item.obj):
            hypothesis.seed(SEED)(item.obj)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[Any]) -> Iterator[Any]:
    """Seed what tests share, so that it does not depend on the test that asks first."""
    if fixturedef.scope == "function":
        return (yield)
    with seeded():
        return (yield)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """Refuse what `--doctest-ignore-import-errors`, meant for optional dependencies of the sources, would
    hide: tests that cannot be imported.
    """
    if (
        report.skipped
        and report.nodeid.startswith("tests/")
        and "unable to import module" in str(report.longrepr)
    ):
        raise pytest.UsageError(
            f"{report.nodeid} cannot be imported; see why with: pytest -o "
            f"addopts=--import-mode=importlib {report.nodeid}"
        )


class Mixer(nn.Module):
    """A residual block whose convolution happens to be called `block`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.block = nn.Conv2d(width, width, 3, padding=1)
        self.shift = nn.Linear(16, width)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return x + self.block(F.silu(x + self.shift(embedding)[:, :, None, None]))


class PlainDenoiser(nn.Module):
    """No class or name of diffusers: arguments `x` and `t`, attention computed in its own forward, a skip
    read by the last layer.
    """

    def __init__(self, channels: int = 2) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.tensor([1.0, 0.3, 0.1, 0.03]))
        self.embed = nn.Linear(8, 16)
        self.entry = nn.Conv2d(channels, 8, 3, padding=1)
        self.stages = nn.ModuleList([Mixer(8), Mixer(8)])
        self.exit = nn.Conv2d(16, channels, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        phases = t[:, None] * self.frequencies
        embedding = F.silu(self.embed(torch.cat([phases.sin(), phases.cos()], dim=1)))
        hidden = entry = self.entry(x)
        for stage in self.stages:
            hidden = stage(hidden, embedding)
        tokens = hidden.flatten(2).transpose(1, 2)
        weights = torch.softmax(torch.matmul(tokens, tokens.transpose(1, 2)) / 8, dim=-1)
        hidden = hidden + (weights @ tokens).transpose(1, 2).reshape(hidden.shape)
        return self.exit(torch.cat([hidden, entry], dim=1))


class Upsampler(nn.Module):
    """A plain module that is small in the middle: a transposed convolution up again, an embedding of labels,
    a norm with weights.
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.tensor([1.0, 0.3, 0.1, 0.03]))
        self.embed = nn.Linear(8, 16)
        self.labels = nn.Embedding(10, 16)
        self.entry = nn.Conv2d(2, 8, 4, stride=2, padding=1)
        self.shift = nn.Linear(16, 8)
        self.norm = nn.GroupNorm(2, 8)
        self.up = nn.ConvTranspose2d(8, 8, 4, stride=2, padding=1)
        self.exit = nn.Conv2d(10, 2, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor) -> Tensor:
        phases = t[:, None] * self.frequencies
        embedding = F.silu(
            self.embed(torch.cat([phases.sin(), phases.cos()], dim=1)) + self.labels(class_labels)
        )
        hidden = F.silu(self.norm(self.entry(x) + self.shift(embedding)[:, :, None, None]))
        return self.exit(torch.cat([self.up(hidden), x], dim=1))


class AttendingUpsampler(Upsampler):
    """One with a layer of each kind that compiled graphs treat apart, so that one graph serves for all: with
    attention in the middle, where labels come in, so that a table can hold the features of a timestep.
    """

    def __init__(self) -> None:
        super().__init__()
        self.labels = nn.Embedding(10, 8)
        self.middle = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor) -> Tensor:
        phases = t[:, None] * self.frequencies
        embedding = F.silu(self.embed(torch.cat([phases.sin(), phases.cos()], dim=1)))
        hidden = F.silu(self.norm(self.entry(x)) + 3 * self.shift(embedding)[:, :, None, None])
        hidden = self.middle(hidden) + self.labels(class_labels)[:, :, None, None]
        tokens = hidden.flatten(2).transpose(1, 2)
        weights = torch.softmax(torch.matmul(tokens, tokens.transpose(1, 2)) / 8, dim=-1)
        hidden = hidden + (weights @ tokens).transpose(1, 2).reshape(hidden.shape)
        return self.exit(torch.cat([self.up(hidden), x], dim=1))


class ResidualAfterNorm:
    """An attention processor in terms of `torch.baddbmm` and `torch.einsum`, whose residual is the normalised
    input.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Any = None,
        attention_mask: Any = None,
        temb: Any = None,
    ) -> Tensor:
        batch, channels, height, width = hidden_states.shape
        normed = attn.group_norm(hidden_states)
        tokens = normed.view(batch, channels, height * width).transpose(1, 2)
        query, key, value = attn.to_q(tokens), attn.to_k(tokens), attn.to_v(tokens)
        scores = torch.baddbmm(query.new_zeros(1), query, key.transpose(1, 2), beta=0, alpha=channels**-0.5)
        out = attn.to_out[0](torch.einsum("bij,bjd->bid", torch.softmax(scores, dim=-1), value))
        return out.transpose(1, 2).reshape(batch, channels, height, width) + normed


def _unet(**changes: Any) -> nn.Module:
    from diffusers import UNet2DModel

    shape = {
        "sample_size": 8,
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
    }
    kinds = {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 8,
    }
    return UNet2DModel(**shape, **kinds, **changes)


def _own_attention() -> nn.Module:
    from diffusers import UNet2DModel
    from diffusers.models.embeddings import TimestepEmbedding, Timesteps

    class OwnUNet(UNet2DModel):
        """A subclass: its own width of the sinusoid and of the time embedding, and its own attention."""

    model = OwnUNet(**{key: value for key, value in _unet().config.items() if not key.startswith("_")})
    model.time_proj = Timesteps(12, False, 1)
    model.time_embedding = TimestepEmbedding(12, 32)
    for module in model.modules():
        if type(module).__name__ == "Attention":
            module.set_processor(ResidualAfterNorm())
    return model


def _conditional(**changes: Any) -> nn.Module:
    from diffusers import UNet2DConditionModel

    shape = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
    }
    kinds = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    return UNet2DConditionModel(**shape, **kinds, cross_attention_dim=8, attention_head_dim=2, **changes)


def _dit() -> nn.Module:
    from diffusers import DiTTransformer2DModel

    heads = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_layers": 2,
        "num_embeds_ada_norm": 10,
        "norm_num_groups": 4,
    }
    return DiTTransformer2DModel(in_channels=4, out_channels=4, sample_size=8, patch_size=2, **heads)


def _sd3() -> nn.Module:
    from diffusers import SD3Transformer2DModel

    heads = {
        "num_attention_heads": 2,
        "attention_head_dim": 4,
        "num_layers": 2,
        "caption_projection_dim": 8,
        "joint_attention_dim": 8,
    }
    size = {"sample_size": 8, "patch_size": 2, "pos_embed_max_size": 8}
    return SD3Transformer2DModel(in_channels=4, out_channels=4, pooled_projection_dim=8, **heads, **size)


_SDXL = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 32,
}
MODELS: dict[str, tuple[Callable[[], nn.Module], int, tuple[str, ...]]] = {
    "unet": (_unet, 3, ()),
    "own_attention": (_own_attention, 3, ()),
    "conditional": (_conditional, 4, ("prompt",)),
    "class_conditional": (lambda: _conditional(num_class_embeds=10), 4, ("prompt", "label")),
    "sdxl": (lambda: _conditional(**_SDXL), 4, ("prompt", "added")),
    "dit": (_dit, 4, ("label",)),
    "sd3": (_sd3, 4, ("prompt", "pooled")),
    "plain": (PlainDenoiser, 2, ()),
    # The cheapest model whose samples are images.
    "plain_rgb": (lambda: PlainDenoiser(3), 3, ()),
    "upsampler": (Upsampler, 2, ("label",)),
    "attending_upsampler": (AttendingUpsampler, 2, ("label",)),
}


def _conditions(kinds: tuple[str, ...]) -> dict[str, Any]:
    values: dict[str, dict[str, Any]] = {
        "prompt": {"encoder_hidden_states": torch.randn(1, 5, 8)},
        "label": {"class_labels": torch.tensor([3])},
        "pooled": {"pooled_projections": torch.randn(1, 8)},
        "added": {"added_cond_kwargs": {"text_embeds": torch.randn(1, 8), "time_ids": torch.randn(1, 6)}},
    }
    return {name: value for kind in kinds for name, value in values[kind].items()}


def tiny(name: str, *, seed: int = 0) -> tuple[Denoiser, Inputs]:
    """Return the model of a name with one call's inputs, always with the same random weights for the same
    seed.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED + seed)
        factory, channels, kinds = MODELS[name]
        module = factory().eval().requires_grad_(False)
        inputs = Inputs(torch.randn(1, channels, 8, 8), torch.tensor([5]), _conditions(kinds))
    return Denoiser(module), inputs


def tiny_sampler(name: str = "unet", *, seed: int = 0, scheduler: Any = None) -> LoopSampler:
    """Return a DDIM sampler of the model of a name."""
    from diffusers import DDIMScheduler

    denoiser, inputs = tiny(name, seed=seed)
    return LoopSampler(
        denoiser,
        scheduler or DDIMScheduler(),
        shape=tuple(inputs.sample.shape[1:]),
        conditions=inputs.conditions,
    )


def load_script(path: str) -> ModuleType:
    """Return a script of the project, such as "benchmarks/planted.py", as a module of its own."""
    spec = importlib.util.spec_from_file_location(path.removesuffix(".py").replace("/", "_"), ROOT / path)
    assert spec is not None and spec.loader is not None
    # Annotations of a NamedTuple are looked up in the module that defines it.
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def script() -> Script:
    """Return `load_script`."""
    return load_script


@pytest.fixture(scope="session")
def build() -> Build:
    """Return `tiny`."""
    return tiny


@pytest.fixture(scope="session")
def sampler() -> Callable[..., LoopSampler]:
    """Return `tiny_sampler`."""
    return tiny_sampler


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> str:
    """Return the name of a backend that a test is parametrized with, `indirect`; skip the test where the
    machine or the installation lacks what the backend needs.
    """
    from tfmq.backends.backend import BACKENDS

    name: str = request.param
    try:
        lacking = BACKENDS[name].missing() if name in BACKENDS else ""
    except MissingExtraError as error:
        lacking = str(error)
    if lacking:
        pytest.skip(lacking)
    return name


@pytest.fixture(autouse=True)
def _unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let "auto" choose `torch` where there is one, whatever else this machine does;
    `tests/backends/test_auto.py` has a clock of its own.
    """
    from tfmq.backends.measuring import Race

    def settled(names: Any, enter: Any, leave: Any) -> Race:
        return Race({name: 1.0 if name == "torch" else 2.0 for name in names})

    monkeypatch.setattr("tfmq.backends.auto.race", settled)
    monkeypatch.setattr("tfmq.backends.auto.AutoExecutor._stored", lambda *_: None)


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    with seeded():
        yield
