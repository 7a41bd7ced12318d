"""What a job did, as values that JSON keeps."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from math import inf, log10
from typing import Any

from tfmq.calibration.correction import explained
from tfmq.calibration.spared import Spared
from tfmq.jobs.workflow import Outcome
from tfmq.nn.floating import summary
from tfmq.numerics.grids import UNIFORM


def measured_inputs(outcome: Outcome) -> list[dict[str, Any]]:
    """Return what was measured of static and dynamic input grids, and which each layer kept."""
    return [{"name": name, **asdict(errors), "kept": errors.kept} for name, errors in outcome.inputs.items()]


def measured_grids(outcome: Outcome) -> list[dict[str, Any]]:
    """Return what was measured of the candidates for the grid of each weight, and the number of the one that
    it kept.
    """
    return [
        {
            "name": name,
            "candidates": [
                {"grid": fmt.describe().get("grid", UNIFORM), "group": group, "error": error, "bits": bits}
                for (fmt, group), error, bits in zip(choices, errors.errors, errors.bits, strict=True)
            ],
            "kept": errors.kept,
        }
        for name, (choices, errors) in outcome.grids.items()
    ]


def _correction(outcome: Outcome) -> dict[str, Any] | None:
    """Return what a correction does: the share of the error that it explains, in all and by step, and how
    many steps use which estimator.
    """
    if not outcome.correction:
        return None
    before, after = (sum(getattr(fit, name) for fit in outcome.correction) for name in ("before", "after"))
    kept = Counter(fit.kept for fit in outcome.correction)
    return {
        "explained": explained(before, after),
        "by_step": [explained(fit.before, fit.after) for fit in outcome.correction],
        "steps": dict(kept),
    }


def denoiser_report(
    outcome: Outcome, manifest: Mapping[str, Any], parameters: int, quantized_bytes: int
) -> dict[str, Any]:
    """Return the report of a quantized denoiser that has so many `parameters`."""
    disturbed = outcome.disturbance
    return {
        "scheme": outcome.recipe.name,
        "bytes": {"fp32": 4 * parameters, "quantized": quantized_bytes},
        "units": [{**asdict(unit), "seconds": round(unit.seconds, 3)} for unit in outcome.units],
        "temporal": {
            "max_relative_error": disturbed.max_relative_error,
            "mean_relative_error": disturbed.mean_relative_error,
            "mismatches": disturbed.mismatches,
        },
        "inputs": measured_inputs(outcome),
        **({"grids": measured_grids(outcome)} if outcome.grids else {}),
        "pooled": dict(outcome.pooled),
        "floating": summary(outcome.floating, quantized_bytes),
        "tuning": None if outcome.tuning is None else asdict(outcome.tuning),
        "correction": _correction(outcome),
        "judged": None if outcome.verdict is None else outcome.verdict.values(),
        "sha256": manifest["digest"],
    }


def network_report(outcome: Outcome) -> dict[str, Any]:
    """Return the report of a network without a timestep."""
    return {
        "scheme": outcome.recipe.name,
        "layers": outcome.layers,
        "units": [
            {key: value for key, value in asdict(unit).items() if key != "seconds"}
            for unit in outcome.units
            if unit.iterations
        ],
        "inputs": measured_inputs(outcome),
        "tolerance": None if outcome.spared is None else _spared(outcome.spared),
    }


def _spared(found: Spared) -> dict[str, Any]:
    """Return which layers are spared and what their own errors were, and what that does to the output: its
    energy over that of the error, in dB.
    """
    return {
        "instead": found.instead,
        "layers": {name: _db(found.errors[name]) for name in found.names},
        "output_db": _db(found.after),
        "unspared_db": _db(found.before),
    }


def _db(error: float) -> float | None:
    """Return an error over the energy of what it is an error of in dB of that over it; None for none."""
    return -10 * log10(error) if 0 < error < inf else None
