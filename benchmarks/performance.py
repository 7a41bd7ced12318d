"""What the backends and other libraries cost on five denoisers: time, memory, bytes, accuracy, and how near
the machine's ceilings they come.

    python benchmarks/performance.py --output-dir runs/performance --peers all --batch 1,4,16

The models are the embedded one, a 63 M parameter DDPM of 64x64 pixels (`--ddpm64`, a folder whose `load.py`
has `load_unet` and `scheduler`; skipped without), and architectures with random weights:
google/ddpm-cifar10-32's, a small Stable Diffusion's, a small DiT and, with `--large`, the UNet of Stable
Diffusion 1.5. Each is quantized to W8A8 (a range for every timestep, temporal features from tables; `--scheme
fast_w8a8` for zero-points that all timesteps share) but with a short calibration and no learned rounding,
which costs no time at inference, and once more to W4A8 for its bytes. Random weights serve for speed and
memory: their SQNR is in the JSON file and not in the table.

Quantized models and finished measurements (one for each model and batch size) stay in the output directory;
the script goes on with what is missing, so it can run in pieces.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel, UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn

import tfmq
from tfmq.artifact import holds_quantized, stored_bytes
from tfmq.cli.progress import shown_progress
from tfmq.evaluation.cost.pipeline import Request, bench
from tfmq.evaluation.cost.roofline import ceilings, operations
from tfmq.evaluation.cost.system import describe_machine, processors
from tfmq.evaluation.cost.variant import KINDS, names_of
from tfmq.evaluation.forecast import forecast
from tfmq.integrations.diffusers.quiet import quiet
from tfmq.models.module_file import ModuleFile
from tfmq.models.sampler import LoopSampler, Sampler
from tfmq.progress import Progress
from tfmq.recipes.recipe import Calibration
from tfmq.targets import open_sampler

STEPS = 10
SMALLEST = "w4a8"
BACKENDS = ("simulated", "torch", "torch-compile", "openvino")
FLOATING = ("simulated",)


class NoiseOnly(DDIMScheduler):
    """Leaves out the variance that a DiT predicts in further channels."""

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, **options: Any) -> Any:
        return super().step(model_output[:, : sample.shape[1]], timestep, sample, **options)


@dataclass(frozen=True)
class Model:
    """One denoiser of the table.

    Attributes:
        name: in the table.
        make: builds its sampler.
        trained: whether its weights are.
        module: gives it, if diffusers lacks it.
        large: whether quantizing it takes so long that it is done once, not for the bytes of four-bit weights
            too.
    """

    name: str
    make: Callable[[], Sampler]
    trained: bool
    module: ModuleFile | None = None
    large: bool = False


def _looped(module: nn.Module, shape: tuple[int, ...], **conditions: Tensor) -> LoopSampler:
    return LoopSampler(
        tfmq.Denoiser(module.eval().requires_grad_(False)), NoiseOnly(), shape=shape, conditions=conditions
    )


def cifar() -> Sampler:
    torch.manual_seed(0)
    module = UNet2DModel(
        sample_size=32,
        block_out_channels=(128, 256, 256, 256),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=None,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-6,
    )
    return _looped(module, (3, 32, 32))


def latent() -> Sampler:
    torch.manual_seed(0)
    module = UNet2DConditionModel(
        sample_size=32,
        block_out_channels=(160, 320, 640),
        layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=384,
        attention_head_dim=8,
    )
    return _looped(module, (4, 32, 32), encoder_hidden_states=torch.randn(1, 77, 384))


def stable_diffusion() -> Sampler:
    torch.manual_seed(0)
    module = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    return _looped(module, (4, 64, 64), encoder_hidden_states=torch.randn(1, 77, 768))


def dit() -> Sampler:
    torch.manual_seed(0)
    module = DiTTransformer2DModel(
        num_attention_heads=6,
        attention_head_dim=64,
        num_layers=12,
        sample_size=32,
        patch_size=2,
        out_channels=8,
    )
    return _looped(module, (4, 32, 32), class_labels=torch.tensor([207]))


TRAINED = """\
import sys

import tfmq

sys.path.insert(0, {folder!r})
import load


def sampler():
    unet = load.load_unet().requires_grad_(False)
    return tfmq.LoopSampler(tfmq.Denoiser(unet), load.scheduler(), shape=(3, 64, 64))
