"""Tiny pipelines on disk, a recipe that takes seconds, and the command line run in this process."""

import json
import os
import sys
from collections.abc import Callable
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
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
    }
    kinds = {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 8,
    }
    unet = UNet2DModel(**shape, **kinds, norm_num_groups=4, **changes)
    DDIMPipeline(unet, DDIMScheduler()).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a tiny DDIM pipeline."""
    return save_unconditional(tmp_path_factory.mktemp("models") / "tiny")


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
