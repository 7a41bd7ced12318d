"""Tiny pipelines on disk, a module of one's own, a recipe that takes seconds, and the command line run in
this process.
"""

import io
import json
import os
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

RECIPE = """\
name: quick
temporal: {learning: {iterations: 10, learning_rate: 0.01}}
learning: {iterations: 2, learning_rate: 0.01}
calibration: {samples: 2, steps: 4, interval: 2, batch_size: 2}
"""

# A file that gives samplers of a module which neither tfmq nor diffusers knows. It imports no diffusers,
# which takes a process seconds.
OWN = """
import neighbour
import tfmq
import torch
from torch import nn


class Moved:
    def __init__(self, prev_sample):
        self.prev_sample = prev_sample

    def __getitem__(self, number):
        return (self.prev_sample,)[number]


class Straight:
    def set_timesteps(self, count):
        self.timesteps = torch.linspace(999, 0, count + 1)[:-1].long()

    def step(self, output, timestep, sample, return_dict=True):
        return Moved(sample - output / len(self.timesteps))


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.classes, self.embed = nn.Embedding(4, 8), nn.Linear(8, 8)
        self.entry = nn.Conv2d(3, 8, 3, padding=1)
        self.middle = nn.Conv2d(8, 8, 3, padding=1)
        self.exit = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, noisy_pixels, when, kind):
        shift = self.embed(torch.sin(self.classes(kind) + when[:, None] / 1000))
        hidden = self.entry(noisy_pixels) + shift[:, :, None, None]
        return self.exit(torch.relu(self.middle(torch.relu(hidden))))


def build():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(neighbour.SEED)
        denoiser = tfmq.Denoiser(Own().eval(), sample="noisy_pixels", timestep="when")
    guidance = tfmq.Guidance(unconditional={"kind": torch.tensor([3])}, scale=2.0)
    kinds = {"kind": torch.tensor([0, 1, 2])}
    return tfmq.LoopSampler(denoiser, Straight(), shape=(3, 16, 16), per_image=kinds, guidance=guidance)


def other():
    made = build()
    made.denoiser.module.exit = nn.Conv2d(8, 3, 1)
    return made


def broken():
    raise RuntimeError("no weights at hand")


def number():
    return 4


KEPT = build()


def same():
    return KEPT
"""


class Result(NamedTuple):
    """How a run of the command line ended."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one JSON object on stdout; anything else there is an error."""
        return json.loads(self.out)


Run = Callable[..., Result]


class Compared(NamedTuple):
    """What `tfmq compare` wrote and printed of two images of the stream 2 by the simulated backend."""

    directory: Path
    json: Any


@pytest.fixture(autouse=True)
def no_word_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every work count as short: how long it takes is the machine's, and what tests read on stderr must
    not be.
    """
    monkeypatch.setattr("tfmq.cli.progress.SHORT", float("inf"))


@pytest.fixture
def tfmq(capsys: pytest.CaptureFixture[str]) -> Run:
    """Return a function that runs `tfmq` with its arguments."""

    def run_it(*arguments: object) -> Result:
        from tfmq.cli.commands import run

        capsys.readouterr()
        status = run([str(argument) for argument in arguments])
        return Result(status, *capsys.readouterr())

    return run_it


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """Return the environment of a child process that finds this tfmq and computes with one thread, as the
    tests do.
    """
    import tfmq

    path = os.pathsep.join(
        filter(None, [str(Path(tfmq.__file__).parent.parent), os.environ.get("PYTHONPATH")])
    )
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="session")
def command() -> list[str]:
    return [sys.executable, "-m", "tfmq"]


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "quick.yaml"
    path.write_text(RECIPE)
    return path


def save_unconditional(directory: Path, *, channels: int = 3, **changes: Any) -> Path:
    from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

    torch.manual_seed(0)
    shape = {
        "sample_size": 8,
        "in_channels": channels,
        "out_channels": channels,
        "block_out_channels": (8,),
        "layers_per_block": 1,
        "norm_num_groups": 4,
    }
    kinds = {
        "down_block_types": ("AttnDownBlock2D",),
        "up_block_types": ("UpBlock2D",),
        "attention_head_dim": 8,
    }
    unet = UNet2DModel(**{**shape, **kinds, **changes})
    DDIMPipeline(unet, DDIMScheduler()).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a tiny DDIM pipeline."""
    return save_unconditional(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def deeper_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a DDIM pipeline of two resolutions, with layers for the rules of published
    recipes.
    """
    kinds = {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    directory = tmp_path_factory.mktemp("models") / "deeper"
    return save_unconditional(directory, block_out_channels=(8, 16), **kinds)


@pytest.fixture(scope="session")
def grey_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a tiny DDIM pipeline of one channel."""
    return save_unconditional(tmp_path_factory.mktemp("models") / "grey", channels=1)


@pytest.fixture(scope="session")
def quantized(tmp_path_factory: pytest.TempPathFactory, model: Path, recipe: Path) -> Path:
    """Return the directory of the tiny pipeline quantized with the quick recipe; tests only read it."""
    import tfmq
    from tfmq.recipes.yaml import load

    directory = tmp_path_factory.mktemp("quantized") / "model"
    tfmq.quantize(str(model), load(recipe), output_dir=directory)
    return directory


@pytest.fixture(scope="session")
def printed() -> Callable[..., Any]:
    """Return a function that runs `tfmq` with its arguments and `--json`, and returns what it printed, for
    what tests share.
    """

    def run_it(*arguments: object) -> Any:
        from tfmq.cli.commands import run

        with redirect_stdout(io.StringIO()) as out:
            assert run([*map(str, arguments), "--json"]) == 0
        return json.loads(out.getvalue())

    return run_it


@pytest.fixture(scope="session")
def other_quantized(
    tmp_path_factory: pytest.TempPathFactory, model: Path, recipe: Path, printed: Callable[..., Any]
) -> Path:
    """Return what the verb makes of the tiny pipeline from another seed; tests only read it."""
    # Seeds are free: large ones too.
    directory = tmp_path_factory.mktemp("quantized") / "other"
    printed("quantize", model, "--recipe", recipe, "--seed", 2**31 - 1, "--output-dir", directory)
    return directory


@pytest.fixture(scope="session")
def compared(
    tmp_path_factory: pytest.TempPathFactory, model: Path, quantized: Path, printed: Callable[..., Any]
) -> Compared:
    """Return a comparison of the tiny pipeline with its original; tests only read it."""
    directory = tmp_path_factory.mktemp("compared") / "c"
    numbers = ("--num-images", 2, "--batch-size", 2, "--seed", 2, "--backend", "simulated")
    command = ("compare", quantized, "--reference", model, *numbers)
    return Compared(directory, printed(*command, "--output-dir", directory))


@pytest.fixture(scope="session")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the file of a module of one's own."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "neighbour.py").write_text("SEED = 3\n")
    (folder / "own.py").write_text(OWN)
    (folder / "damaged.py").write_text("import nothing_of_that_name\n")
    return folder


@pytest.fixture(scope="session")
def made(
    own: Path, recipe: Path, tmp_path_factory: pytest.TempPathFactory, printed: Callable[..., Any]
) -> Path:
    """Return what the verb makes of the module; tests only read it."""
    directory = tmp_path_factory.mktemp("made") / "q"
    module = f"{own / 'own.py'}:build"
    printed("quantize", "--module", module, "--recipe", recipe, "--output-dir", directory)
    return directory
