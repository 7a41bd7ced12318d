"""What cells of a table are measured against: a full-precision model's images and trajectory, made once; and
what measured them.
"""

import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import tfmq
from tfmq.calibration.store import CalibrationStore
from tfmq.calibration.trajectory import recorded_calls
from tfmq.evaluation.cost.system import describe_machine
from tfmq.evaluation.paired import PairedFidelity, paired_fidelity
from tfmq.evaluation.sampling import Images, draw
from tfmq.models.sampler import Sampler
from tfmq.numerics.errors import sqnr_db
from tfmq.progress import Progress
from tfmq.storage.atomic import atomic_write

# The noise of the measured images is none that calibration saw.
IMAGE_SEED = 1234
# Instructions that decide how fast integers are.
INTEGERS = ("avx_vnni", "avx512_vnni", "amx_int8", "asimddp", "i8mm")


@dataclass
class Reference:
    """The full-precision model's images and trajectory.

    Attributes:
        make: builds its sampler.
        directory: where images and trajectory stay.
        num_images, steps: of the images.
        trajectories: images of the trajectory, drawn as one batch.
        batch_size: images drawn at once.
        device: where the model runs.
        seed: of the images' noise.
    """

    make: Callable[[], Sampler]
    directory: Path
    num_images: int
    steps: int = 50
    trajectories: int = 16
    batch_size: int = 64
    device: str = "cpu"
    seed: int = IMAGE_SEED

    def fresh(self) -> Sampler:
        """Return a sampler of a new copy of the full-precision model."""
        sampler = self.make()
        sampler.denoiser.module.to(self.device)
        return sampler

    def prepare(self, progress: Progress) -> None:
        """Draw images and trajectory, where they are not there."""
        self.prepare_images(progress)
        self.store = CalibrationStore(self.directory / "trajectory")
        if len(self.store) != self.steps:
            self.store.clear()
            with recorded_calls(self.sampler.denoiser, self.store.append):
                self.sampler.run(range(self.trajectories), steps=self.steps, seed=IMAGE_SEED + 1)

    def prepare_images(self, progress: Progress) -> None:
        """Draw the images, where they are not there."""
        self.directory.mkdir(parents=True, exist_ok=True)
        self.sampler = self.fresh()
        path = self.directory / f"reference-{self.num_images}.npy"
        if not path.exists():
            drawn = self.draw(self.sampler, progress)
            with atomic_write(path) as temporary, temporary.open("wb") as file:
                np.save(file, drawn)
        self.images: Images = np.load(path)

    def draw(self, sampler: Sampler, progress: Progress) -> Images:
        """Draw the images with another model."""
        return draw(
            sampler,
            self.num_images,
            steps=self.steps,
            seed=self.seed,
            batch_size=self.batch_size,
            progress=progress,
        )

    def fidelity(self, images: Images) -> PairedFidelity:
        """Compare images with full precision's."""
        return paired_fidelity(self.images, images)

    @torch.no_grad()
    def output_sqnr(self, module: nn.Module) -> list[float]:
        """Return the SQNR in dB of the output of `module` at each step of the stored trajectory, from noise
        to image.
        """
        quantized = tfmq.Denoiser(module)
        calls = (inputs.map(lambda tensor: tensor.to(self.device)) for inputs in self.store)
        return [sqnr_db(self.sampler.denoiser(inputs), quantized(inputs)) for inputs in calls]


def machine() -> str:
    """Return the name of the processor, what it multiplies integers with, and on how many threads torch runs.

    Generations of one maker may share a name, and differ in the instructions.
    """
    found = describe_machine(torch.get_num_threads())
    integers = [flag for flag in found["instructions"] if flag in INTEGERS]
    return f"{found['processor']} ({', '.join(integers or ['no VNNI'])}), {found['threads']} threads"


def commit() -> str | None:
    """Return which commit of this checkout runs, `-dirty` where files differ; None where none is known."""
    if shutil.which("git") is None:
        return None
    told = subprocess.run(
        ("git", "describe", "--always", "--dirty", "--abbrev=7", "--exclude=*"),
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    return told.stdout.strip() or None


def environment(command: str) -> dict[str, Any]:
    """Return what figures were measured with."""
    return {
        "machine": machine(),
        "commit": commit(),
        "versions": {**describe_machine(torch.get_num_threads())["versions"], "tfmq": tfmq.__version__},
        "command": command,
    }
