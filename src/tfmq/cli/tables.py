"""What people see on stdout: short tables."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from tfmq.evaluation.analysis.accumulation import added_in_words
from tfmq.evaluation.cost.system import machine_in_words
from tfmq.evaluation.deviation import in_words
from tfmq.report.metrics import pair_rows, published_rows
from tfmq.report.speed import BUSY
from tfmq.report.summary import (
    component_in_words,
    correction_in_words,
    floating_in_words,
    judged_in_words,
    megabytes,
    tuning_in_words,
)

if TYPE_CHECKING:
    pass
# Entries of a long list that are shown. The rest is counted; --json has all of it.
LISTED = 12
# Number of modules in floating point that are shown, the largest first.
FLOATING = 6
# With fewer images than this a Frechet distance says more of their number than of the model.
FEW = 1000


def figures(rows: Iterable[tuple[str, str]]) -> Table:
    """Return a table of names and values."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    return table


def size_in_words(full: int, quantized: int) -> str:
    """Return two sizes and their ratio."""
    return f"{megabytes(full)} -> {megabytes(quantized)} ({quantized / full:.3f}x)"


def disturbance_in_words(temporal: Mapping[str, Any]) -> str:
    """Return how far temporal features are off."""
    return (
        f"relative error {temporal['mean_relative_error']:.2e} mean, "
        f"{temporal['max_relative_error']:.2e} max; {temporal['mismatches']} mismatches"
    )


def floating_table(found: Mapping[str, Any], listed: int = LISTED) -> Table:
    """Return the modules that stay in floating point, the largest first, with at most `listed` rows."""
    table = Table(
        Column("stays in float", overflow="fold"),
        "kind",
        Column("size", justify="right"),
        "why",
        box=None,
        pad_edge=False,
        header_style="dim",
    )
    rows = [
        (entry["name"] or "(the model itself)", entry["kind"], megabytes(entry["bytes"]), entry["reason"])
        for entry in found["modules"]
    ]
    return shortened(table, rows, listed)


