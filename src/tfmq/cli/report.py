"""`tfmq report`."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tfmq.cli.analyze import SUFFIX as ANALYSED
from tfmq.cli.evaluate import SUFFIX as EVALUATED
from tfmq.cli.options import Directory, Json, Module, beside, check_module
from tfmq.cli.outcome import emit, verb

if TYPE_CHECKING:
    from tfmq.report.model import ModelReport

SUFFIX = ".report"


def report(
    directory: Directory,
    evaluation: Annotated[
        Path | None,
        typer.Option(
            "--evaluation",
            metavar="E",
            help="What tfmq evaluate wrote. Default: DIR.evaluation, if it is there.",
        ),
    ] = None,
    analysis: Annotated[
        Path | None,
        typer.Option(
            "--analysis", metavar="A", help="What tfmq analyze wrote. Default: DIR.analysis, if it is there."
        ),
    ] = None,
    bench: Annotated[
        Path | None, typer.Option("--bench", metavar="FILE", help="What tfmq bench --json printed.")
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Option("--base-model", metavar="ID", help="Hub id of the original, for the model card."),
    ] = None,
    push_to_hub: Annotated[
        str | None,
        typer.Option(
            "--push-to-hub", metavar="ID", help="Upload DIR there, with the card; created if need be."
        ),
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="Make a repository that --push-to-hub creates private.")
    ] = False,
    output_dir: Annotated[
        Path | None,
        typer.Option("--output-dir", metavar="OUT", help="Where the files go. Default: DIR.report."),
    ] = None,
    module: Module = None,
    json: Json = False,
) -> None:
    """Make one HTML file that shows a quantized model, what it lost and where; and the same numbers as a
    model card.
    """
    with verb():
        from tfmq.cli.models import open_model, quantized_directory
        from tfmq.report.card import write_card
        from tfmq.report.directory import completed_directory
        from tfmq.report.html import write_html
        from tfmq.report.model import gather

        source, own = quantized_directory(directory), check_module(module)
        if own is not None:
            # Open the model first: others will read the report, so its values have to belong to this model.
            open_model(directory, module=own)
        target = output_dir or beside(directory, SUFFIX)
        found = gather(
            source,
            evaluation=_measured(evaluation, beside(directory, EVALUATED)),
            analysis=_measured(analysis, beside(directory, ANALYSED)),
            bench=bench,
            base_model=base_model,
            module=own,
        )
        with completed_directory(target, owned=("report.html", "card.md")) as folder:
            write_html(folder / "report.html", found)
            write_card(folder / "card.md", found, place=push_to_hub)
        if push_to_hub is not None and base_model is None:
            warnings.warn(
                "the card does not say what this model was made from; name it with --base-model", stacklevel=1
            )
        size = (target / "report.html").stat().st_size
        address = None if push_to_hub is None else _pushed(source, push_to_hub, found, private=private)
        result = {
            "report": str(target / "report.html"),
            "card": str(target / "card.md"),
            "bytes": size,
            "pushed_to": address,
        }
    if json:
        emit(result)
    else:
        print(
            f"{result['report']}, {size / 1e6:.2f} MB{_lacking(found)}; the same numbers in {result['card']}"
        )
        if address is not None:
            print(f"pushed to {address}")


def _lacking(found: "ModelReport") -> str:
    """Return a note of the measurements that a report is without."""
    measured = {"evaluate": found.evaluation, "analyze": found.analysis}
    missing = [name for name, value in measured.items() if value is None]
    return f" (nothing from tfmq {' and '.join(missing)} in it)" if missing else ""


def _pushed(directory: Path, repository: str, found: "ModelReport", *, private: bool) -> str:
    """Upload a model whose files are whole, with its card; return where it is."""
    from tfmq.artifact import verify_files
    from tfmq.integrations.hub import push_folder
    from tfmq.report.card import render_card

    verify_files(directory)
    return push_folder(directory, repository, card=render_card(found, place=repository), private=private)


def _measured(given: Path | None, usual: Path) -> Path | None:
    """Return the folder of measurements that was given, else the usual one if it is there."""
    return given or (usual if usual.is_dir() else None)
