"""What a quantized model loses in the single files of others, which have no place for all of it.

    tfmq quantize text --output-dir text-w4a8 --scheme w4a8 --components denoiser
    python benchmarks/format_cost.py text-w4a8 --base text --steps 20 --guidance 3

Each model is written as ComfyUI's file and as one of GGUF, and these are read again with the other parts of
`base`. Images from the same noise: PSNR to `base` in full precision, mean and standard error, and median, of
the model as it is and of each file, and the difference to the model image by image. Bytes are those of the
denoiser's weights. Milliseconds are those of a call of the denoiser for one image in OpenVINO, on one thread,
medians of turns while the machine does nothing else.
"""

import argparse
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from short import with_error

import tfmq
from tfmq.backends.backend import Options
from tfmq.evaluation.cost.system import describe_machine, foreign_seconds, machine_in_words
from tfmq.evaluation.cost.timing import interleaved, timed
from tfmq.evaluation.paired import psnr
from tfmq.integrations.diffusers.original.comfy_out import export_comfy
from tfmq.integrations.diffusers.original.gguf_out import export_gguf
from tfmq.integrations.diffusers.original.single_file import open_single_file
from tfmq.targets import named_directory

PROMPTS = Path(__file__).parent / "prompts" / "scenes.txt"
# Seconds of a turn, in which a call is repeated.
TURN = 0.2
FILES: dict[str, Callable[[Any, Path], dict[str, Any]]] = {"comfy": export_comfy, "gguf": export_gguf}


def images(pipeline: DiffusionPipeline, base: Path, options: argparse.Namespace) -> np.ndarray:
    """Return images of the first prompts at the size of `base`, which a file does not say, uint8
    `[N, H, W, 3]`.
    """
    prompts = PROMPTS.read_text(encoding="utf-8").splitlines()[: options.images]
    config = UNet2DConditionModel.load_config(base / "unet")
    shape = (options.images, config["in_channels"], config["sample_size"], config["sample_size"])
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(options.seed))
    pipeline.set_progress_bar_config(disable=True)
    call = {
        "num_inference_steps": options.steps,
        "guidance_scale": options.guidance,
        # Some schedulers add noise at every step.
        "generator": torch.Generator().manual_seed(options.seed + 1),
    }
    return np.stack([np.asarray(image) for image in pipeline(prompts, latents=noise, **call).images])


def from_file(kind: str, model: Any, base: Path) -> tuple[Any, int]:
    """Return the denoiser of a model's file, and the bytes of the file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / FILES[kind](model, Path(folder))["files"][0]
        unet, size = open_single_file(path, base=base).unet, path.stat().st_size
    tfmq.execute(unet, "simulated")
    return unet, size


@torch.no_grad()
def milliseconds(unets: Mapping[str, Any], rounds: int) -> dict[str, float]:
    """Return how long a call of each of these takes."""
    config, generator = unets["tfmq"].config, torch.Generator().manual_seed(0)
    size = config["sample_size"]
    sample = torch.randn(1, config["in_channels"], size, size, generator=generator)
    text = torch.randn(1, 77, config["cross_attention_dim"], generator=generator)
    turns = {}
    for name, unet in unets.items():
        tfmq.execute(unet, "openvino", options=Options(threads=1))
        call = partial(unet, sample, torch.tensor(500), text)
        call()
        turns[name] = partial(timed, call, seconds=TURN, busy=foreign_seconds)
    found = interleaved(turns, rounds=rounds, advance=lambda amount=1: None)
    return {name: 1e3 * timing.seconds for name, timing in found.items()}


def main() -> None:
    """Print a table of the models and their files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", type=Path, nargs="+", metavar="MODEL")
    parser.add_argument("--base", default="text", help="the model in full precision: a name or a directory")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=4711)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    base = named_directory(options.base) or Path(options.base)
    exact = images(DiffusionPipeline.from_pretrained(base, torch_dtype=torch.float32), base, options)
    print(machine_in_words(describe_machine(torch.get_num_threads())))
    print("| model | file | bytes | ms | PSNR (dB) | median | to the model (dB) |")
    print("|---|---|---|---|---|---|---|")
    for directory in options.models:
        pipeline = DiffusionPipeline.from_pretrained(base, torch_dtype=torch.float32)
        pipeline.unet = model = tfmq.load(directory, backend="simulated").unet
        weights = (directory / "unet").glob("*.safetensors")
        rows = {"tfmq": (model, sum(path.stat().st_size for path in weights))}
        rows |= {kind: from_file(kind, model, base) for kind in FILES}
        found = []
        for unet, _ in rows.values():
            pipeline.unet = unet
            found.append(psnr(exact, images(pipeline, base, options)))
        times = milliseconds({kind: unet for kind, (unet, _) in rows.items()}, options.rounds)
        for (kind, (_, size)), values in zip(rows.items(), found, strict=True):
            to_model = "" if kind == "tfmq" else with_error(values - found[0], sign=True)
            print(
                f"| {directory.name} | {kind} | {size} | {times[kind]:.1f} | {with_error(values)} "
                f"| {np.median(values):.2f} | {to_model} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
