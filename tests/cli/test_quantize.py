"""`tfmq quantize`: its report, its files, interruption and continuation."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from tfmq.storage.journal import Journal

Run = Callable[..., Any]
KEYS = {
    "output_dir",
    "scheme",
    "seconds",
    "time_budget",
    "memory",
    "bytes",
    "units",
    "temporal",
    "sha256",
    "floating",
    "judged",
    "pooled",
    "correction",
    "tuning",
    "components",
}


def contents(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def test_report_and_same_seed_same_bytes(
    tfmq: Run, model: Path, recipe: Path, quantized: Path, tmp_path: Path
) -> None:
    result = tfmq("quantize", model, "--output-dir", tmp_path / "q", "--recipe", recipe, "--json")
    assert result.status == 0 and result.json.keys() == KEYS
    report = result.json
    assert (
        report["output_dir"] == str(tmp_path / "q") and report["scheme"] == "quick" and report["seconds"] > 0
    )
    on_disk = sum(path.stat().st_size for path in (tmp_path / "q" / "unet").iterdir())
    unet = torch.nn.Module.parameters(_unet(model))
    assert report["bytes"] == {"fp32": 4 * sum(p.numel() for p in unet), "quantized": on_disk}
    assert len(report["units"]) > 8
    for unit in report["units"]:
        assert unit.keys() == {"name", "error_before", "error_after", "iterations", "seconds"}
        assert unit["error_after"] >= 0 and unit["seconds"] > 0
    config = json.loads((tmp_path / "q" / "unet" / "config.json").read_text())
    assert 0 < report["floating"]["share"] < 0.5 and {
        module["reason"] for module in report["floating"]["modules"]
    } == {"norm"}
    assert report["floating"]["bytes"] == sum(module["bytes"] for module in report["floating"]["modules"])
    assert report["sha256"] == config["quantization_config"]["digest"]
    assert (
        "calibration: sampling" in result.err
        and "units: reconstruction" in result.err
        and "Loading" not in result.err
    )
    assert [path.name for path in tmp_path.iterdir()] == ["q"]
    assert contents(tmp_path / "q") == contents(quantized)


def test_limits_are_kept_and_reported(
    tfmq: Run, model: Path, recipe: Path, quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the time that either stage will take, as other verbs say theirs in test_outcome.py."""
    limits = ("--max-memory", "256MiB", "--time-budget", "30m")
    result = tfmq("quantize", model, "--output-dir", tmp_path / "q", "--recipe", recipe, "--json", *limits)
    assert result.status == 0 and result.json["time_budget"] == 1800
    assert result.json["memory"]["limit_bytes"] == 256 * 2**20 and result.json["memory"]["peak_bytes"] > 10**7
    assert all(unit["error_after"] <= unit["error_before"] for unit in result.json["units"])
    monkeypatch.setattr("tfmq.cli.progress.SHORT", 0.0)
    free = tfmq(
        "quantize",
        model,
        "--output-dir",
        tmp_path / "f",
        "--recipe",
        recipe,
        "--json",
        "--max-memory",
        "256MiB",
    )
    assert free.json["sha256"] == json.loads((quantized / "tfmq_report.json").read_text())["sha256"]
    assert sum(line.startswith("about ") for line in free.err.splitlines()) == 2, free.err


@pytest.mark.parametrize(
    "wrong",
    [("--max-memory", "4 sheep"), ("--max-memory", "0"), ("--time-budget", "soon"), ("--time-budget", "-1m")],
)
def test_limits_that_say_nothing_are_refused(
    tfmq: Run, model: Path, tmp_path: Path, wrong: tuple[str, str]
) -> None:
    result = tfmq("quantize", model, "--output-dir", tmp_path / "q", *wrong)
    assert result.status == 2 and wrong[0] in result.err and not (tmp_path / "q").exists()


def _unet(model: Path) -> torch.nn.Module:
    from diffusers import UNet2DModel

    return UNet2DModel.from_pretrained(model, subfolder="unet")


