"""The table, the conclusions and the picture of `solvers.py`, from its finished cells."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

PAPER = 20_000
# The settings of the presets, which are held against the longest AdaRound.
FAST = ("gptq", "gptq-interval2")
# All budgets and settings of a family are one line of the picture.
FAMILIES = ("nearest", "adaround", "gptq", "gptq_adaround")
MEASURED = ("unit_gain_db", "noise_sqnr_db", "psnr_db")


def family(solver: str) -> str:
    """Return what a solver is a budget or setting of."""
    return solver.partition("-")[0]


def aggregate(rows: list[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return one row for each model and solver, in the order that they come in: means over seeds, and the
    standard deviation of PSNR over them.
    """
    result = []
    for key in dict.fromkeys((row["model"], row["solver"]) for row in rows):
        group = [row for row in rows if (row["model"], row["solver"]) == key]
        result.append(
            {
                **{
                    "model": key[0],
                    "solver": key[1],
                    "iterations": group[0]["iterations"],
                    "seeds": sorted(row["seed"] for row in group),
                },
                **{name: float(np.mean([row[name] for row in group])) for name in MEASURED},
                "psnr_std_db": float(np.std([row["psnr_db"] for row in group])),
                **{
                    name: float(np.mean([row["units"][name] for row in group]))
                    for name in ("seconds", "cpu_seconds")
                },
                "before_units_cpu_seconds": float(
                    np.mean([row["before_units"]["cpu_seconds"] for row in group])
                ),
            }
        )
    return result


def extrapolated(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return what the paper's budget would take, a straight line through the shortest and the longest
    measured one, and how flat the curve is.

    `gain_of_last_step_db` is the PSNR that the longest budget has over the one before it.
    """
    learned = sorted(
        (row for row in rows if family(row["solver"]) == "adaround"), key=lambda row: row["iterations"]
    )
    if len(learned) < 2:
        return None
    first, before, last = learned[0], learned[-2], learned[-1]
    slope = (last["cpu_seconds"] - first["cpu_seconds"]) / (last["iterations"] - first["iterations"])
    return {
        "longest": last["iterations"],
        "before_it": before["iterations"],
        "cpu_seconds_an_iteration": slope,
        "cpu_seconds": last["cpu_seconds"] + slope * (PAPER - last["iterations"]),
        "gain_of_last_step_db": last["psnr_db"] - before["psnr_db"],
    }


def paired_difference(rows: list[Mapping[str, Any]], model: str, fast: str) -> dict[str, Any] | None:
    """Return the bar's two figures on the seeds that both have: PSNR of `fast` less that of the longest
    AdaRound, and the ratio of their times.

    `ratio_units` compares the units, `ratio_job` everything from the calibration on.
    """
    own = [row for row in rows if row["model"] == model]
    longest = max((row["iterations"] for row in own if family(row["solver"]) == "adaround"), default=0)
    found = {
        name: {row["seed"]: row for row in own if row["solver"] == solver}
        for name, solver in (("fast", fast), ("slow", f"adaround-{longest}"))
    }
    seeds = sorted(found["fast"].keys() & found["slow"].keys())
    if not seeds:
        return None

    def total(name: str, *parts: str) -> float:
        return sum(found[name][seed][part]["cpu_seconds"] for seed in seeds for part in parts)

    return {
        "iterations": longest,
        "seeds": seeds,
        "psnr_difference_db": float(
            np.mean([found["fast"][seed]["psnr_db"] - found["slow"][seed]["psnr_db"] for seed in seeds])
        ),
        "ratio_units": total("slow", "units") / total("fast", "units"),
        "ratio_job": total("slow", "units", "before_units") / total("fast", "units", "before_units"),
    }


def table(summary: list[dict[str, Any]]) -> str:
    """Return the aggregated rows as a Markdown table."""
    lines = [
        (
            "| model | solver | seeds | unit error below nearest, dB | noise "
            "SQNR dB | PSNR dB | CPU s, units | CPU s, before |"
        ),
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in summary:
        spread = f" ± {row['psnr_std_db']:.2f}" if len(row["seeds"]) > 1 else ""
        lines.append(
            f"| {row['model']} | {row['solver']} | {len(row['seeds'])} | "
            f"{row['unit_gain_db']:.2f} | {row['noise_sqnr_db']:.2f} "
            f"| {row['psnr_db']:.2f}{spread} | {row['cpu_seconds']:.0f} "
            f"| {row['before_units_cpu_seconds']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def conclusions(rows: list[Mapping[str, Any]], summary: list[dict[str, Any]]) -> str:
    """Return what the table says about the bar, and what of it is extrapolated."""
    lines = []
    for model in dict.fromkeys(row["model"] for row in summary):
        line = extrapolated([row for row in summary if row["model"] == model])
        for fast in FAST:
            if (bar := paired_difference(rows, model, fast)) is None:
                continue
            lines.append(
                f"* {model}: `{fast}` is {bar['psnr_difference_db']:+.2f} dB of PSNR "
                f"from AdaRound with {bar['iterations']} iterations "
                f"({len(bar['seeds'])} seeds), in 1/{bar['ratio_units']:.1f} of its "
                f"processor time for the units and 1/{bar['ratio_job']:.1f} "
                "for the whole job."
            )
        if line is not None and line["longest"] < PAPER:
            lines.append(
                f"* {model}, extrapolated, not measured: AdaRound with {PAPER} iterations "
                f"would take {line['cpu_seconds']:.0f} CPU seconds for the "
                f"units ({line['cpu_seconds_an_iteration']:.3f} an iteration). From "
                f"{line['before_it']} to {line['longest']} iterations PSNR "
                f"changed by {line['gain_of_last_step_db']:+.2f} dB; what it does beyond is not known."
            )
    return "\n".join(lines) + "\n"


def draw_curves(summary: list[dict[str, Any]], path: Path) -> None:
    """Draw quality against processor time, a row of panels for each model and a line for each family of
    solvers.
    """
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(row["model"] for row in summary))
    figure = Figure(figsize=(13, 4.2 * len(models)), dpi=110, layout="constrained")
    titles = ("unit error below nearest codes, dB", "SQNR of the prediction, dB", "PSNR of images, dB")
    for panels, model in zip(figure.subplots(len(models), 3, squeeze=False), models, strict=True):
        for axes, name, title in zip(panels, MEASURED, titles, strict=True):
            for colour, kind in enumerate(FAMILIES):
                group = sorted(
                    (row for row in summary if row["model"] == model and family(row["solver"]) == kind),
                    key=lambda row: row["cpu_seconds"],
                )
                joined = "-" if kind.endswith("adaround") else ""
                if group:
                    axes.plot(
                        [row["cpu_seconds"] for row in group],
                        [row[name] for row in group],
                        marker="o",
                        linestyle=joined,
                        color=f"C{colour}",
                        label=kind,
                    )
            axes.set(xscale="log", xlabel="CPU seconds of the units", title=f"{model}: {title}")
            axes.grid(True, color="#e6e6e6")
            axes.spines[["top", "right"]].set_visible(False)
        panels[0].legend(frameon=False, fontsize=9)
    figure.savefig(path, metadata={"Software": None})
