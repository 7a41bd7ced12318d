"""Train the embedded default model: a small unconditional DDPM that draws hand-written digits in colour,
32x32.

    python examples/train_default_model.py --digits mnist/t10k-images-idx3-ubyte.gz --output-dir runs/default

The images are the 10 000 digits of the MNIST test set (LeCun and Cortes; CC BY-SA 3.0), drawn in chalk on a
new random colour gradient every time one is seen. The network predicts the velocity v = alpha * noise - sigma
* image (Salimans and Ho, 2022, appendix D) with equal weights over time: where the noise hides nearly
everything, the shape of a digit is decided, and a prediction of the noise hardly sees it. Cosine schedule,
AdamW, warm-up then a constant rate that falls linearly to zero over the last `--decay` share of the steps,
exponential moving average of the weights. The run directory holds everything needed to go on after a kill; a
longer `--steps` continues the same run. `export/` under it is the pipeline that the package embeds.
"""

import argparse
import gzip
import json
import os
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

SIZE = 32


def read_digits(path: Path) -> torch.Tensor:
    """Return the images of a gzipped IDX file as float `[N, 1, 32, 32]` in [0, 1], padded from 28x28."""
    raw = gzip.decompress(path.read_bytes())
    magic, count, height, width = np.frombuffer(raw, ">i4", count=4)
    if magic != 2051:
        raise SystemExit(f"{path} is not an IDX file of images (magic number {magic}, expected 2051)")
    digits = (
        torch.from_numpy(
            np.frombuffer(raw, np.uint8, offset=16).reshape(count, 1, height, width).astype(np.float32)
        )
        / 255
    )
    return torch.nn.functional.pad(digits, [(SIZE - int(width)) // 2] * 2 + [(SIZE - int(height)) // 2] * 2)


def colour(digits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Draw digits `[B, 1, H, W]` in nearly white chalk on a gradient between two darker colours; returns `[B,
    3, H, W]` in [-1, 1].
    """
    size = len(digits)
    ground = torch.rand(size, 2, 3, generator=generator) * 1.3 - 1
    ink = torch.rand(size, 3, generator=generator) * 0.2 + 0.8
    angle = torch.rand(size, 1, 1, generator=generator) * 2 * np.pi
    axis = torch.linspace(-1, 1, SIZE)
    ramp = (axis[None, :, None] * angle.sin() + axis[None, None, :] * angle.cos()) / 2**0.5 / 2 + 0.5
    back = ground[:, 0, :, None, None].lerp(ground[:, 1, :, None, None], ramp[:, None])
    return back.lerp(ink[:, :, None, None].expand_as(back), digits)


def build_unet() -> UNet2DModel:
    """The architecture: four resolutions, one residual block each, attention at 8x8 and 4x4."""
    return UNet2DModel(
        sample_size=SIZE,
        in_channels=3,
        out_channels=3,
        block_out_channels=(24, 48, 96, 144),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        norm_eps=1e-6,
        attention_head_dim=None,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
    )


def build_scheduler() -> DDIMScheduler:
    """Thousand training steps, cosine betas, velocity prediction; the predicted image is clipped while
    sampling.
    """
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        clip_sample=True,
        timestep_spacing="trailing",
    )


def learning_rate(step: int, steps: int, peak: float, warmup: int, decay: float) -> float:
    """Warm-up, constant, then linear to zero over the last `decay` share of `steps`."""
    tail = max(1, int(steps * decay))
    return peak * min(1.0, (step + 1) / warmup, (steps - step) / tail)


def save_state(
    directory: Path, step: int, unet: UNet2DModel, ema: dict, optimizer: torch.optim.AdamW
) -> None:
    """Write weights, moving average and Adam moments in one atomic file."""
    names = dict(unet.named_parameters())
    tensors = {f"model.{k}": v.detach().contiguous() for k, v in names.items()} | {
        f"ema.{k}": v.contiguous() for k, v in ema.items()
    }
    for name, parameter in names.items():
        for moment in ("exp_avg", "exp_avg_sq"):
            tensors[f"{moment}.{name}"] = optimizer.state[parameter][moment].contiguous()
    partial = directory / "state.partial"
    save_file(tensors, partial, metadata={"step": str(step)})
    os.replace(partial, directory / "state.safetensors")


def load_state(directory: Path, unet: UNet2DModel, ema: dict, optimizer: torch.optim.AdamW) -> int:
    """Restore a run in place and return the next step; 0 where there is nothing to restore."""
    path = directory / "state.safetensors"
    if not path.exists():
        return 0
    with safe_open(path, framework="pt") as file:
        step = int(file.metadata()["step"])
    tensors = load_file(path)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            parameter.copy_(tensors[f"model.{name}"])
            ema[name].copy_(tensors[f"ema.{name}"])
            moments = {m: tensors[f"{m}.{name}"].to(parameter.device) for m in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {"step": torch.tensor(float(step)), **moments}
    return step


def export(directory: Path, ema: dict, num_images: int = 64) -> None:
    """Save the moving average as an fp16 pipeline and draw a grid of samples from it."""
    unet = build_unet()
    unet.load_state_dict({name: value.cpu() for name, value in ema.items()}, strict=True)
    pipeline = DDIMPipeline(unet=unet.eval(), scheduler=build_scheduler())
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        batch_size=num_images,
        generator=torch.Generator().manual_seed(0),
        num_inference_steps=50,
        output_type="np",
    ).images
    side = int(num_images**0.5)
    grid = (
        images.reshape(side, side, SIZE, SIZE, 3)
        .transpose(0, 2, 1, 3, 4)
        .reshape(side * SIZE, side * SIZE, 3)
    )
    Image.fromarray((grid * 255).round().astype(np.uint8)).resize((side * SIZE * 2,) * 2, Image.NEAREST).save(
        directory / "samples.png"
    )
    pipeline.to(torch.float16).save_pretrained(directory / "export")


def train(options: argparse.Namespace) -> None:
    directory = options.output_dir
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "options.json").write_text(
        json.dumps(vars(options) | {"digits": options.digits.name, "output_dir": ""}, indent=1)
    )
    data = read_digits(options.digits)
    torch.manual_seed(options.seed)
    unet = build_unet().to(options.device, memory_format=torch.channels_last)
    ema = {name: p.detach().clone() for name, p in unet.named_parameters()}
    optimizer = torch.optim.AdamW(
        unet.parameters(), lr=options.learning_rate, betas=(0.9, 0.99), weight_decay=0.0
    )
    start = load_state(directory, unet, ema, optimizer)
    forward = torch.compile(unet) if options.compile else unet
    alphas = build_scheduler().alphas_cumprod.to(options.device)
    began, losses = time.time(), []
    for step in range(start, options.steps):
        generator = torch.Generator().manual_seed(options.seed * 1_000_003 + step)
        index = torch.randint(len(data), (options.batch_size,), generator=generator)
        images = colour(data[index], generator).to(options.device)
        # Drawn on the CPU, so that a step sees the same noise on any device.
        timesteps = torch.randint(1000, (options.batch_size,), generator=generator).to(options.device)
        noise = torch.randn(images.shape, generator=generator).to(options.device)
        level = alphas[timesteps].view(-1, 1, 1, 1)
        noisy = (level.sqrt() * images + (1 - level).sqrt() * noise).contiguous(
            memory_format=torch.channels_last
        )
        velocity = level.sqrt() * noise - (1 - level).sqrt() * images
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, options.steps, options.learning_rate, 500, options.decay)
        with torch.autocast(torch.device(options.device).type, torch.bfloat16, enabled=options.bf16):
            loss = (forward(noisy, timesteps).sample.float() - velocity).square().mean()
        if not torch.isfinite(loss):
            raise SystemExit(f"step {step}: the loss is {loss.item()}; lower --learning-rate")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        rate = min(options.ema, (step + 1) / (step + 20))
        for name, parameter in unet.named_parameters():
            ema[name].lerp_(parameter.detach(), 1 - rate)
        losses.append(loss.item())
        if (step + 1) % 100 == 0:
            speed = (step + 1 - start) * options.batch_size / (time.time() - began)
            line = {"step": step + 1, "loss": float(np.mean(losses)), "images_per_second": round(speed, 1)}
            losses.clear()
            with (directory / "log.jsonl").open("a") as log:
                log.write(json.dumps(line) + "\n")
            print(line, flush=True)
        if (step + 1) % options.save_every == 0 or step + 1 == options.steps:
            save_state(directory, step + 1, unet, ema, optimizer)
            export(directory, ema)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--digits", type=Path, required=True, help="gzipped IDX file of 28x28 digits")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=9_000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=8e-4)
    parser.add_argument(
        "--decay", type=float, default=0.4, help="share of the steps over which the rate falls to zero"
    )
    parser.add_argument("--ema", type=float, default=0.999)
    parser.add_argument("--save-every", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
