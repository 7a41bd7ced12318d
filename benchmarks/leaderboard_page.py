"""The page docs/leaderboard.md, from the finished cells of `leaderboard.py`: one table a model and bit
width.
"""

from collections.abc import Mapping, Sequence
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
from methods import BITS

from tfmq.evaluation.adherence.shares import QUANTILE, Share
from tfmq.storage.atomic import read_json

FULL = "full-precision"
Row = Mapping[str, Any]
# What W4A8 may lose of any attribute that is read off an image, in points; W8A8 stays within the interval of
# full precision.
BARS = {"text": 1.0, "dit": 1.0, "text-turbo": 2.0}
BARRED = ("identity", "ink", "ground", "place")
PRESETS = ("tfmq", "fast", "transformer", "group", "svd")
# The row that the others of its table are compared with, image by image.
YARDSTICK = "tfmq"

TEMPLATE, PLACE = Path(__file__).with_name("leaderboard.template.md"), "<!-- tables -->\n"


def read_cells(directory: Path) -> list[dict[str, Any]]:
    """Return the finished cells in a folder, in the order of their names."""
    return [read_json(path) for path in sorted(directory.glob("*.json"))]


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return a mean, and half its 95 % interval by the normal approximation; infinite for a single value."""
    array = np.asarray(values, dtype=np.float64)
    half = QUANTILE * float(array.std(ddof=1)) / sqrt(len(array)) if len(array) > 1 else float("inf")
    return float(array.mean()), half


def pooled(cells: Sequence[Row], name: str) -> Share | None:
    """Return the share of an attribute: the mean over seeds, of as many images as one seed has, since their
    prompts are the same.
    """
    counts = [cell["adherence"][name] for cell in cells if name in cell["adherence"]]
    return Share(round(sum(held for held, _ in counts) / len(counts)), counts[0][1]) if counts else None


def loss(cells: Sequence[Row], full: Row | None, names: Sequence[str]) -> float | None:
    """Return the largest loss of an attribute to full precision, in points; None where nothing was read."""
    if full is None:
        return None
    lost = []
    for name in names:
        counts = [cell["adherence"][name] for cell in cells if name in cell["adherence"]]
        if counts and name in full["adherence"]:
            held, asked = full["adherence"][name]
            lost.append(100 * (held / asked - sum(h for h, _ in counts) / sum(n for _, n in counts)))
    return max(lost) if lost else None


def _attributes(cells: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(name for cell in cells for name in cell.get("adherence", {})))


def share_in_words(found: Share | None) -> str:
    """Return a share in percent with its interval; nothing where no image was asked."""
    if found is None:
        return ""
    low, high = found.interval
    return f"{100 * found.value:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def _step(cells: Sequence[Row]) -> str:
    """Return what a step takes, by what, the letter of the machine where there are several, and whether it
    was busy with something else.
    """
    cell = next((cell for cell in cells if cell.get("step")), None)
    if cell is None:
        return ""
    step, where = cell["step"], f" ({letter})" if (letter := cell.get("letter")) else ""
    return f"{step['ms_per_step']:.2f} {step['backend']}{where}{'' if step['clean'] else ' *'}"


def _of_images(cells: Sequence[Row], name: str) -> Any:
    """Return the mean over seeds of a value of each image."""
    return np.array([cell[name] for cell in cells]).mean(axis=0)


def _against(cells: Sequence[Row], yardstick: Sequence[Row]) -> str:
    """Return by how much the images of a line are nearer to full precision's than those of `yardstick`, pair
    by pair; nothing for that line itself, or where there is no such line.
    """
    if not yardstick or cells[0]["method"] == yardstick[0]["method"]:
        return ""
    mean, half = mean_interval((_of_images(cells, "psnr_db") - _of_images(yardstick, "psnr_db")).tolist())
    return f"{mean:+.2f} ± {half:.2f}"


def _quality(cells: Sequence[Row], yardstick: Sequence[Row]) -> list[str]:
    """Return the cells of a line that compare images with full precision's."""
    mean, half = mean_interval(_of_images(cells, "psnr_db").tolist())
    similar, around = mean_interval(_of_images(cells, "ssim").tolist())
    worst = min(min(cell["psnr_db"]) for cell in cells)
    fidelity = [f"{mean:.2f} ± {half:.2f}", _against(cells, yardstick), f"{worst:.2f}"]
    return [*fidelity, f"{similar:.4f} ± {around:.4f}"]


