"""The options that verbs share."""

import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from tfmq.backends.backend import Options
    from tfmq.cluster.crew import Cluster as Place
    from tfmq.models.module_file import ModuleFile

LOCAL = "local"
ADDRESS = re.compile(r"local|auto|[\w.-]+:\d+")

Model = Annotated[
    str | None, typer.Argument(metavar="MODEL", help='Pipeline directory, hub id, or "default".')
]
Directory = Annotated[str, typer.Argument(metavar="DIR", help="What tfmq quantize wrote.")]
Reference = Annotated[
    str | None, typer.Option("--reference", metavar="MODEL", help="The model that it was made from.")
]
Module = Annotated[
    str | None,
    typer.Option(
        "--module",
        metavar="FILE.py:FUNCTION",
        help="A module of your own: the function returns its tfmq.LoopSampler, full precision.",
    ),
]
OutputDir = Annotated[Path, typer.Option("--output-dir", metavar="DIR", help="Where the files go.")]
Seed = Annotated[int, typer.Option("--seed", min=0, max=2**31 - 1, help="Of every random draw.")]
NumImages = Annotated[int, typer.Option("--num-images", min=1, help="How many images to draw.")]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Images drawn at once.")]
Steps = Annotated[
    int | None,
    typer.Option("--steps", min=1, help="Denoising steps. Default: those of the calibration, else 50."),
]
Device = Annotated[str | None, typer.Option("--device", metavar="D", help="Such as cpu or cuda.")]
EngineDevice = Annotated[
    str | None,
    typer.Option(
        "--device",
        metavar="D",
        help="Such as cpu or cuda; with --backend openvino one of OpenVINO's: CPU, GPU, NPU, AUTO.",
    ),
]
Prompts = Annotated[
    Path | None,
    typer.Option(
        "--prompts", metavar="FILE", help="Text file with one prompt a line, for text-to-image models."
    ),
]
Backend = Annotated[
    str,
    typer.Option(
        "--backend",
        metavar="NAME",
        help=(
            "What a quantized model computes with: auto, float, simulated, "
            "reference, operators, torch, openvino or cuda."
        ),
    ),
]
WeightForm = Annotated[
    str,
    typer.Option(
        "--weights", metavar="FORM", help="Integer weights in memory: unpacked is faster, packed is smaller."
    ),
]
Cluster = Annotated[
    str | None,
    typer.Option(
        "--cluster",
        metavar="[ADDRESS]",
        help="Share the work among processes of this machine, or of the Ray cluster at HOST:PORT.",
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(
        "--workers", min=1, metavar="N", help="Of --cluster, at the same time. Default: one for each CPU."
    ),
]
Threads = Annotated[int, typer.Option("--threads", min=1, metavar="T", help="Of each worker of --cluster.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")]


def beside(directory: str, suffix: str) -> Path:
    """Return the path beside a directory that has its name and a suffix.

    >>> beside("runs/model/", ".report").name
    'model.report'
    """
    path = Path(os.path.abspath(directory))
    return path.with_name(path.name + suffix)


def read_prompts(path: Path | None) -> tuple[str, ...]:
    """Return the lines of a prompt file that are not blank; none without a file.

    Raises:
        ValueError: the file holds no prompt, or is not UTF-8 text.
        OSError: it cannot be read.
    """
    if path is None:
        return ()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise ValueError(f"{path} holds no prompt; write one a line")
    return prompts


SIZES = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
SECONDS = {"": 1, "S": 1, "M": 60, "MIN": 60, "H": 3600}


def _measured(text: str, units: dict[str, int], hint: str, example: str) -> float:
    found = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*([A-Za-z]*)", text.strip())
    if found is None or found[2].upper() not in units or not float(found[1]) > 0:
        raise typer.BadParameter(
            f"{text!r} is not above 0 in {', '.join(unit for unit in units if unit)}; give it like {example}",
            param_hint=hint,
        )
    return float(found[1]) * units[found[2].upper()]


def parse_bytes(text: str, hint: str) -> int:
    """Return the bytes that a text like `4GiB` or `500MB` names.

    >>> parse_bytes("1.5GiB", "--max-memory")
    1610612736

    Raises:
        typer.BadParameter: it names none.
    """
    return int(_measured(text, SIZES, hint, "4GiB"))


def parse_seconds(text: str, hint: str) -> float:
    """Return the seconds that a text like `10m` or `90s` names.

    >>> parse_seconds("10m", "--time-budget")
    600.0

    Raises:
        typer.BadParameter: it names none.
    """
    return _measured(text, SECONDS, hint, "10m")


def check_module(text: str | None) -> "ModuleFile | None":
    """Return what `--module` names; None without it.

    Raises:
        typer.BadParameter: it names no function of a file.
    """
    if text is None:
        return None
    from tfmq.models.module_file import ModuleFile

    try:
        return ModuleFile.parse(text)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--module") from error


def check_model(model: str | None, module: str | None) -> None:
    """Refuse a command that names no model.

    Raises:
        typer.BadParameter: there is neither MODEL nor `--module`.
    """
    if model is None and module is None:
        raise typer.BadParameter(
            "give a MODEL, or --module FILE.py:FUNCTION for one of your own", param_hint="MODEL"
        )


def check_reference(reference: str | None, module: str | None, *, needed: bool = True) -> None:
    """Refuse a command with no original to compare with, or with two.

    Raises:
        typer.BadParameter: there is neither `--reference` nor `--module` where one is `needed`, or there are
            both.
    """
    if reference is not None and module is not None:
        raise typer.BadParameter(
            "--module brings the original itself; leave one of them out", param_hint="--reference"
        )
    if needed and reference is None and module is None:
        raise typer.BadParameter(
            "give the MODEL that it was made from, or --module FILE.py:FUNCTION for one of your own",
            param_hint="--reference",
        )


def check_execution(backend: str, weights: str, device: str = "CPU") -> "Options":
    """Return the options of a backend, `device` that of OpenVINO, after refusing what no machine knows.

    Raises:
        typer.BadParameter: no such backend, or no such form of weights.
    """
    from tfmq.backends.backend import Options
    from tfmq.backends.execution import backend_names

    if backend not in backend_names():
        raise typer.BadParameter(
            f"there is no backend {backend!r}; give one of {', '.join(backend_names())}",
            param_hint="--backend",
        )
    try:
        return Options(weights=weights, device=device)  # type: ignore[arg-type]
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--weights") from error


def with_addresses(arguments: Sequence[str]) -> list[str]:
    """Return the arguments with an address after each `--cluster` that has none.

    >>> with_addresses(["sample", "--cluster", "DIR"])
    ['sample', '--cluster', 'local', 'DIR']
    """
    found: list[str] = []
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=False):
        found.append(argument)
        if argument == "--cluster" and not ADDRESS.fullmatch(following):
            found.append(LOCAL)
    return found


def check_cluster(
    address: str | None, workers: int | None, threads: int, *, device: str | None
) -> "Place | None":
    """Return where the work is done; None for this process. Options that a cluster alone would heed are
    warned about.
    """
    from tfmq.cluster.crew import Cluster as Place

    if address is None:
        if workers is not None or threads != 1:
            warnings.warn("--workers and --threads have no effect without --cluster", stacklevel=2)
        return None
    gpus = 1 if device is not None and device.startswith("cuda") else 0
    return Place(address=None if address == LOCAL else address, workers=workers, threads=threads, gpus=gpus)
