"""The results of a comparison as plain values, and the files that show them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tfmq.evaluation.comparison import Comparison
from tfmq.report.comparison import write_comparison
from tfmq.report.temporal import write_temporal
from tfmq.storage.atomic import write_json

COMPARISON_FILES = ("compare.png", "temporal.png", "metrics.json", "samples.npz")


def megabytes(count: int) -> str:
    """Return a number of bytes for people.

    >>> megabytes(1_234_567), megabytes(1_500)
    ('1.23 MB', '1.5 kB')
    """
    return f"{count / 1e6:.2f} MB" if count >= 100_000 else f"{count / 1e3:.1f} kB"


def floating_in_words(found: Mapping[str, Any]) -> str:
    """Return how much stays in floating point, of a value of `tfmq.nn.floating.summary`."""
    return (
        f"{megabytes(found['bytes'])} ({found['share']:.1%} of the size) in {len(found['modules'])} modules"
    )


def summarize(
    comparison: Comparison, *, scheme: str, reference_bytes: int, quantized_bytes: int
) -> dict[str, Any]:
    """Return the metrics of a comparison as values that JSON keeps."""
    fidelity, temporal = comparison.fidelity, comparison.temporal
    return {
        "scheme": scheme,
        "num_images": len(comparison.reference),
        "psnr_db": {"mean": fidelity.mean_psnr_db, "min": fidelity.min_psnr_db},
        "ssim": fidelity.mean_ssim,
        "bytes": {"reference": reference_bytes, "quantized": quantized_bytes},
        "temporal": {
            "max_relative_error": temporal.max_relative_error,
            "mean_relative_error": temporal.mean_relative_error,
            "mismatches": temporal.mismatches,
        },
    }


def write_comparison_files(directory: Path, comparison: Comparison, metrics: Mapping[str, Any]) -> None:
    """Write the two pictures, `metrics.json`, and `samples.npz` with the arrays `reference` and
    `quantized`.
    """
    sizes, psnr = metrics["bytes"], metrics["psnr_db"]
    ratio = sizes["quantized"] / sizes["reference"]
    small = f"{megabytes(sizes['reference'])} → {megabytes(sizes['quantized'])} ({ratio:.3f}x)"
    title = f"{metrics['scheme']}   PSNR {psnr['mean']:.1f} dB   SSIM {metrics['ssim']:.3f}   {small}"
    write_comparison(directory / "compare.png", comparison, title=title)
    write_temporal(directory / "temporal.png", comparison.temporal, title=metrics["scheme"])
    np.savez_compressed(
        directory / "samples.npz", reference=comparison.reference, quantized=comparison.quantized
    )
    write_json(directory / "metrics.json", metrics)


def correction_in_words(found: Mapping[str, Any]) -> str:
    """Return what a correction of predictions explains of their error, and where it is used.

    >>> correction_in_words({"explained": 0.031, "by_step": [0.03, 0.0], "steps": {"none": 1, "bias": 1}})
    '3.1 % of the squared error on images that did not fit it; bias at 1 of 2 steps'
    """
    used = (
        ", ".join(f"{name} at {count}" for name, count in sorted(found["steps"].items()) if name != "none")
        or "nothing at any"
    )
    return (
        f"{found['explained']:.1%} of the squared error on images that did "
        f"not fit it; {used} of {len(found['by_step'])} steps"
    ).replace("%", " %")


def tuning_in_words(found: Mapping[str, Any]) -> str:
    """Return what tuning scales and biases did to the error of the prediction.

    >>> tuning_in_words({"iterations": 80, "before": 0.0031, "after": 0.0026})
    'squared error of held-out predictions 0.0031 → 0.0026 of their square in 80 iterations'
    >>> tuning_in_words({"iterations": 80, "before": 0.0031, "after": None})
    'no gain on held-out predictions in 80 iterations; scales and biases stay as they were'
    """
    if found["after"] is None or found["after"] >= found["before"]:
        return (
            f"no gain on held-out predictions in {found['iterations']} iterations; "
            "scales and biases stay as they were"
        )
    return (
        f"squared error of held-out predictions {found['before']:.3g} → {found['after']:.3g} "
        f"of their square in {found['iterations']} iterations"
    )


def pooled_in_words(together: Mapping[str, int]) -> str:
    """Return how many quantizers saw few values at a timestep, and what their ranges are.

    >>> pooled_in_words({"entry": 5, "exit": 3})
    '2 inputs saw too few values at a timestep; their ranges are those of up to 5 timesteps together'
    """
    return (
        f"{len(together)} inputs saw too few values at a timestep; their ranges are those of up to "
        f"{max(together.values())} timesteps together"
    )


def judged_in_words(found: Mapping[str, Any]) -> str:
    """Return what candidates for the whole model drew, and which one was kept.

    >>> judged_in_words({"images": 8, "psnr_db": {"recipe": 38.25, "plain": 31.0}, "kept": "recipe"})
    '38.2 dB over 8 images, 31.0 dB with nearest codes and exact ranges'
    """
    recipe, plain = (f"{found['psnr_db'][name]:.1f} dB" for name in ("recipe", "plain"))
    text = f"{recipe} over {found['images']} images, {plain} with nearest codes and exact ranges"
    return text if found["kept"] == "recipe" else f"{text}, which were kept"


def component_in_words(found: Mapping[str, Any]) -> str:
    """Return what was done to a component of a pipeline, as the report of a job has it."""
    if "left" in found:
        return f"stays in floating point: {found['left']}"
    size = found.get("bytes")
    sizes = [f"{megabytes(size['fp32'])} to {megabytes(size['quantized'])}"] if size else []
    return "; ".join([*sizes, *(_network_in_words(name, part) for name, part in found["networks"].items())])


def _network_in_words(name: str, found: Mapping[str, Any]) -> str:
    if "left" in found:
        return f"{name} stays in floating point: {found['left']}"
    text, tolerance = f"{name} with {found['layers']} quantized layers", found["tolerance"]
    if tolerance is None:
        return text
    error = (
        "" if tolerance["output_db"] is None else f", error of its output -{tolerance['output_db']:.1f} dB"
    )
    spared = tolerance["layers"]
    kind = "left in floating point" if tolerance["instead"] == "float" else "with inputs in floating point"
    return f"{text}{error}" + (f", {len(spared)} {kind}: {', '.join(spared)}" if spared else "")
