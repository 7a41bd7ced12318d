"""What an exported model costs where nothing but OpenVINO and numpy runs it: time and memory of a process of
its own, beside float32 in torch.

    python benchmarks/performance.py --output-dir runs/performance --scheme fast_w8a8 ...
    python benchmarks/deployed.py --output-dir runs/performance --scheme fast_w8a8

Models, and what float32 took, are those of `performance.py` in the same output directory; it runs first.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
from performance import Model, models, quantized

import tfmq
from tfmq.cli.progress import shown_progress
from tfmq.evaluation.cost.system import processors
from tfmq.export.directory import export
from tfmq.integrations.diffusers.quiet import quiet
from tfmq.models.denoiser import Denoiser

# Runs in a process of its own, which knows nothing of torch or tfmq. Kilobytes of peak memory and
# milliseconds a step are what it prints.
CHILD = """
import pathlib, re, statistics, sys, time
from openvino_nodes import compiled

request, arrays = compiled(pathlib.Path(sys.argv[1]), batch=1, threads=int(sys.argv[2]))
times = []
for _ in range(60):
    began = time.perf_counter()
    request.infer(arrays)
    times.append(time.perf_counter() - began)
# Linux hands the other counter, that of resource usage, down to children.
peak = re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1]
print(peak, 1e3 * statistics.median(times[20:]))
"""


def exported(model: Model, folder: Path, target: Path) -> Path:
    """Return the model's file for OpenVINO, written if it is not there."""
    if not (target / "tfmq_export.json").exists():
        sampler = model.make()
        module = sampler.denoiser.module if model.module else None
        target.mkdir(parents=True, exist_ok=True)
        export(
            Denoiser(tfmq.load(folder, module=module, backend="simulated")),
            sampler.example(),
            target,
            to="openvino",
        )
    return target / "denoiser.xml"


def full_precision(directory: Path, name: str, scheme: str) -> tuple[float, float]:
    """Return megabytes and milliseconds that float32 in torch took at batch 1.

    Raises:
        SystemExit: `performance.py` has not measured the model.
    """
    found = sorted((directory / "rows").glob(f"*-{name}-001-{scheme}.json"))
    if not found:
        raise SystemExit(
            f"error: {directory / 'rows'} has no measurement of {name}; run performance.py first"
        )
    row = next(row for row in json.loads(found[0].read_text())["rows"] if row["backend"] == "fp32")
    return row["peak_rss_bytes"] / 1e6, row["ms_per_step"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--scheme", default="fast_w8a8")
    parser.add_argument("--threads", type=int, default=len(processors()))
    parser.add_argument("--ddpm64", type=Path, help="folder of the 64x64 DDPM")
    parser.add_argument("--only", default="", help="measure only models whose name contains this")
    options = parser.parse_args()
    options.output_dir = options.output_dir.resolve()
    torch.set_num_threads(options.threads)
    lines = [
        "| model | fp32 peak MB | exported peak MB | share | fp32 ms/step | exported ms/step |",
        "|---|---|---|---|---|---|",
    ]
    with quiet(), shown_progress() as progress:
        for model in models(options.ddpm64, options.output_dir):
            if options.only in model.name:
                whole, whole_ms = full_precision(options.output_dir, model.name, options.scheme)
                target = options.output_dir / f"{model.name}-{options.scheme}-openvino"
                file = exported(model, quantized(model, options.scheme, options.output_dir, progress), target)
                command = [sys.executable, "-c", CHILD, str(file), str(options.threads)]
                ended = subprocess.run(
                    command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
                )
                kilobytes, milliseconds = (float(word) for word in ended.stdout.split())
                megabytes = kilobytes * 1024 / 1e6
                lines.append(
                    f"| {model.name} | {whole:.0f} | {megabytes:.0f} | {megabytes / whole:.2f} "
                    f"| {whole_ms:.1f} | {milliseconds:.1f} |"
                )
    text = "\n".join(lines) + "\n"
    (options.output_dir / "deployed.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
