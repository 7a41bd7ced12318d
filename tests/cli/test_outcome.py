"""How a verb ends: one line, a status, and a stdout that holds the result alone."""

import errno
import logging
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

from tfmq.calibration.trajectory import CalibrationError
from tfmq.cli.outcome import complain, emit, job_hint, verb
from tfmq.errors import MissingExtraError
from tfmq.storage.errors import ChecksumError

Run = Callable[..., Any]


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("no such\n  thing"), "error: no such thing\n"),
        (ChecksumError("damaged"), "error: damaged\n"),
        (CalibrationError("NaN in conv_in"), "error: NaN in conv_in\n"),
        (MissingExtraError("install it"), "error: install it\n"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), "error: /x: Permission denied\n"),
        (KeyError("layer"), "error: unexpected KeyError: 'layer' (TFMQ_DEBUG=1 shows where)\n"),
        (ValueError(), "error: unexpected ValueError: (TFMQ_DEBUG=1 shows where)\n"),
    ],
)
def test_an_error_is_one_line_and_status_1(
    capsys: pytest.CaptureFixture[str], error: Exception, line: str
) -> None:
    with pytest.raises(typer.Exit) as left, verb():
        raise error
    assert left.value.exit_code == 1
    assert capsys.readouterr() == ("", line)


def test_a_torchvision_that_does_not_fit_is_named_below_whatever_failed_because_of_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(typer.Exit), verb():
        try:
            raise RuntimeError("operator torchvision::nms does not exist")
        except RuntimeError as error:
            raise RuntimeError(
                "Failed to import diffusers.pipelines.pipeline_utils (look up to see its traceback)"
            ) from error
    said = capsys.readouterr().err
    assert (
        said.startswith("error: the torchvision that is installed does not fit this torch")
        and "..." not in said
    )
    assert "--index-url" in said and "or remove it" in said


def test_a_long_message_is_cut(capsys: pytest.CaptureFixture[str]) -> None:
    complain("x" * 10_000)
    assert len(capsys.readouterr().err) < 1000


def test_debugging_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TFMQ_DEBUG", "1")
    with pytest.raises(KeyError), verb():
        raise KeyError("layer")


def test_ctrl_c(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as left, verb(interrupted="continue with --resume"):
        raise KeyboardInterrupt
    assert left.value.exit_code == 130
    assert capsys.readouterr() == ("", "error: interrupted; continue with --resume\n")


INTERRUPTED = """
import signal
# A process that began in the background may ignore it.
signal.signal(signal.SIGINT, signal.default_int_handler)
import typer
from tfmq.cli.outcome import verb
try:
    with verb(interrupted="continue"):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise RuntimeError("could not determine the shape") from None
except typer.Exit as left:
    assert left.exit_code == 130
assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
print("left")
"""


def test_ctrl_c_that_a_library_turned_into_something_else() -> None:
    """In a process of its own: engines of other tests leave a stack for signals behind that is freed already,
    on which this one would end.
    """
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True)
    assert done.stdout == "left\n" and "continue" in done.stderr, done.stderr


def test_stdout_is_for_the_result(capsys: pytest.CaptureFixture[str]) -> None:
    with verb():
        print("a library thinks aloud")
    emit({"a": 1.5})
    out, err = capsys.readouterr()
    assert out == '{\n "a": 1.5\n}\n' and err == "a library thinks aloud\n"


def test_a_result_that_json_lacks(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="JSON"):
        emit({"a": float("nan")})
    assert capsys.readouterr().out == ""


def _warn_as(filename: str, message: str, category: type[Warning] = UserWarning) -> None:
    warnings.warn_explicit(message, category, filename, 1)


