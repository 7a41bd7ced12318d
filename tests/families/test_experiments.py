"""The published experiments on the page of models."""

from collections.abc import Callable
from dataclasses import asdict

from tfmq.recipes.paper import BITS, PROTOCOLS, Result
from tfmq.recipes.recipe import call_options


def shown(result: Result | None) -> str:
    """Return the figures of one column as they are printed."""
    if result is None:
        return ""
    text = f"{result.fid:.2f}" if result.sfid is None else f"{result.fid:.2f} / {result.sfid:.2f}"
    further = (
        f"{result.inception_score:.2f}"
        if result.inception_score
        else f"{result.clip_score:.4f}"
        if result.clip_score
        else ""
    )
    return f"{text} ({further})" if further else text


def test_the_page_has_the_published_experiments(documented: Callable[[str, list[str]], None]) -> None:
    columns = ("fp", *BITS)
    rows = [
        f"| recipe | model | trajectory | {' | '.join(column.upper() for column in columns)} |",
        "|---|---|---|" + "---|" * len(columns),
    ]
    for protocol in PROTOCOLS:
        run = protocol.calibration
        settings = [f"{run.steps} steps of {protocol.sampler}", f"{run.samples} samples"]
        settings.append(
            f"every {run.interval}th step learned from" if run.interval > 1 else "all steps learned from"
        )
        settings += [
            f"{name.replace('_', ' ')} {value:g}"
            for name, value in call_options(asdict(run)).items()
            if name != "spacing"
        ]
        figures = [shown(protocol.results.get(column)) for column in columns]
        rows.append(
            f"| `{protocol.name}` | {protocol.model} | {', '.join(settings)} | {' | '.join(figures)} |"
        )
    documented("experiments", rows)
