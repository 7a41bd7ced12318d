"""What `tfmq inspect` prints: a model, and what its quantized form would bring."""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Column, Table

from tfmq.cli.tables import (
    FLOATING,
    LISTED,
    figures,
    floating_table,
    shortened,
    size_in_words,
)
from tfmq.nn.floating import summary
from tfmq.report.summary import floating_in_words, megabytes

if TYPE_CHECKING:
    from tfmq.evaluation.components import Component
    from tfmq.evaluation.forecast import Forecast
    from tfmq.evaluation.inspection import Inspection, LayerBits


SPEED = {
    "integer": "this CPU has integer instructions, layers run in them; --device measures what that brings",
    "integer-slow": "layers run in integers, but this CPU has no instructions for them: small, not fast",
    "simulated": "no integer operators here: simulated, small and not fast",
}


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
    parts = shortened(units, [(unit.name, str(len(unit.layers))) for unit in inspection.units], listed)
    return (
        shortened(temporal, layers, listed),
        parts,
        floating_table(_floating_of(inspection), min(FLOATING, listed)),
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


def _components(found: "Sequence[Component]") -> list[tuple[str, str]]:
    """Return a row for the components of a pipeline that has several: bytes, and what of each is
    quantized.
    """
    names = {
        part.name: ", ".join(filter(None, part.networks)) + (" in integers" if part.networks else "")
        for part in found
    }
    text = [f"{part.name} {megabytes(part.bytes)} {names[part.name]}".strip() for part in found]
    return [("components", ", ".join(text))] if len(found) > 1 else []


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
        ("size", f"{megabytes(fp32)}; {predicted}" if quantized is None else size_in_words(fp32, quantized)),
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
        *_components(inspection.components),
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
    above = figures(rows)
    lists = _fitting_lists(console, above, inspection)
    console.print(above)
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
    console.print(shortened(table, listed))
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
    console.print(figures(rows))
