"""How long a picture takes from its prompt to its pixels, by everything that draws it.

    python benchmarks/pipeline.py --output pipeline.json
    python benchmarks/pipeline.py --model text --steps 4,20 --rounds 5

`sd15` is Stable Diffusion 1.5's pipeline at its real size with random weights: text encoder, UNet, decoder,
512x512 pixels. It is made in `--work`, quantized there by the scheme `quick_w8a8`, and both stay for the next
run. Its decoder has no bound on its error: with random weights there is no picture to keep. Any directory of
a text-to-image pipeline can take its place; `text` is the project's own.

Every variant is a process of its own. They take turns: a round is one picture of each, for 1 and 4 steps
without guidance and 20 steps with it. Medians; ratios are those of pictures of the same round. `first` is the
first picture of a process that finds nothing on disk, `later` that of one that finds what the first has
converted and compiled, both from the start of the process. optimum-intel needs an older transformers than
tfmq's: `--peers PYTHON` is an interpreter that has it; without one its rows are left out, with a word.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from painter import VARIANTS, Job

import tfmq
from tfmq.evaluation.cost.process import Child, WorkerError
from tfmq.evaluation.cost.system import describe_machine
from tfmq.evaluation.paired import psnr
from tfmq.recipes.networks import image_w8a8
from tfmq.recipes.recipe import Recipe, Tolerance
from tfmq.recipes.yaml import dumps
from tfmq.storage.atomic import write_json
from tfmq.targets import named_directory

PAINTER = Path(__file__).with_name("painter.py")
FULL = "diffusers float32"
PEERS = "optimum-intel"
# Number of denoising steps and guidance scale of a picture.
PICTURES = {"1": (1, 0.0), "4": (4, 0.0), "20": (20, 7.5)}


def make_sd15(directory: Path) -> None:
    """Write a pipeline of Stable Diffusion 1.5's sizes, in half precision, with seeded random weights.

    The vocabulary is that of `text`: a tokenizer takes no time and no memory, whatever it knows.
    """
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(f"{named_directory('text')}/tokenizer", model_max_length=77)
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    words = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        projection_dim=768,
        **special,
    )
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    vae = diffusers.AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=512, **blocks
    )
    noise = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    diffusers.StableDiffusionPipeline(
        vae.half(),
        CLIPTextModel(words).half(),
        tokenizer,
        diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768).half(),
        diffusers.DDIMScheduler(**noise, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(directory)


def recipe_of(scheme: str, *, bounded: bool) -> Recipe:
    """Return the recipe of a scheme; without bounds every layer of a decoder is quantized."""
    recipe = tfmq.scheme(scheme)
    free = replace(image_w8a8(), tolerance=Tolerance())
    return recipe if bounded else replace(recipe, components={"vae.decoder": free})


def quantized(
    original: Path, directory: Path, recipe: Recipe, *, steps: int, prompts: Path
) -> dict[str, Any] | None:
    """Quantize a pipeline unless that is done already, and return what that took."""
    if directory.exists():
        return None
    began, file = time.perf_counter(), directory.with_name("recipe.yaml")
    file.write_text(dumps(recipe), encoding="utf-8")
    command = [sys.executable, "-m", "tfmq", "quantize", str(original), "--recipe", str(file)]
    command += ["--steps", str(steps), "--prompts", str(prompts), "--output-dir", str(directory), "--resume"]
    subprocess.run(command, check=True)
    return {"recipe": recipe.name, "steps": steps, "seconds": time.perf_counter() - began}


class Painter(Child):
    """The other end of `painter.py`."""

    def __init__(self, job: Job, python: str, log: Path) -> None:
        self.began = time.perf_counter()
        super().__init__([python, str(PAINTER), json.dumps(asdict(job))], log=log)

    def __enter__(self) -> "Painter":
        super().__enter__()
        # It says when it is ready.
        self.answer()
        return self

    def draw(self, steps: int, guidance: float, path: Path) -> dict[str, Any]:
        """Ask for one picture."""
        return self.ask(steps=steps, guidance=guidance, path=str(path))


@dataclass
class Row:
    """What was measured of a variant: seconds to the first picture (see above), bytes, and by kind of picture
    the seconds of each round, those of the parts, and the distance to full precision's picture.
    """

    variant: str
    bytes_on_disk: int
    first: float = 0.0
    later: float = 0.0
    peak_bytes: int = 0
    seconds: dict[str, list[float]] = field(default_factory=dict)
    parts: dict[str, dict[str, float]] = field(default_factory=dict)
    psnr: dict[str, float] = field(default_factory=dict)


def bytes_below(directory: Path) -> int:
    """Return the size of a directory's files, caches of compiled models left out."""
    files = (file for file in directory.rglob("*") if file.is_file() and "cache" not in file.parts)
    return sum(file.stat().st_size for file in files)


