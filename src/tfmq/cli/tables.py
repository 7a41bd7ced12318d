"""What people see on stdout: short tables."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from tfmq.evaluation.analysis.accumulation import added_in_words
from tfmq.evaluation.cost.system import machine_in_words
from tfmq.evaluation.deviation import in_words
from tfmq.nn.floating import summary
from tfmq.report.metrics import pair_rows, published_rows
from tfmq.report.speed import BUSY
from tfmq.report.summary import correction_in_words, floating_in_words, judged_in_words, megabytes

if TYPE_CHECKING:
    from tfmq.evaluation.forecast import Forecast
    from tfmq.evaluation.inspection import Inspection, LayerBits

SPEED = {
    "integer": "this CPU has integer instructions, layers run in them; --device measures what that brings",
    "integer-slow": "layers run in integers, but this CPU has no instructions for them: small, not fast",
    "simulated": "no integer operators here: simulated, small and not fast",
}
# Entries of a long list that are shown. The rest is counted; --json has all of it.
LISTED = 12
# Number of modules in floating point that are shown, the largest first.
FLOATING = 6
# With fewer images than this a Frechet distance says more of their number than of the model.
FEW = 1000


def _figures(rows: Iterable[tuple[str, str]]) -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    return table


def _size(full: int, quantized: int) -> str:
    return f"{megabytes(full)} -> {megabytes(quantized)} ({quantized / full:.3f}x)"


def _disturbance(temporal: Mapping[str, Any]) -> str:
    return (
        f"relative error {temporal['mean_relative_error']:.2e} mean, "
        f"{temporal['max_relative_error']:.2e} max; {temporal['mismatches']} mismatches"
    )


def _floating(found: Mapping[str, Any], listed: int = LISTED) -> Table:
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
    return _shortened(table, rows, listed)


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
        console.print(_floating(found, FLOATING))
        console.print()
    size = result["bytes"]
    rows = [
        ("scheme", result["scheme"]),
        ("size", _size(size["fp32"], size["quantized"])),
        *([("stays in float", floating_in_words(found))] if found else []),
        *(
            [("correction explains", correction_in_words(result["correction"]))]
            if result.get("correction")
            else []
        ),
        *([("judged by its images", judged_in_words(result["judged"]))] if result["judged"] else []),
        ("temporal features", _disturbance(result["temporal"])),
        ("time", f"{result['seconds']:.0f} s"),
        ("most memory", megabytes(result["memory"]["peak_bytes"])),
        ("sha256", result["sha256"]),
        ("saved in", result["output_dir"]),
    ]
    console.print(_figures(rows))


def show_comparison(result: Mapping[str, Any], output_dir: Path) -> None:
    """Print the metrics of `tfmq compare`."""
    size, psnr = result["bytes"], result["psnr_db"]
    rows = [
        ("scheme", result["scheme"]),
        ("size", _size(size["reference"], size["quantized"])),
        ("PSNR", f"{psnr['mean']:.2f} dB mean, {psnr['min']:.2f} dB min over {result['num_images']} images"),
        ("SSIM", f"{result['ssim']:.4f}"),
        ("temporal features", _disturbance(result["temporal"])),
        ("pictures", f"{output_dir / 'compare.png'}, {output_dir / 'temporal.png'}"),
    ]
    Console().print(_figures(rows))


def _bits(layers: Sequence["LayerBits"]) -> str:
    """Return how many layers have which precision."""
    kinds = Counter((layer.weight_bits, layer.activation_bits) for layer in layers)

    def name(bits: tuple[int | None, int | None]) -> str:
        return "full precision" if bits == (None, None) else f"w{bits[0] or 32}a{bits[1] or 32}"

    return ", ".join(f"{count} x {name(bits)}" for bits, count in kinds.most_common())


# Words for how an input is quantized.
INPUTS = {
    "full": "in full precision",
    "static": "static",
    "per_step": "per timestep",
    "dynamic": "dynamic by token",
}


def _inputs(inspection: "Inspection") -> str:
    """Return how many layers have which input grids, and what measuring them decided."""
    kinds = Counter(layer.input for layer in inspection.layers if layer.weight_bits)
    text = ", ".join(f"{count} {INPUTS[kind]}" for kind, count in kinds.most_common())
    if not inspection.inputs:
        return text
    gains = [found for found in inspection.inputs if found.kept == "dynamic"]
    largest = max(gains, key=lambda found: found.static - found.dynamic, default=None)
    most = (
        f", most for {largest.name}: error {largest.static:.2g} to {largest.dynamic:.2g}" if largest else ""
    )
    return f"{text}; measured, dynamic is better for {len(gains)} of {len(inspection.inputs)}{most}"


def _shortened(table: Table, rows: Sequence[tuple[str, ...]], listed: int = LISTED) -> Table:
    for row in rows[:listed]:
        table.add_row(*row)
    if len(rows) > listed:
        table.add_row(f"... and {len(rows) - listed} more (--json lists all)")
    return table


def _lists(inspection: "Inspection", listed: int) -> tuple[Table, ...]:
    """Return the tables of temporal layers, of units and of what stays in floating point, with at most
    `listed` rows each.
    """
    temporal = Table(
        Column("temporal layer", overflow="fold"),
        "role",
        "depends on",
        "cacheable",
        box=None,
        pad_edge=False,
        header_style="dim",
    )
    layers = [
        (layer.name, layer.role, ", ".join(layer.depends_on), "yes" if layer.cacheable else "no")
        for layer in inspection.temporal
    ]
    units = Table(Column("unit", overflow="fold"), "layers", box=None, pad_edge=False, header_style="dim")
    parts = _shortened(units, [(unit.name, str(len(unit.layers))) for unit in inspection.units], listed)
    return (
        _shortened(temporal, layers, listed),
        parts,
        _floating(_floating_of(inspection), min(FLOATING, listed)),
    )


def _floating_of(inspection: "Inspection") -> dict[str, Any]:
    """Return what stays in floating point of a quantized model, or would of a full-precision one in the
    smallest size predicted for it.
    """
    size = inspection.bytes["quantized"] or min(inspection.predicted_bytes.values(), default=0)
    return summary(inspection.floating, size)


def _fitting_lists(console: Console, above: Table, inspection: "Inspection") -> tuple[Table, ...]:
    """Return the lists with as many rows as fit on the screen below `above`, long names folded."""
    if not console.is_terminal:
        return _lists(inspection, LISTED)

    def height(listed: int) -> int:
        # A space before each list; the last line is the prompt's.
        return sum(len(console.render_lines(table)) for table in (above, *_lists(inspection, listed))) + 3 + 1

    return _lists(
        inspection, next((listed for listed in range(LISTED, 1, -1) if height(listed) <= console.height), 1)
    )


def _temporal(inspection: "Inspection") -> str:
    """Return how many features depend on what, and the share of the block."""
    features = Counter(layer.depends_on for layer in inspection.temporal if layer.role == "feature")
    kinds = [
        f"{count} of {' + '.join(on)} ({'tabulated' if on == ('timestep',) else 'learned, not tabulated'})"
        for on, count in features.items()
    ]
    share = inspection.temporal_parameters / max(1, inspection.parameters)
    return (
        f"{'; '.join(kinds) or 'no features'}; {len(inspection.temporal)} "
        f"layers, {share:.1%} of the parameters"
    )


def _schemes(names: Sequence[str]) -> str:
    """Return what to begin with, the other general schemes, and the number of published experiments, whatever
    their bits.
    """
    own = {name for name in names if "_" not in name or name.startswith("transformer_")}
    first, smaller, *others = [name for name in names if name in own]
    published = {name.rpartition("_")[0] for name in names if name not in own}
    also = [*others, *([f"rules of {len(published)} published experiments"] if published else [])]
    return f"begin with {first} or, smaller, {smaller}; {', '.join(also)} fit too"


def show_inspection(inspection: "Inspection") -> None:
    """Print the summary of `tfmq inspect` on one screen."""
    console = Console()
    size = inspection.bytes
    fp32, quantized = size["fp32"] or 0, size["quantized"]
    predicted = ", ".join(
        f"{name} about {megabytes(count)}" for name, count in inspection.predicted_bytes.items()
    )
    rows = [
        ("family", inspection.family),
        ("parameters", f"{inspection.parameters:,}"),
        ("size", f"{megabytes(fp32)}; {predicted}" if quantized is None else _size(fp32, quantized)),
        ("layers", f"{len(inspection.layers)}: {_bits(inspection.layers)}"),
        *(
            [("embeddings", f"{len(inspection.embeddings)}: {_bits(inspection.embeddings)}")]
            if inspection.embeddings
            else []
        ),
        (
            "stays in float",
            floating_in_words(_floating_of(inspection))
            + (" with the smallest weights" if quantized is None else ""),
        ),
        ("units", str(len(inspection.units))),
        ("temporal", _temporal(inspection)),
        (
            "tables",
            ", ".join(
                f"{megabytes(count)} for {steps} steps" for steps, count in inspection.table_bytes.items()
            ),
        ),
        ("speed", SPEED[inspection.speed]),
    ]
    if inspection.schemes:
        rows.insert(4, ("schemes", _schemes(inspection.schemes)))
    if quantized is not None:
        rows.insert(4, ("inputs", _inputs(inspection)))
    figures = _figures(rows)
    lists = _fitting_lists(console, figures, inspection)
    console.print(figures)
    for table in lists:
        console.print()
        console.print(table)


def show_forecast(expected: "Forecast") -> None:
    """Print what `tfmq inspect --device` measured: the machine, the slowest shapes, and the step to
    expect.
    """
    console = Console()
    console.print()
    table = Table(Column("layer shape", overflow="fold"), box=None, pad_edge=False, header_style="dim")
    for heading in ("layers", "float32 ms", "int8 ms", "ratio"):
        table.add_column(heading, justify="right")
    listed = []
    for timing in expected.shapes:
        int8, ratio = (
            ("", "")
            if timing.int8_ms is None
            else (f"{timing.int8_ms:.3f}", f"{timing.fp32_ms / timing.int8_ms:.2f}")
        )
        shape = (
            f"{timing.operation} {'x'.join(map(str, timing.weight))} on {'x'.join(map(str, timing.input))}"
        )
        listed.append((shape, str(timing.count), f"{timing.fp32_ms:.3f}", int8, ratio))
    console.print(_shortened(table, listed))
    console.print()
    machine, weights = expected.machine, expected.weight_bytes
    step = f"{expected.fp32_ms:.1f} ms in float32, of which {expected.rest_ms:.1f} ms outside layers"
    if expected.predicted_ms is None:
        step += "; this torch has no integer operators here"
    else:
        step += (
            f"; about {expected.predicted_ms:.1f} ms in W8A8 by the torch backend ({expected.speedup:.2f}x)"
        )
    rows = [
        (
            "machine",
            (
                f"{machine['processor']}, {machine['threads']} threads; "
                f"{', '.join(machine['instructions']) or 'no integer instructions'}"
            ),
        ),
        ("step", f"batch {expected.batch}: {step}"),
        (
            "weights in memory",
            (
                f"{megabytes(weights['fp32'])}; W8A8 {megabytes(weights['w8a8'])}, "
                f"W4A8 {megabytes(weights['w4a8'])}"
            ),
        ),
    ]
    rows += [("not measured", text) for text in expected.extrapolated]
    console.print(_figures(rows))


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
        figures = (
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
        table.add_row(row["backend"], str(row["batch"]), *figures, *sizes)
    console.print(table)
    console.print()
    console.print(
        _figures(
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
    console.print(_figures(rows))


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
    console.print(_shortened(table, [(name, f"{error:.3g}") for error, name in means]))
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
    console.print(_figures(rows))
