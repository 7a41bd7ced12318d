"""The entry point of `tfmq`."""

import sys

from tfmq.errors import MissingExtraError, require


def main() -> None:
    """Run the command line and leave with its exit status."""
    try:
        require("typer", extra="cli")
        require("rich", extra="cli")
    except MissingExtraError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    from tfmq.cli.commands import run

    raise SystemExit(run(sys.argv[1:]))
