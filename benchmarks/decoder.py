"""How near quantized decoders come to float ones on the same latents, and what of them stays in float.

    python benchmarks/decoder.py --data ../shared/data

`text` is the decoder of the pipeline of that name, calibrated on the last latents of 32 images and measured
on those of 8 others. `taef2` is a tiny decoder that was trained for other latents, calibrated on 24
photographs and measured on 8 others. Of each the table has the decoder as it is, and one with a planted
outlier: a channel a thousand times as large, which the next layer divides again, so that the float images are
the same. PSNR is that of images in [0, 1], in the integers of the backend. It exits with 1 where a mean is
below 38 dB.
"""

import argparse
import io
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

import tfmq
from tfmq.calibration.store import CalibrationStore
from tfmq.calibration.trajectory import recorded_networks
from tfmq.jobs.job import Job
from tfmq.jobs.judging import psnr_db
from tfmq.jobs.networks import Recorded
from tfmq.jobs.workflow import Outcome, quantize_networks
from tfmq.models.denoiser import Timeless
from tfmq.storage.journal import Journal
from tfmq.targets import open_sampler

BAR_DB = 38.0
PLANTED = 1000.0
STEPS = 10


@dataclass(frozen=True)
class Case:
    """A decoder, what turns its output into images in [0, 1], the layer that an outlier is planted in and the
    one behind it, and latents to calibrate and to measure on.
    """

    name: str
    decoder: nn.Module
    scale: tuple[float, float]
    planted: tuple[str, str]
    calibrated: Tensor
    measured: Tensor

    def images(self, latents: Tensor) -> Tensor:
        """Return the images of latents."""
        factor, shift = self.scale
        with torch.no_grad():
            decoded = torch.cat([self.decoder(row) for row in latents.split(1)])
        return (decoded * factor + shift).clamp(0, 1)

    def plant(self) -> None:
        """Multiply a channel by `PLANTED`, and divide by it in the layer that reads it."""
        first, second = map(self.decoder.get_submodule, self.planted)
        with torch.no_grad():
            first.weight[0] *= PLANTED  # type: ignore[index, operator]
            if first.bias is not None:
                first.bias[0] *= PLANTED  # type: ignore[index, operator]
            second.weight[:, 0] /= PLANTED  # type: ignore[index, operator]


class Clamp(nn.Module):
    """What the tiny decoder does to latents first."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the latents within three."""
        return torch.tanh(x / 3) * 3


class Layers(nn.Module):
    """Layers one after the other."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Return what the last one makes of it."""
        made: Tensor = self.layers(x)
        return made


class Block(nn.Module):
    """Three convolutions and what they are added to; in the smallest resolution a pool in front."""

    def __init__(self, *, pool: bool) -> None:
        super().__init__()
        self.conv = nn.Sequential(_conv(), nn.ReLU(), _conv(), nn.ReLU(), _conv())
        layers = (nn.Conv2d(64, 256, 1, bias=False), nn.GroupNorm(4, 256), nn.ReLU())
        self.pool = nn.Sequential(*layers, nn.Conv2d(256, 64, 1, bias=False)) if pool else None

    def forward(self, x: Tensor) -> Tensor:
        """Return the features behind the block."""
        if self.pool is not None:
            x = x + self.pool(x)
        return torch.relu(self.conv(x) + x)


def _conv(inputs: int = 64, outputs: int = 64, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)


def tiny_halves(folder: Path) -> tuple[nn.Module, nn.Module]:
    """Return encoder and decoder of the tiny autoencoder (taesd, MIT)."""
    encoder: list[nn.Module] = [_conv(3)]
    decoder: list[nn.Module] = [Clamp(), _conv(32), nn.ReLU()]
    for level in range(4):
        if level:
            encoder.append(_conv(stride=2, bias=False))
            decoder += [nn.Upsample(scale_factor=2), _conv(bias=False)]
        encoder += [Block(pool=level == 3) for _ in range(3 if level else 1)]
        decoder += [Block(pool=level == 0) for _ in range(1 if level == 3 else 3)]
    halves = Layers([*encoder, _conv(64, 32)]), Layers([*decoder, _conv(64, 3)])
    for half, name in zip(halves, ("encoder", "decoder"), strict=True):
        half.layers.load_state_dict(load_file(folder / f"{name}.safetensors"))
        half.eval().requires_grad_(False)
    return halves