def _line(
    cells: Sequence[Row], full: Row | None, attributes: Sequence[str], yardstick: Sequence[Row]
) -> list[str]:
    first = cells[0]
    spread = f" (± {np.std([np.mean(cell['psnr_db']) for cell in cells]):.2f})" if len(cells) > 1 else ""
    size, whole = first["bytes"]["disk"], first["bytes"]["fp32"]
    lost = loss(cells, full, attributes)
    temporal = {
        name: float(np.mean([cell["temporal"][name] for cell in cells]))
        for name in ("mean", "max", "mismatches")
    }
    return [
        *(first["method"], f"{len(cells)}{spread}", f"{size / 1e6:.2f}", f"{size / whole:.3f}"),
        *_quality(cells, yardstick),
        *(share_in_words(pooled(cells, name)) for name in attributes),
        *([f"{lost:+.1f}" if lost is not None else ""] if attributes else []),
        f"{np.mean([cell['frechet']['value'] for cell in cells]):.3f}",
        f"{temporal['mean']:.4f} / {temporal['max']:.4f}",
        f"{temporal['mismatches']:.1f}",
        f"{np.mean([cell['cpu_seconds'] for cell in cells]):.0f}",
        _step(cells),
    ]


def _full_line(full: Row, attributes: Sequence[str]) -> list[str]:
    shares = [share_in_words(pooled([full], name)) for name in attributes]
    return [
        "full precision",
        "",
        f"{full['bytes']['disk'] / 1e6:.2f}",
        "1",
        *[""] * 4,
        *shares,
        *([""] if attributes else []),
        *[""] * 4,
        _step([full]),
    ]


def table(cells: Sequence[Row], full: Row | None) -> str:
    """Return the rows of one model and bit width, best PSNR first, as a Markdown table under full precision's
    line.
    """
    groups = [
        [cell for cell in cells if cell["method"] == method]
        for method in dict.fromkeys(cell["method"] for cell in cells)
    ]
    working = [group for group in groups if not any("failed" in cell for cell in group)]
    broken = [group for group in groups if group not in working]
    attributes = _attributes([*([full] if full else []), *cells])
    working.sort(key=lambda group: -np.mean([cell["psnr_db"] for cell in group]))
    distances = " / ".join(dict.fromkeys(group[0]["frechet"]["name"] for group in working))
    head = [
        "method",
        "seeds",
        "MB",
        "of fp32",
        "PSNR dB",
        f"to {YARDSTICK}",
        "worst",
        "SSIM",
        *attributes,
        *(["loss"] if attributes else []),
    ]
    head += [distances or "Frechet distance", "temporal error", "mismatches", "CPU s", "ms/step"]
    lines = [head, ["---"] * len(head), *([_full_line(full, attributes)] if full else [])]
    yardstick = next((group for group in working if group[0]["method"] == YARDSTICK), [])
    lines += [_line(group, full, attributes, yardstick) for group in working]
    for group in broken:
        reason = next(cell["failed"] for cell in group if "failed" in cell)
        lines.append(
            [
                group[0]["method"],
                str(len(group)),
                f"failed: {reason.replace('|', '/')}",
                *[""] * (len(head) - 3),
            ]
        )
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def bars(model: str, cells: Sequence[Row], full: Row | None) -> list[str]:
    """Return what the presets make of the bars of adherence, a line each."""
    found = []
    for method in PRESETS if full is not None and model in BARS else ():
        groups = {
            bits: [c for c in cells if (c["method"], c["bits"]) == (method, bits) and "failed" not in c]
            for bits in ("w4a8", "w8a8")
        }
        lost = loss(groups["w4a8"], full, BARRED)
        if lost is not None:
            verdict = "met" if lost <= BARS[model] else "missed"
            found.append(
                f"* `{method}` at W4A8 loses at most {lost:.1f} points of digits, colours and place: "
                f"the bar of {BARS[model]:.0f} is {verdict}."
            )
        shares = {name: (pooled([full], name), pooled(groups["w8a8"], name)) for name in BARRED}
        known = {
            name: (whole, low)
            for name, (whole, low) in shares.items()
            if whole is not None and low is not None
        }
        if known:
            outside = [name for name, (whole, low) in known.items() if low.value < whole.interval[0]]
            where = (
                f"below the interval of full precision in {', '.join(outside)}"
                if outside
                else "within the interval of full precision"
            )
            found.append(f"* `{method}` at W8A8 is {where}.")
    return found


