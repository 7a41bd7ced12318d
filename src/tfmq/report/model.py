"""Everything a report says of a quantized model, as one value that both the page and the card are made
from.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tfmq.artifact import stored_bytes, stored_manifest
from tfmq.models.module_file import ModuleFile
from tfmq.report.analysis import read_analysis
from tfmq.report.evaluation import PAIRS_FILE, read_evaluation
from tfmq.report.layers import LayerRow, layer_rows
from tfmq.report.metrics import MetricRow, metric_rows, pair_rows, published_rows
from tfmq.report.speed import Speed, read_speed
from tfmq.report.summary import (
    correction_in_words,
    floating_in_words,
    judged_in_words,
    megabytes,
    pooled_in_words,
    tuning_in_words,
)
from tfmq.storage.atomic import read_json
from tfmq.storage.checkpoint import MANIFEST_FILE
from tfmq.storage.errors import ForeignFileError, MissingFileError

MODEL_REPORT = "tfmq_report.json"
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
# Number of modules in floating point that are named.
FLOATING = 6
Found = TypeVar("Found")
# What is shown of a model that was not evaluated.
NOT_EVALUATED: Mapping[str, Any] = {"rows": (), "paired": None, "baseline": ()}


@dataclass(frozen=True)
class ModelReport:
    """What is known of a quantized model.

    Args:
        name: name of its folder.
        scheme: name of its recipe.
        base_model: what it was made from, where the user says so.
        facts: what was quantized and how, in words.
        recipe: every field of the recipe, flat.
        metrics: metrics of sets of images; empty where they were not evaluated.
        pairs: metrics of pairs and of the trajectory, in words.
        published: what was published of full precision, beside what was measured.
        speed: what `tfmq bench` measured.
        layers: one row a quantized layer.
        units: reconstruction errors: `(unit, rounded to nearest, learned)`.
        evaluation: what `tfmq evaluate` wrote.
        analysis: what `tfmq analyze` wrote.
        images: the file with the pairs of images.
        bare: whether it is a module's checkpoint, and no pipeline or component of diffusers.
        module: gives a sampler of what it was made from, where that is a module of one's own.
    """

    name: str
    scheme: str
    base_model: str | None
    facts: tuple[tuple[str, str], ...]
    recipe: tuple[tuple[str, str], ...]
    metrics: tuple[MetricRow, ...]
    pairs: tuple[tuple[str, str], ...]
    published: tuple[tuple[str, str], ...]
    speed: Speed | None
    layers: tuple[LayerRow, ...]
    units: tuple[tuple[str, float, float], ...]
    evaluation: Mapping[str, Any] | None
    analysis: Mapping[str, Any] | None
    images: Path | None
    bare: bool = False
    module: ModuleFile | None = None


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Return nested values as rows; lists of mappings are numbered."""
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        match value:
            case Mapping():
                rows += _flat(value, f"{name}.")
            case [Mapping(), *_]:
                rows += [
                    (f"{name}[{number}]", ", ".join(f"{k}: {v}" for k, v in _flat(item)))
                    for number, item in enumerate(value)
                ]
            case None | [] | ():
                rows.append((name, "none"))
            case _:
                rows.append((name, str(value)))
    return rows