def psnr_of(one: Path, two: Path) -> float:
    """Return dB between two pictures in [0, 1]."""
    return float(psnr(255 * np.load(one)[None], 255 * np.load(two)[None])[0])


def measure(
    jobs: Sequence[tuple[Job, str]], kinds: Sequence[str], *, rounds: int, work: Path
) -> tuple[list[Row], dict[str, str]]:
    """Return a row for each job that its interpreter can do, and why others cannot."""
    rows: dict[str, Row] = {}
    absent: dict[str, str] = {}
    with ExitStack() as stack:
        painters: dict[str, Painter] = {}
        for job, python in jobs:
            name = job.variant
            try:
                one, _ = PICTURES[kinds[0]]
                log = work / f"{name.replace(' ', '-')}.log"
                with Painter(job, python, log) as first:
                    first.draw(one, 0.0, work / "first.npy")
                    spent = time.perf_counter() - first.began
                again = stack.enter_context(Painter(job, python, log))
                peak = again.draw(one, 0.0, work / "first.npy")["peak_bytes"]
            except WorkerError as error:
                absent[name] = str(error)
                continue
            painters[name] = again
            folder = job.original if name.startswith("diffusers") else job.quantized
            folder = job.exported if name.startswith(PEERS) else folder
            rows[name] = Row(name, bytes_below(Path(folder)), spent, time.perf_counter() - again.began, peak)
            print(f"{name}: first {spent:.1f} s, later {rows[name].later:.1f} s", file=sys.stderr, flush=True)
        for kind in kinds:
            steps, guidance = PICTURES[kind]
            for child in painters.values():
                # With guidance a batch is twice as large, which an engine compiles anew.
                child.draw(1, guidance, work / "first.npy")
            for number in range(rounds):
                for name, child in painters.items():
                    picture = work / f"{kind}-{name.replace(' ', '-')}.npy"
                    drawn = child.draw(steps, guidance, picture)
                    row = rows[name]
                    row.seconds.setdefault(kind, []).append(drawn["seconds"])
                    row.parts[kind], row.peak_bytes = drawn["parts"], drawn["peak_bytes"]
                    row.psnr[kind] = psnr_of(work / f"{kind}-{FULL.replace(' ', '-')}.npy", picture)
                    print(
                        f"{kind} steps, round {number + 1}, {name}: {drawn['seconds']:.1f} s", file=sys.stderr
                    )
    return list(rows.values()), absent


def ratios(rows: Sequence[Row], kind: str) -> dict[str, float]:
    """Return how many times as fast as full precision each variant draws: medians of the rounds' ratios."""
    full = next(row for row in rows if row.variant == FULL).seconds[kind]
    return {
        row.variant: statistics.median(a / b for a, b in zip(full, row.seconds[kind], strict=True))
        for row in rows
    }


def main() -> None:
    """Make what is missing, measure, and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="sd15", help="sd15, a name of the project, or a directory")
    parser.add_argument("--size", type=int, default=512, help="side of a picture in pixels")
    parser.add_argument("--scheme", default="quick_w8a8")
    parser.add_argument("--calibration-steps", type=int, default=4, help="random weights need no more")
    parser.add_argument("--steps", default="1,4,20", help="some of 1,4,20")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="separated by commas")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=Path, default=PAINTER.with_name("prompts") / "calibration.txt")
    parser.add_argument("--peers", metavar="PYTHON", help="interpreter that has optimum-intel")
    parser.add_argument("--work", type=Path, default=Path("runs", "pipeline"))
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    work: Path = options.work / options.model.replace("/", "-")
    work.mkdir(parents=True, exist_ok=True)
    original = named_directory(options.model) or Path(options.model)
    if options.model == "sd15":
        original = work / "original"
        if not original.exists():
            make_sd15(original)
    made = work / options.scheme
    recipe = recipe_of(options.scheme, bounded=options.model != "sd15")
    took = quantized(original, made, recipe, steps=options.calibration_steps, prompts=options.prompts)
    prompts = tuple(options.prompts.read_text(encoding="utf-8").splitlines()[:8])
    jobs = []
    for name in options.variants.split(","):
        python = options.peers if name.startswith(PEERS) else sys.executable
        exported = str(work / name.replace(" ", "-"))
        if python is not None:
            jobs.append((Job(name, str(original), str(made), exported, options.size, prompts), python))
    kinds = options.steps.split(",")
    rows, absent = measure(jobs, kinds, rounds=options.rounds, work=work)
    absent |= {name: "no --peers" for name in VARIANTS if name.startswith(PEERS) and options.peers is None}
    result = {
        "machine": describe_machine(torch.get_num_threads()),
        "command": " ".join(sys.argv),
        "quantization": took,
        "absent": absent,
        "rows": [asdict(row) for row in rows],
        "times as fast": {kind: ratios(rows, kind) for kind in kinds},
    }
    if options.output:
        write_json(options.output, result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