def _measured_on(cell: Row) -> str:
    """Return what measured a cell: the machine and its versions."""
    versions = ", ".join(f"{name} {version}" for name, version in sorted(cell["versions"].items()))
    return f"{cell['machine']}; {versions}"


def lettered(cells: Sequence[Row]) -> list[Row]:
    """Return the cells, each with the letter of what measured it; with none where all were measured by the
    same.
    """
    places = list(dict.fromkeys(map(_measured_on, cells)))
    if len(places) < 2:
        return list(cells)
    return [{**cell, "letter": chr(ord("a") + places.index(_measured_on(cell)))} for cell in cells]


def _environment(cells: Sequence[Row]) -> str:
    """Return what measured a model's cells, in a line for each machine and set of versions, with the commits
    of the package where cells say them.
    """
    commits: dict[str, set[str]] = {}
    for cell in cells:
        letter = f"({cell['letter']}) " if "letter" in cell else ""
        known = commits.setdefault(f"{letter}measured on {_measured_on(cell)}", set())
        if cell.get("commit"):
            known.add(f"`{cell['commit']}`")
    return "\n".join(
        "; at ".join([f"* {line}", *([", ".join(sorted(names))] if names else [])])
        for line, names in commits.items()
    )


def _described(cell: Row) -> str:
    settings = cell["settings"]
    guidance = "" if settings["guidance"] is None else f", guidance {settings['guidance']:g}"
    learned = "" if settings["iterations"] is None else f", AdaRound with {settings['iterations']} iterations"
    return (
        f"* {settings['num_images']} images of {settings['steps']} steps{guidance}; "
        f"calibration on {settings['samples']} images{learned}; "
        f"weights `{settings['weights']}`"
    )


def page(cells: Sequence[Row]) -> str:
    """Return the page."""
    parts = []
    if not cells:
        parts.append("No cell is measured yet.\n\n")
    for model in dict.fromkeys(cell["model"] for cell in cells):
        own = lettered([cell for cell in cells if cell["model"] == model])
        full = next((cell for cell in own if cell["method"] == FULL), None)
        rows = [cell for cell in own if cell["method"] != FULL]
        parts.append(
            "\n".join(
                [f"## {model}\n", _described(own[0]), _environment(own), *bars(model, rows, full), "\n"]
            )
        )
        if not rows:
            parts.append(f"{table([], full)}\n")
        for bits in sorted({cell["bits"] for cell in rows}, key=lambda name: (*BITS, name).index(name)):
            parts.append(
                f"### {model}, "
                f"{bits.upper()}\n\n{table([cell for cell in rows if cell['bits'] == bits], full)}\n"
            )
    return TEMPLATE.read_text(encoding="utf-8").replace(PLACE, "".join(parts))