def test_only_our_warnings_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    site = "/usr/lib/python3/site-packages"
    with verb():
        _warn_as(f"{site}/tfmq/quantizers/steps.py", "timestep 5 was\nnot calibrated")
        _warn_as("/usr/lib/python3/contextlib.py", "raised within a context")
        _warn_as(f"{site}/diffusers/utils.py", "something is outdated")
        _warn_as(f"{site}/tfmq/api.py", "for developers", DeprecationWarning)
    assert (
        capsys.readouterr().err
        == "warning: timestep 5 was not calibrated\nwarning: raised within a context\n"
    )


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_is_on_stderr(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    from tfmq.cli.progress import shown_progress

    monkeypatch.setenv("TERM", "xterm")
    if terminal:
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    else:
        monkeypatch.setattr("tfmq.cli.progress.INTERVAL", 0.0)
    with shown_progress() as progress, progress("reconstruction", 3) as advance:
        advance()
        advance(2)
    out, err = capsys.readouterr()
    assert out == "" and "reconstruction" in err
    if terminal:
        assert "3/3" in err and "eta" in err
    else:
        first, last = err.splitlines()
        assert (
            first.startswith("reconstruction: 1/3, ")
            and first.endswith(" left")
            and "done in 0:00:00" in last
        )


def test_a_failed_stage_prints_nothing_more(capsys: pytest.CaptureFixture[str]) -> None:
    from tfmq.cli.progress import shown_progress

    with pytest.raises(typer.Exit), verb(), shown_progress() as progress, progress("reconstruction", 3):
        raise ValueError("no")
    assert capsys.readouterr().err == "error: no\n"


@pytest.mark.parametrize(("text", "prompts"), [("a cat\n\n  a dog \n", ("a cat", "a dog")), ("x", ("x",))])
def test_prompt_files(tmp_path: Path, text: str, prompts: tuple[str, ...]) -> None:
    from tfmq.cli.options import read_prompts

    (tmp_path / "p.txt").write_text(text)
    assert read_prompts(tmp_path / "p.txt") == prompts
    assert read_prompts(None) == ()


@pytest.mark.parametrize(("content", "error"), [(b" \n", "no prompt"), (b"\xff\xfe\x00", "UTF-8")])
def test_bad_prompt_files(tmp_path: Path, content: bytes, error: str) -> None:
    from tfmq.cli.options import read_prompts

    (tmp_path / "p.txt").write_bytes(content)
    with pytest.raises(ValueError, match=error):
        read_prompts(tmp_path / "p.txt")


@pytest.mark.parametrize("fails", [False, True])
def test_notes_are_shown_where_the_verb_succeeds_and_an_error_is_one_line(
    capsys: pytest.CaptureFixture[str], fails: bool
) -> None:
    log = logging.getLogger("tfmq")
    before = log.level, list(log.handlers)
    try:
        with verb():
            log.info("auto: abacus computes it")
            if fails:
                raise ValueError("no such model")
    except typer.Exit:
        assert fails
    assert capsys.readouterr().err == (
        "error: no such model\n" if fails else "note: auto: abacus computes it\n"
    )
    assert (log.level, list(log.handlers)) == before


def test_ctrl_c_promises_to_continue_only_from_a_job_of_this_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tfmq.storage.journal import Journal

    job = tmp_path / "q.job"

    def said(*, opens: bool) -> str:
        with pytest.raises(typer.Exit), verb(interrupted=job_hint(job)):
            if opens:
                Journal(job, {"seed": 0}, resume=True)
            raise KeyboardInterrupt
        return capsys.readouterr().err

    assert said(opens=False) == "error: interrupted; nothing was written\n"
    assert said(opens=True) == f"error: interrupted; the same command with --resume continues from {job}\n"
    assert "as it was" in said(opens=False) and "continues" in said(opens=True)


def test_time_is_said_before_work_that_takes_some(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tfmq.cli.progress import foretell

    monkeypatch.setattr("tfmq.cli.progress.SHORT", 3.0)
    for seconds in (0.5, 40.2, 300.0, 9000.0, 7e6):
        foretell(seconds, "drawing")
    assert capsys.readouterr() == (
        "",
        "about 40 s: drawing\nabout 5 min: drawing\nabout 2.5 h: drawing\nabout 81 days: drawing\n",
    )


@pytest.mark.parametrize("verb", ["sample", "compare", "evaluate", "inspect"])
def test_verbs_say_their_time(
    tfmq: Run,
    model: Path,
    quantized: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    verb: str,
) -> None:
    """And `quantize` and `analyze`, in their own files."""
    monkeypatch.setattr("tfmq.cli.progress.SHORT", 0.0)
    # What `inspect` spends on timing a layer, which is said and not needed.
    monkeypatch.setattr("tfmq.evaluation.shapes.SECONDS", 1e-3)
    out, few = ("--output-dir", tmp_path / "o"), ("--num-images", 1, "--backend", "simulated")
    both = (quantized, "--reference", model)
    given: dict[str, tuple[object, ...]] = {
        "sample": (model, *out, "--num-images", 1, "--steps", 2),
        "compare": (*both, *out, *few),
        "evaluate": (*both, *out, *few, "--metrics", "psnr"),
        "inspect": (model, "--device"),
    }
    result = tfmq(verb, *given[verb])
    said = [line for line in result.err.splitlines() if line.startswith("about ")]
    assert result.status == 0 and len(said) == 1, result.err
