"""The command `tfmq` and its verbs.

Exit status: 0 done; 2 usage; 1 a refused input or a failed run; 130 interrupted by Ctrl-C, as shells have it.
Whatever is not 0 comes with one line on stderr that names the cause.
"""

from typing import Annotated

import typer

from tfmq.cli.analyze import analyze
from tfmq.cli.bench import bench
from tfmq.cli.compare import compare
from tfmq.cli.evaluate import evaluate
from tfmq.cli.export import export
from tfmq.cli.importing import import_checkpoint
from tfmq.cli.inspect import inspect
from tfmq.cli.options import with_addresses
from tfmq.cli.outcome import INTERRUPTED, USAGE, complain
from tfmq.cli.quantize import quantize
from tfmq.cli.report import report
from tfmq.cli.sample import sample
from tfmq.cli.studio import studio
from tfmq.version import __version__

EPILOG = (
    "Exit status: 0 done, 1 refused input or failed run, 2 usage, "
    "130 interrupted. TFMQ_DEBUG=1 shows tracebacks."
)

app = typer.Typer(name="tfmq", add_completion=False, pretty_exceptions_enable=False, epilog=EPILOG)
for verb in (quantize, sample, compare, evaluate, analyze, report, studio, inspect, export, bench):
    app.command()(verb)
# `import` is no name that a Python function can have.
app.command("import")(import_checkpoint)


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"tfmq {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and leave."),
    ] = False,
) -> None:
    """Quantize diffusion models with Temporal Feature Maintenance Quantization.

    MODEL is a diffusers pipeline directory, a hub id (owner/name), or "default", the model that comes with
    tfmq.
    """
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


# The base of the parser's errors, found through a class that derives from it: recent releases of typer carry
# a click of their own, earlier ones import click.
UsageError: type[Exception] = typer.BadParameter.__mro__[1]


def run(arguments: list[str]) -> int:
    """Run the command line on `arguments` and return its exit status."""
    try:
        status = app(args=with_addresses(arguments), prog_name="tfmq", standalone_mode=False)
    except UsageError as error:
        complain(f"{error.format_message()} (see tfmq --help)")  # type: ignore[attr-defined]
        return USAGE
    except typer.Abort:
        complain("interrupted")
        return INTERRUPTED
    return status if isinstance(status, int) else 0