def test_another_seed_other_bytes(quantized: Path, other_quantized: Path) -> None:
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert contents(other_quantized)[weights] != contents(quantized)[weights]


def test_numbers_override_the_recipe(tfmq: Run, model: Path, recipe: Path, tmp_path: Path) -> None:
    numbers = ("--steps", 1, "--calib-size", 3, "--iterations", 0)
    assert tfmq("quantize", model, "--output-dir", tmp_path / "q", "--recipe", recipe, *numbers).status == 0
    config = json.loads((tmp_path / "q" / "unet" / "config.json").read_text())["quantization_config"]
    used = config["provenance"]["recipe"]
    assert (used["calibration"]["steps"], used["calibration"]["samples"], used["learning"]["iterations"]) == (
        1,
        3,
        0,
    )
    assert config["structure"]["steps"] == 1
    assert tfmq("sample", tmp_path / "q", "--num-images", 1, "--output-dir", tmp_path / "s").status == 0


def test_schemes_by_name(tfmq: Run, model: Path, tmp_path: Path) -> None:
    numbers = ("--steps", 2, "--calib-size", 1)
    result = tfmq("quantize", model, "--output-dir", tmp_path / "q", "--scheme", "rtn_w8a8", *numbers)
    assert result.status == 0
    for word in ("rtn_w8a8", "conv_in", "error, found", "mismatches", "sha256"):
        assert word in result.out
    layers = tfmq("inspect", tmp_path / "q", "--json").json["layers"]
    assert {(layer["weight_bits"], layer["activation_bits"]) for layer in layers} == {(8, 8)}


def test_an_output_directory_that_is_taken(tfmq: Run, model: Path, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "q").mkdir()
    (tmp_path / "q" / "thesis.tex").write_text("years")
    result = tfmq("quantize", model, "--output-dir", tmp_path / "q", "--recipe", recipe)
    assert result.status == 1 and "thesis.tex" in result.err and result.err.count("\n") == 1
    assert contents(tmp_path) == {"q/thesis.tex": b"years"}


def test_a_finished_job_is_not_done_again(tfmq: Run, model: Path, recipe: Path, quantized: Path) -> None:
    before = contents(quantized)
    command = ("quantize", model, "--output-dir", quantized, "--recipe", recipe)
    result = tfmq(*command, "--resume", "--json")
    assert result.status == 0 and result.json.keys() == KEYS and result.err == ""
    assert {unit["seconds"] for unit in result.json["units"]} == {0.0}
    for refused, cause in (
        (command, "already holds"),
        ((*command, "--resume", "--seed", "5"), "another seed"),
    ):
        result = tfmq(*refused)
        assert result.status == 1 and cause in result.err and result.err.count("\n") == 1
    assert contents(quantized) == before