def photographs(archive: Path, count: int) -> Tensor:
    """Return photographs `[N, 3, 128, 128]` in [0, 1], enlarged."""
    with zipfile.ZipFile(archive) as files:
        names = sorted(name for name in files.namelist() if name.endswith(".jpg"))
        chosen = names[:: len(names) // count][:count]
        opened = [Image.open(io.BytesIO(files.read(name))).convert("RGB") for name in chosen]
    images = [np.asarray(image.resize((128, 128), Image.Resampling.BICUBIC)) for image in opened]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255


def of_text() -> Case:
    """Return the decoder of `text` with the latents that it is called with."""
    sampler = open_sampler("text")
    decoder, seen = sampler.pipeline.vae.decoder, []
    handle = decoder.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    for indices in (range(32), range(32, 40)):
        sampler.run(indices, steps=STEPS, seed=0)
    handle.remove()
    attention = "mid_block.attentions.0"
    layers = (f"{attention}.to_v", f"{attention}.to_out.0")
    return Case("text", decoder, (0.5, 0.5), layers, seen[0], seen[1])


def of_taef2(data: Path) -> Case:
    """Return the tiny decoder with latents of photographs."""
    encoder, decoder = tiny_halves(data / "taef2")
    with torch.no_grad():
        latents = encoder(photographs(data / "cifar10" / "test.zip", 32))
    return Case(
        "taef2", decoder, (1.0, 0.0), ("layers.14.conv.0", "layers.14.conv.2"), latents[:24], latents[24:]
    )


def quantized(case: Case) -> Outcome:
    """Quantize the decoder of a case, in place."""
    network = Timeless(case.decoder)
    with tempfile.TemporaryDirectory() as folder:
        store = CalibrationStore(Path(folder))
        with recorded_networks({case.name: network}, store):
            case.images(case.calibrated)
        job = Job(
            sampler=Recorded(network, store.of(case.name)),
            recipe=tfmq.scheme("w8a8"),
            store=store,
            journal=Journal(None, {}, resume=False),
            networks={case.name: network},
        )
        found = quantize_networks(job)[case.name]
    if isinstance(found, str):
        raise RuntimeError(f"{case.name} stays in floating point: {found}")
    return found


def row(case: Case, *, planted: bool, backend: str) -> float:
    """Quantize and measure a case, print its row and return the mean PSNR."""
    exact, began = case.images(case.measured), time.perf_counter()
    if planted:
        case.plant()
    outcome = quantized(case)
    seconds = time.perf_counter() - began
    tfmq.execute(case.decoder, backend)
    found = psnr_db(case.images(case.measured).double(), exact.double())
    assert outcome.spared is not None
    before, after = (-10 * np.log10(error) for error in (outcome.spared.before, outcome.spared.after))
    floats = ", ".join(outcome.spared.names) or "none"
    figures = (f"{value:.1f}" for value in (before, after, float(found.mean()), float(found.min())))
    cells = (case.name, "yes" if planted else "no", str(outcome.layers), floats, *figures, f"{seconds:.0f}")
    print(f"| {' | '.join(cells)} |", flush=True)
    return float(found.mean())


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="folder with taef2 and cifar10; without it text alone")
    parser.add_argument("--backend", default="torch")
    options = parser.parse_args()
    print(
        "| decoder | planted | quantized layers | in float | all quantized, dB | dB | PSNR | min | seconds |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    means = []
    for planted in (False, True):
        cases = [of_text()] + ([of_taef2(options.data)] if options.data else [])
        means += [row(case, planted=planted, backend=options.backend) for case in cases]
    sys.exit(min(means) < BAR_DB)


if __name__ == "__main__":
    main()