def _refined(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what was done to the whole model after its units, in words, and what judged it."""
    words = {
        "tuning": ("tuned", tuning_in_words),
        "correction": ("correction explains", correction_in_words),
        "judged": ("judged by its images", judged_in_words),
    }
    return [(title, say(result[key])) for key, (title, say) in words.items() if result.get(key)]


def show_quantized(result: Mapping[str, Any]) -> None:
    """Print the report of `tfmq quantize`: one row a unit, then the totals."""
    console = Console()
    table = Table(Column("unit", overflow="fold"), box=None, pad_edge=False, header_style="dim")
    for heading in ("error, nearest", "error, found", "steps", "seconds"):
        table.add_column(heading, justify="right")
    for unit in result["units"]:
        errors = ["" if unit[key] is None else f"{unit[key]:.3g}" for key in ("error_before", "error_after")]
        table.add_row(unit["name"], *errors, str(unit["iterations"]), f"{unit['seconds']:.1f}")
    console.print(table)
    console.print()
    if (found := result["floating"]) and found["modules"]:
        console.print(floating_table(found, FLOATING))
        console.print()
    size = result["bytes"]
    rows = [
        ("scheme", result["scheme"]),
        ("size", size_in_words(size["fp32"], size["quantized"])),
        *([("stays in float", floating_in_words(found))] if found else []),
        *_refined(result),
        ("temporal features", disturbance_in_words(result["temporal"])),
        *((name, component_in_words(part)) for name, part in (result.get("components") or {}).items()),
        ("time", f"{result['seconds']:.0f} s"),
        ("most memory", megabytes(result["memory"]["peak_bytes"])),
        ("sha256", result["sha256"]),
        ("saved in", result["output_dir"]),
    ]
    console.print(figures(rows))


def show_comparison(result: Mapping[str, Any], output_dir: Path) -> None:
    """Print the metrics of `tfmq compare`."""
    size, psnr = result["bytes"], result["psnr_db"]
    rows = [
        ("scheme", result["scheme"]),
        ("size", size_in_words(size["reference"], size["quantized"])),
        ("PSNR", f"{psnr['mean']:.2f} dB mean, {psnr['min']:.2f} dB min over {result['num_images']} images"),
        ("SSIM", f"{result['ssim']:.4f}"),
        ("temporal features", disturbance_in_words(result["temporal"])),
        ("pictures", f"{output_dir / 'compare.png'}, {output_dir / 'temporal.png'}"),
    ]
    Console().print(figures(rows))


def shortened(table: Table, rows: Sequence[tuple[str, ...]], listed: int = LISTED) -> Table:
    """Return `table` with the first rows, and a last one that counts the others."""
    for row in rows[:listed]:
        table.add_row(*row)
    if len(rows) > listed:
        table.add_row(f"... and {len(rows) - listed} more (--json lists all)")
    return table


def show_bench(result: Mapping[str, Any], *, exact: bool) -> None:
    """Print the rows of `tfmq bench`, and what they were measured on."""
    console = Console()
    table = Table(Column("backend", no_wrap=True), box=None, pad_edge=False, header_style="dim")
    for heading in (
        "batch",
        "ms/step",
        "speedup",
        "img/s",
        "SQNR dB",
        "peak MB",
        "disk MB",
        "start s",
        "again",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in result["rows"]:
        accuracy = "" if row["sqnr_db"] is None else f"{row['sqnr_db']:.1f}"
        times = (
            f"{row['ms_per_step']:.1f}",
            f"{row['speedup']:.2f}x",
            f"{row['images_per_second']:.3g}",
            accuracy,
        )
        sizes = (
            f"{row['peak_rss_bytes'] / 1e6:.0f}",
            f"{row['disk_bytes'] / 1e6:.1f}",
            f"{row['load_s'] + row['compile_s']:.1f}",
            f"{row['restart_s']:.1f}",
        )
        table.add_row(row["backend"], str(row["batch"]), *times, *sizes)
    console.print(table)
    console.print()
    console.print(
        figures(
            [
                ("machine", machine_in_words(result["machine"])),
                ("speedup", "against eager fp32 torch in the same rounds"),
            ]
        )
    )
    if not exact:
        console.print("Without --reference there is no SQNR; fp32 has the dequantized weights.")
    if not all(row["clean"] for row in result["rows"]):
        console.print(BUSY)


def show_evaluation(values: Mapping[str, Any], output_dir: Path) -> None:
    """Print what `tfmq evaluate` found: sets of images first, full precision before quantized, then pairs."""
    console = Console()
    if values["rows"]:
        table = Table(
            Column("metric", no_wrap=True),
            "images of",
            "against",
            box=None,
            pad_edge=False,
            header_style="dim",
        )
        table.add_column("value", justify="right", no_wrap=True)
        for row in values["rows"]:
            spread = "" if row["deviation"] is None else f" ± {row['deviation']:.2g}"
            table.add_row(
                escape(row["metric"]), row["model"], row["against"] or "", f"{row['value']:.4g}{spread}"
            )
        console.print(table)
        console.print()
    rows = [*pair_rows(values["paired"]), *published_rows(values["baseline"])]
    count = values["protocol"]["settings"]["num_images"]
    if values["rows"] and count < FEW:
        rows.append(
            (
                "images",
                f"{count}: few for metrics of sets, which move with their number; --thorough draws more",
            )
        )
    rows.append(("protocol and values", str(output_dir / "evaluation.json")))
    console.print(figures(rows))


def show_analysis(values: Mapping[str, Any], output_dir: Path) -> None:
    """Print what `tfmq analyze` found: the units that disturb the output most, and the totals."""
    console = Console()
    found = values["sensitivity"]
    means = sorted(
        (
            (sum(row) / len(row), part["name"])
            for row, part in zip(found["error"], found["parts"], strict=True)
        ),
        reverse=True,
    )
    table = Table(
        Column("unit", overflow="fold"),
        Column("output error alone", justify="right"),
        box=None,
        pad_edge=False,
        header_style="dim",
    )
    console.print(shortened(table, [(name, f"{error:.3g}") for error, name in means]))
    console.print()
    disturbed = values["disturbance"]
    features = len(disturbed["nearest"])
    rows = [
        ("everything quantized", f"output error {sum(found['whole']) / len(found['whole']):.3g}"),
        (
            "temporal features",
            (
                f"{disturbed['mismatches']} of {features * len(disturbed['timesteps'])} "
                "nearest to another timestep's"
            ),
        ),
        *in_words(values["trajectory"]),
        *added_in_words(values["accumulation"]),
        ("data and pictures", str(output_dir)),
    ]
    settings = values["settings"]
    if settings["parts"] < settings["of_parts"]:
        share = (
            f"{settings['parts']} of {settings['of_parts']} units, evenly "
            f"spread, at {len(found['whole'])} calls"
        )
        rows.insert(
            0, ("looked at", f"{share} of {settings['num_images']} image(s); --thorough looks at every unit")
        )
    if settings["layers_backend"] != settings["backend"]:
        alone = f"{settings['layers_backend']}; {settings['backend']} computes the model as a whole"
        rows.append(("units and layers alone", alone))
    console.print(figures(rows))
