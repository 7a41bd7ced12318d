"""`tasks.py` installs what is missing, once, and reports the first failing step."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest


class Calls(list[list[str]]):
    """Stands in for `subprocess.run`: records each command, and fails those that contain a word of `failing`."""

    def __init__(self, failing: set[str]) -> None:
        super().__init__()
        self.failing = failing

    def __call__(self, command: list[object], **_: object) -> subprocess.CompletedProcess[bytes]:
        words = [str(word) for word in command]
        self.append(words)
        return subprocess.CompletedProcess(words, int(any(word in self.failing for word in words)))

    def matching(self, word: str) -> list[list[str]]:
        return [words for words in self if any(word in given for given in words)]


@pytest.fixture
def tasks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tasks", Path(__file__).resolve().parent.parent / "tasks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def pyproject(tmp_path: Path) -> Path:
    path = tmp_path / "pyproject.toml"
    path.write_text("[project]", encoding="utf-8")
    return path


def install(tasks: ModuleType, monkeypatch: pytest.MonkeyPatch, extra: str, pyproject: Path, *failing: str) -> Calls:
    calls = Calls(set(failing))
    monkeypatch.setattr(tasks.subprocess, "run", calls)
    tasks.install(pyproject.parent, extra, pyproject=pyproject)
    return calls


def test_a_present_torch_is_kept(tasks: ModuleType, monkeypatch: pytest.MonkeyPatch, pyproject: Path) -> None:
    calls = install(tasks, monkeypatch, "all", pyproject)
    assert not calls.matching("torch==") and calls.matching(".[all]")


def test_a_missing_torch_is_installed_first(tasks: ModuleType, monkeypatch: pytest.MonkeyPatch, pyproject: Path) -> None:
    calls = install(tasks, monkeypatch, "all", pyproject, "import torch")
    assert [words[-1] for words in calls] == ["import torch", tasks.TORCH, ".[all]"]


@pytest.mark.parametrize(("first", "second", "again"), [("all", "all", False), ("dev", "all", False), ("all", "dev", True)])
def test_a_stamp_spares_the_installation(
    tasks: ModuleType, monkeypatch: pytest.MonkeyPatch, pyproject: Path, first: str, second: str, again: bool
) -> None:
    install(tasks, monkeypatch, first, pyproject)
    assert bool(install(tasks, monkeypatch, second, pyproject)) is again


def test_another_pyproject_is_installed_again(tasks: ModuleType, monkeypatch: pytest.MonkeyPatch, pyproject: Path) -> None:
    install(tasks, monkeypatch, "dev", pyproject)
    pyproject.write_text("[project] # changed", encoding="utf-8")
    assert install(tasks, monkeypatch, "dev", pyproject)


def test_a_failed_installation_leaves_no_stamp(tasks: ModuleType, monkeypatch: pytest.MonkeyPatch, pyproject: Path) -> None:
    with pytest.raises(SystemExit, match=r"error: pip could not install tfmq\[dev\]"):
        install(tasks, monkeypatch, "dev", pyproject, ".[dev]")
    assert install(tasks, monkeypatch, "dev", pyproject)


def test_the_first_failing_step_ends_the_run(tasks: ModuleType, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        tasks.run_all(Path(sys.executable), [["json.tool", "--help"], ["json.tool", "absent.json"], ["this"]], environment={})
    assert stopped.value.code not in (0, None)
    assert "Beautiful" not in capfd.readouterr().out


def test_an_own_interpreter_is_used_as_it_is(tasks: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(set())
    monkeypatch.setattr(tasks.subprocess, "run", calls)
    monkeypatch.setenv("TFMQ_PYTHON", sys.executable)
    python, environment = tasks.prepare("dev", system_site_packages=False)
    assert python == Path(sys.executable) and environment["PYTHONPATH"].startswith(str(tasks.ROOT / "src")) and not calls


def test_an_absent_interpreter_is_named(tasks: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TFMQ_PYTHON", "nowhere/python")
    with pytest.raises(SystemExit, match="TFMQ_PYTHON is not a file: nowhere/python"):
        tasks.prepare("dev", system_site_packages=False)