@pytest.mark.parametrize("place", ["tfmq.artifact.write_json", "tfmq.storage.atomic._sync"])
def test_a_full_disk(
    tfmq: Run, model: Path, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    command = ("quantize", model, "--output-dir", tmp_path / "q", "--recipe", recipe)
    with monkeypatch.context() as patched:
        patched.setattr(place, full)
        result = tfmq(*command)
    assert result.status == 1 and result.out == ""
    assert result.err.splitlines()[-1].startswith("error: ") and "No space left" in result.err
    assert not list((tmp_path / "q").iterdir())
    assert not (tmp_path / "q.partial").exists()
    # With space again the job goes on.
    assert tfmq(*command, "--resume").status == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(
    tfmq: Run, model: Path, recipe: Path, tmp_path: Path, value: float
) -> None:
    from diffusers import DDIMPipeline

    pipeline = DDIMPipeline.from_pretrained(model)
    with torch.no_grad():
        pipeline.unet.mid_block.resnets[0].conv1.weight[0, 0, 0, 0] = value
    pipeline.save_pretrained(tmp_path / "broken")
    result = tfmq("quantize", tmp_path / "broken", "--output-dir", tmp_path / "q", "--recipe", recipe)
    assert result.status == 1 and "mid_block.resnets.0.conv1" in result.err and result.err.count("\n") == 1
    assert not (tmp_path / "q").exists()


# Forks a process for each line of arguments, so that torch is imported once; itself it computes nothing,
# which forking needs. There are a terminal's Ctrl-C, which a shell that starts jobs in the background lets
# them ignore; a unit that takes so long that the signal meets it; and no diffusers, which takes seconds to
# import only to be hushed.
SLOW = """
import os, signal, sys, time
from contextlib import nullcontext
from types import SimpleNamespace
import torch._dynamo
import tfmq.artifact, tfmq.cluster.quantization, tfmq.jobs.workflow
from tfmq.cli.app import main
from tfmq.storage.journal import Journal

sys.modules["tfmq.integrations.diffusers.quiet"] = SimpleNamespace(quiet=nullcontext)
for line in sys.stdin:
    slow, folder, *sys.argv[1:] = line.rstrip().split("|")
    child, stage = os.fork(), Journal.stage
    if child == 0:
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(os.path.join(folder, name), os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        Journal.stage = lambda own, name, compute: stage(
            own, name, (lambda: time.sleep(600)) if name == slow else compute
        )
        sys.exit(main())
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Ended(NamedTuple):
    """How a process ended that got a signal."""

    status: int
    out: str
    err: str


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks, and signals of POSIX")
def test_interrupted_killed_and_continued(
    tfmq: Run,
    own: Path,
    made: Path,
    recipe: Path,
    tmp_path: Path,
    environment: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = ["quantize", "--module", f"{own / 'own.py'}:build", "--recipe", str(recipe)]
    arguments += ["--output-dir", str(tmp_path / "parts")]
    job = tmp_path / "parts.job"
    (tmp_path / "said").mkdir()

    def signalled(number: signal.Signals, slow: str, after: str, *more: str) -> Ended:
        """Signal a process once a file is there, while it works on the unit `slow`."""
        parent.stdin.write("|".join([slow, str(tmp_path / "said"), *arguments, *more]) + "\n")
        parent.stdin.flush()
        child, began = int(parent.stdout.readline()), time.monotonic()
        while not (job / after).exists():
            os.kill(child, 0)
            assert time.monotonic() - began < 600, f"{after} never came"
            time.sleep(0.01)
        os.kill(child, number)
        status = int(parent.stdout.readline())
        return Ended(status, *((tmp_path / "said" / name).read_text() for name in ("out", "err")))

    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", SLOW], env=environment, **pipes) as process:
        parent: Any = process
        ended = signalled(signal.SIGINT, "unit_0001", "unit_0000.safetensors")
        assert ended.status == 130 and ended.out == ""
        last = ended.err.splitlines()[-1]
        assert last.startswith("error: interrupted") and "--resume" in last and "Traceback" not in ended.err
        ended = signalled(signal.SIGKILL, "unit_0002", "unit_0001.safetensors", "--resume")
        assert ended.status == -signal.SIGKILL
        parent.stdin.close()
    assert not list((tmp_path / "parts").iterdir()) and job.exists()
    done = {path.name: path.stat().st_mtime_ns for path in job.glob("*.safetensors")}
    assert {"unit_0000.safetensors", "unit_0001.safetensors"} < done.keys()
    assert "unit_0002.safetensors" not in done
    # Seen in the moment before the job is cleared away: what was done stayed done.
    left: dict[str, int] = {}
    monkeypatch.setattr(
        Journal,
        "remove",
        lambda _: left.update({path.name: path.stat().st_mtime_ns for path in job.glob("*.safetensors")}),
    )
    assert tfmq(*arguments, "--resume").status == 0
    assert {name: left[name] for name in done} == done and "unit_0002.safetensors" in left
    assert contents(tmp_path / "parts") == contents(made)