def _floating(found: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """Return what stays in floating point and the largest of it; nothing for reports of releases that did not
    say.
    """
    if found is None:
        return []
    modules = found["modules"]
    rows = [
        (
            f"{module['name'] or 'the model itself'} ({module['kind']}, "
            f"{megabytes(module['bytes'])}): {module['reason']}"
        )
        for module in modules[:FLOATING]
    ]
    more = [f"and {len(modules) - FLOATING} more"] if len(modules) > FLOATING else []
    return [
        ("stays in floating point", floating_in_words(found)),
        *([("the largest of it", "; ".join(rows + more))] if rows else []),
    ]


def _facts(
    directory: Path,
    manifest: Mapping[str, Any],
    report: Mapping[str, Any],
    evaluation: Mapping[str, Any] | None,
) -> list[tuple[str, str]]:
    provenance, sizes = manifest["provenance"], report["bytes"]
    full, quantized = sizes["fp32"], stored_bytes(directory)
    temporal = report["temporal"]
    facts = [
        ("scheme", str(report["scheme"])),
        (
            "size of the denoiser",
            f"{megabytes(full)} in float32, {megabytes(quantized)} on disk ({quantized / full:.3f}x)",
        ),
        *_floating(report.get("floating")),
        *([("tuned", tuning_in_words(report["tuning"]))] if report.get("tuning") else []),
        *(
            [("correction explains", correction_in_words(report["correction"]))]
            if report.get("correction")
            else []
        ),
        *([("ranges of few values", pooled_in_words(report["pooled"]))] if report.get("pooled") else []),
        *([("judged by its images", judged_in_words(report["judged"]))] if report.get("judged") else []),
        (
            "temporal features",
            (
                f"relative error {temporal['mean_relative_error']:.3g} mean, "
                f"{temporal['max_relative_error']:.3g} max"
            ),
        ),
        ("seed of the quantization", str(provenance["seed"])),
        (
            "quantized with",
            (
                f"tfmq {provenance['tfmq']}, torch {provenance['torch']}, on "
                f"{report.get('fingerprint', {}).get('device', 'unknown')}"
            ),
        ),
        ("sha256 of the tensors", str(manifest["digest"])),
    ]
    if evaluation is not None:
        protocol = evaluation["protocol"]
        settings, versions = protocol["settings"], {k: v for k, v in protocol["versions"].items() if v}
        low = protocol["quantized"]
        facts += [
            (
                "evaluated on",
                (
                    f"{settings['num_images']} images of {settings['steps']} steps, seed "
                    f"{settings['seed']}, in batches of {settings['batch_size']}"
                ),
            ),
            (
                "evaluated by",
                (
                    f"{', '.join(f'{name} {version}' for name, version in versions.items())}; "
                    f"{low['device']}, backend {low['backend']}"
                ),
            ),
        ]
    return facts


def _read(path: Path | None, read: Callable[[Path], Found]) -> Found | None:
    """Read a file or folder of measurements that is there."""
    return None if path is None else read(path)


def _check_same(
    source: Path | None, found: Found | None, weights_of: Callable[[Found], str], manifest: Mapping[str, Any]
) -> None:
    """Refuse measurements that were `found` in `source` of another model."""
    if found is not None and (weights := weights_of(found)) != manifest["digest"]:
        raise ForeignFileError(
            f"{source} is of a model with sha256 {weights}, this one has {manifest['digest']}; measure again"
        )


def _images(evaluation: Path | None) -> Path | None:
    """Return the file of an evaluation with pairs of images, if there is one."""
    found = None if evaluation is None else evaluation / PAIRS_FILE
    return found if found is not None and found.exists() else None


def gather(
    directory: Path,
    *,
    evaluation: Path | None = None,
    analysis: Path | None = None,
    bench: Path | None = None,
    base_model: str | None = None,
    module: ModuleFile | None = None,
) -> ModelReport:
    """Read everything that is known of the quantized model in `directory`.

    Args:
        directory: what `tfmq quantize` wrote.
        evaluation: what `tfmq evaluate` wrote.
        analysis: what `tfmq analyze` wrote.
        bench: what `tfmq bench --json` printed.
        base_model: hub id of the original.
        module: the original, where it is a module of one's own.

    Raises:
        CheckpointError: a file is missing, damaged, or something else; names it.
        ValueError: `base_model` is no hub id.
    """
    if base_model is not None and not HUB_ID.fullmatch(base_model):
        raise ValueError(f"{base_model!r} is no hub id; give owner/name")
    manifest = stored_manifest(directory).values
    if not (directory / MODEL_REPORT).exists():
        raise MissingFileError(
            f"{directory} has no {MODEL_REPORT}: `tfmq quantize` leaves it, and models that were imported or "
            "quantized at load have none; tfmq compare and tfmq evaluate take them"
        )
    report = read_json(directory / MODEL_REPORT)
    evaluated = _read(evaluation, read_evaluation)
    analysed = _read(analysis, read_analysis)
    speed = _read(bench, read_speed)
    try:
        _check_same(evaluation, evaluated, lambda found: found["protocol"]["quantized"]["weights"], manifest)
        _check_same(analysis, analysed, lambda found: found["settings"]["weights"], manifest)
        _check_same(bench, speed, lambda found: found.weights, manifest)
        judged = evaluated or NOT_EVALUATED
        return ModelReport(
            name=directory.resolve().name,
            scheme=str(report["scheme"]),
            base_model=base_model,
            facts=tuple(_facts(directory, manifest, report, evaluated)),
            recipe=tuple(_flat(manifest["provenance"]["recipe"])),
            metrics=metric_rows(judged["rows"]),
            pairs=pair_rows(judged["paired"]),
            published=published_rows(judged["baseline"]),
            speed=speed,
            layers=layer_rows(manifest["structure"], analysed),
            units=tuple(
                (unit["name"], unit["error_before"], unit["error_after"])
                for unit in report["units"]
                if unit["error_before"] is not None
            ),
            evaluation=evaluated,
            analysis=analysed,
            images=_images(evaluation),
            bare=(directory / MANIFEST_FILE).exists(),
            module=module,
        )
    except (KeyError, TypeError, AttributeError) as error:
        sources = ", ".join(str(path) for path in (directory, evaluation, analysis) if path is not None)
        raise ForeignFileError(
            f"a file of {sources} lacks {error}; it is of another version of tfmq, or damaged: make it again"
        ) from error
