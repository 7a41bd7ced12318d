"""`tfmq bench`."""

import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tfmq.cli.devices import check_device
from tfmq.cli.options import (
    Device,
    Directory,
    Json,
    Module,
    Prompts,
    Steps,
    check_module,
    check_reference,
    read_prompts,
)
from tfmq.cli.outcome import complain, emit, verb

if TYPE_CHECKING:
    from tfmq.evaluation.cost.variant import Kind
    from tfmq.models.module_file import ModuleFile

# Variants that are measured unless others are named, by kind of device. Those after the bar compile for
# minutes and need --thorough.
BACKENDS = {"cpu": "simulated,torch,openvino|,torch-compile", "cuda": "simulated,cuda|,cuda-compile"}
# Number of rounds unless another is asked for: without --thorough, and with it.
QUICK_ROUNDS, ROUNDS = 3, 10


def bench(
    directory: Directory,
    reference: Annotated[
        str | None,
        typer.Option(
            "--reference", metavar="MODEL", help="The model that it was made from: SQNR is against it."
        ),
    ] = None,
    module: Module = None,
    backends: Annotated[
        str | None,
        typer.Option(
            "--backends",
            metavar="A,B",
            help=(
                "simulated, reference, torch, torch-compile, openvino, "
                "cuda, cuda-compile. Default: the device's."
            ),
        ),
    ] = None,
    peers: Annotated[
        str,
        typer.Option(
            "--peers",
            metavar="A,B",
            help="all, none, or some of: fp32-compile, openvino-nncf, onnxruntime-int8, ...",
        ),
    ] = "none",
    batch: Annotated[str, typer.Option("--batch", metavar="1,4", help="Rows of one denoiser call.")] = "1",
    rounds: Annotated[
        int | None,
        typer.Option(
            "--rounds",
            min=1,
            help="Rounds without foreign load behind each median. Default: 3, with --thorough 10.",
        ),
    ] = None,
    thorough: Annotated[
        bool,
        typer.Option("--thorough", help="Measure backends that compile for minutes too, in more rounds."),
    ] = False,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="Of each variant. Default: one for each processor.")
    ] = None,
    steps: Steps = None,
    device: Device = None,
    prompts: Prompts = None,
    json: Json = False,
) -> None:
    """Measure time, memory, bytes and accuracy of a denoising step by tfmq's backends and by other libraries,
    against float32.
    """
    with verb():
        from tfmq.evaluation.cost.system import describe_machine, processors

        check_device(device)
        check_reference(reference, module, needed=False)
        device = device or "cpu"
        known, _, slow = BACKENDS.get(device.partition(":")[0], "simulated").partition("|")
        backends = backends or known + (slow if thorough else "")
        rounds = rounds or (ROUNDS if thorough else QUICK_ROUNDS)
        variants = [*_chosen(backends, "backend", "--backends"), *_chosen(peers, "peer", "--peers")]
        sizes = _sizes(batch)
        threads = threads or len(processors())
        options = {
            "variants": variants,
            "batches": sizes,
            "rounds": rounds,
            "threads": threads,
            "device": device,
        }
        measured = _measured(
            directory, reference, check_module(module), steps=steps, prompts=read_prompts(prompts), **options
        )
        result = {"machine": describe_machine(threads, device=device), **measured}
    if json:
        emit(result)
    else:
        from tfmq.cli.tables import show_bench

        show_bench(result, exact=reference is not None or module is not None)


def _chosen(text: str, kind: "Kind", option: str) -> list[str]:
    """Return the variants that an option names.

    Raises:
        typer.BadParameter: one of them is unknown.
    """
    import tfmq.evaluation.cost.variants  # noqa: F401 - fills the registry
    from tfmq.evaluation.cost.variant import names_of

    known = names_of(kind)
    if text in ("all", "none"):
        return list(known) if text == "all" else []
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise typer.BadParameter(
                f"there is no {kind} {name!r}; give all, none, or some of {', '.join(known)}",
                param_hint=option,
            )
    return names


def _sizes(text: str) -> list[int]:
    """Return the batch sizes that `--batch` names.

    Raises:
        typer.BadParameter: one of them is no positive number.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and int(part) for part in parts):
        raise typer.BadParameter(
            f"{text!r} is no list of batch sizes; give 1,4,16 or the like", param_hint="--batch"
        )
    return list(dict.fromkeys(int(part) for part in parts))


def _measured(
    directory: str,
    reference: str | None,
    module: "ModuleFile | None",
    *,
    steps: int | None,
    prompts: tuple[str, ...],
    **options: Any,
) -> dict[str, Any]:
    """Run the benchmark in a temporary folder; return the sha256 of the quantized tensors, and the rows."""
    import torch

    from tfmq.artifact import PIPELINE_FILE, stored_manifest
    from tfmq.cli.models import STEPS, open_model, quantized_directory
    from tfmq.cli.progress import foretell, shown_progress
    from tfmq.evaluation.cost.pipeline import Request, bench, expected_seconds
    from tfmq.integrations.diffusers.quiet import quiet
    from tfmq.nn.swap import is_quantized

    began, source = time.perf_counter(), quantized_directory(directory)
    calibrated = stored_manifest(source).provenance.calibrated_steps
    torch.set_num_threads(options["threads"])
    with quiet(), shown_progress() as progress, tempfile.TemporaryDirectory(prefix="tfmq-bench-") as folder:
        sampler = open_model(reference if reference or module else directory, module=module, prompts=prompts)
        if reference is not None and is_quantized(sampler.denoiser.module):
            raise ValueError("the reference is quantized itself; pass the full-precision model")
        component = source / sampler.component if (source / PIPELINE_FILE).exists() else source  # type: ignore[attr-defined]
        steps = steps or calibrated or STEPS
        request = Request(
            directory=component, sampler=sampler, model=source.name, steps=steps, module=module, **options
        )

        def note(line: str) -> None:
            complain(line, kind="skipped")

        foretell(
            expected_seconds(request, opened=time.perf_counter() - began),
            "starts and rounds; compiling comes on top",
        )
        rows = [asdict(row) for row in bench(request, folder=Path(folder), note=note, progress=progress)]
        return {"weights": stored_manifest(component).digest, "rows": rows}