"""


def models(ddpm64: Path | None, folder: Path, *, large: bool = False) -> Iterator[Model]:
    """Yield the models of the table; the file that gives one of them goes to `folder`."""
    yield Model("default", lambda: open_sampler("default"), trained=True)
    if ddpm64 is not None and (ddpm64 / "load.py").exists():
        folder.mkdir(parents=True, exist_ok=True)
        module = ModuleFile(folder.resolve() / "ddpm64_module.py", "sampler")
        module.path.write_text(TRAINED.format(folder=str(ddpm64.resolve())))
        yield Model("ddpm64", module.sampler, trained=True, module=module)
    yield Model("ddpm-cifar10-32", cifar, trained=False)
    yield Model("small-sd-unet", latent, trained=False)
    yield Model("small-dit", dit, trained=False)
    if large:
        yield Model("sd15-unet", stable_diffusion, trained=False, large=True)


def quantized(model: Model, scheme: str, directory: Path, progress: Progress) -> Path:
    """Return the directory of the quantized denoiser, made if it is not there."""
    target = directory / f"{model.name}-{scheme}"
    if not holds_quantized(target):
        recipe = tfmq.scheme(scheme)
        temporal = replace(recipe.temporal, learning=replace(recipe.temporal.learning, iterations=1))
        calibration = Calibration(samples=1 if model.large else 2, steps=STEPS, interval=2, batch_size=2)
        recipe = replace(
            recipe,
            calibration=calibration,
            rounding=replace(recipe.rounding, solver="nearest"),
            temporal=temporal,
        )
        tfmq.quantize(model.make(), recipe, output_dir=target, progress=progress, resume=True)
    return target / "unet" if (target / "model_index.json").exists() else target


def measured(model: Model, batch: int, options: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    """Return the rows of one model and batch size, with what its ceilings need."""
    folders = {
        scheme: quantized(model, scheme, options.output_dir, progress)
        for scheme in ((options.scheme,) if model.large else (options.scheme, SMALLEST))
    }
    sampler = model.make()
    request = Request(
        directory=folders[options.scheme],
        sampler=sampler,
        model=model.name,
        variants=options.variants,
        batches=(batch,),
        rounds=options.rounds,
        threads=options.threads,
        steps=STEPS,
        module=model.module,
    )
    expected = forecast(sampler, recipe=tfmq.scheme(options.scheme), batch=batch, progress=progress)
    work = options.output_dir / "work"
    shutil.rmtree(work, ignore_errors=True)

    def note(line: str) -> None:
        print(f"skipped: {model.name}: {line}", file=sys.stderr, flush=True)

    rows = [asdict(row) for row in bench(request, folder=work, note=note, progress=progress)]
    shutil.rmtree(work, ignore_errors=True)
    return {
        "model": model.name,
        "weights": "trained" if model.trained else "random",
        "parameters": sum(parameter.numel() for parameter in sampler.denoiser.module.parameters()),
        "operations": operations(sampler.denoiser, sampler.example()),
        "bytes": {scheme: stored_bytes(folder) for scheme, folder in folders.items()},
        "forecast": {
            "batch": batch,
            "fp32_ms": expected.fp32_ms,
            "predicted_ms": expected.predicted_ms,
            "speedup": expected.speedup,
        },
        "rows": rows,
    }


def with_share(result: Mapping[str, Any], ceiling: Mapping[str, float | None]) -> list[dict[str, Any]]:
    """Return the rows with their rate of operations and its share of the ceiling of the arithmetic that they
    compute in.
    """
    rows = []
    for row in result["rows"]:
        floating = "fp32" in row["backend"] or row["backend"] in FLOATING
        top = ceiling["fp32" if floating else "int8"]
        rate = result["operations"] * row["batch"] / (row["ms_per_step"] / 1e3)
        rows.append(
            {**row, "operations_per_second": rate, "share_of_ceiling": None if top is None else rate / top}
        )
    return rows


def table(results: list[dict[str, Any]], ceiling: Mapping[str, float | None]) -> str:
    """Return the results as a Markdown table."""
    headings = ("model", "variant", "recipe", "batch", "ms/step", "speedup", "images/s", "SQNR dB")
    headings += ("peak MB", "first peak MB", "disk MB", "start s", "later start s", "of ceiling")
    lines = [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
    for result in results:
        for row in with_share(result, ceiling):
            accuracy = (
                "" if row["sqnr_db"] is None or result["weights"] == "random" else f"{row['sqnr_db']:.1f}"
            )
            share = "" if row["share_of_ceiling"] is None else f"{row['share_of_ceiling']:.2f}"
            name = row["backend"] if row["scheme"] is None else f"**{row['backend']}**"
            loaded = "" if row["clean"] else " (loaded)"
            lines.append(
                f"| {result['model']} | {name} | {row['scheme'] or ''} | {row['batch']} | "
                f"{row['ms_per_step']:.1f}{loaded} | {row['speedup']:.2f} "
                f"| {row['images_per_second']:.3g} | {accuracy} | {row['peak_rss_bytes'] / 1e6:.0f} "
                f"| {row['first_peak_rss_bytes'] / 1e6:.0f} | {row['disk_bytes'] / 1e6:.1f} "
                f"| {row['load_s'] + row['compile_s']:.1f} "
                f"| {row['restart_s']:.1f} | {share} |"
            )
    lines += [
        "",
        "| model | parameters | operations a step | fp32 MB | W8A8 MB | W4A8 MB |",
        "|---|---|---|---|---|---|",
    ]
    for result in {result["model"]: result for result in results}.values():
        sizes = " | ".join(f"{size / 1e6:.1f}" for size in result["bytes"].values()) + " |" * (
            2 - len(result["bytes"])
        )
        lines.append(
            f"| {result['model']} | {result['parameters'] / 1e6:.1f} M | {result['operations'] / 1e9:.2f} G "
            f"| {4 * result['parameters'] / 1e6:.1f} | {sizes} |"
        )
    lines += [
        "",
        "| model | batch | torch, forecast ms | measured ms | speedup, forecast | measured |",
        "|---|---|---|---|---|---|",
    ]
    for result in results:
        expected, row = (
            result["forecast"],
            next((row for row in result["rows"] if row["backend"] == "torch"), None),
        )
        if row is not None and expected["predicted_ms"] is not None:
            lines.append(
                f"| {result['model']} | {row['batch']} | {expected['predicted_ms']:.1f} "
                f"| {row['ms_per_step']:.1f} "
                f"| {expected['speedup']:.2f} | {row['speedup']:.2f} |"
            )
    return "\n".join(lines) + "\n"


def write_results(options: argparse.Namespace) -> None:
    """Write every finished measurement as one JSON file and one table."""
    results = [json.loads(path.read_text()) for path in sorted((options.output_dir / "rows").glob("*.json"))]
    if not results:
        return
    torch.set_num_threads(options.threads)
    ceiling = asdict(ceilings())
    rows = [{**result, "rows": with_share(result, ceiling)} for result in results]
    content = {
        "machine": describe_machine(options.threads),
        "ceilings": ceiling,
        "steps": STEPS,
        "results": rows,
    }
    (options.output_dir / "performance.json").write_text(json.dumps(content, indent=1) + "\n")
    text = table(results, ceiling)
    (options.output_dir / "performance.md").write_text(text)
    print(text)


def _names(text: str, known: tuple[str, ...]) -> list[str]:
    names = list(known) if text == "all" else [name for name in text.split(",") if name and text != "none"]
    unknown = [name for name in names if name not in KINDS]
    if unknown:
        raise SystemExit(f"error: there is no variant {unknown[0]!r}; choose from {', '.join(KINDS)}")
    return names


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--backends", default=",".join(BACKENDS))
    parser.add_argument("--peers", default="all")
    parser.add_argument("--scheme", default="w8a8")
    parser.add_argument("--batch", default="1")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=len(processors()))
    parser.add_argument("--ddpm64", type=Path, help="folder of the 64x64 DDPM")
    parser.add_argument(
        "--large",
        action="store_true",
        help="with Stable Diffusion 1.5's UNet too: 20 minutes of one core and 20 GB to quantize it",
    )
    parser.add_argument("--only", default="", help="measure only models whose name contains this")
    options = parser.parse_args()
    options.variants = [
        *_names(options.backends, names_of("backend")),
        *_names(options.peers, names_of("peer")),
    ]
    finished = options.output_dir / "rows"
    finished.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    with quiet(), shown_progress() as progress:
        for number, model in enumerate(models(options.ddpm64, options.output_dir, large=options.large)):
            for batch in (int(part) for part in options.batch.split(",")):
                path = finished / f"{number}-{model.name}-{batch:03d}-{options.scheme}.json"
                if options.only not in model.name or path.exists():
                    continue
                path.write_text(json.dumps(measured(model, batch, options, progress), indent=1) + "\n")
    write_results(options)


if __name__ == "__main__":
    main()
