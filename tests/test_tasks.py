"""`tasks.py` installs what is missing, once, and reports the first failing step."""

import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


class Calls(list[list[str]]):
    """Stands in for `subprocess.run`: records each command, and fails those that contain a word of `failing`.

    The `torch` that is there is a version and its requirements; None has no torch until one is installed.
    """

    def __init__(self, failing: set[str], torch: tuple[str, list[str]] | None = ("2.13.0", [])) -> None:
        super().__init__()
        self.failing, self.torch, self.constraints = failing, torch, list[str]()

    def __call__(self, command: list[object], **_: object) -> subprocess.CompletedProcess[str]:
        words = [str(word) for word in command]
        self.append(words)
        if "--constraint" in words:
            self.constraints.append(Path(words[words.index("--constraint") + 1]).read_text(encoding="utf-8"))
        absent = self.torch is None and "import json, torch" in words[-1]
        if words[-1].startswith("torch=="):
            self.torch = (words[-1].removeprefix("torch=="), [])
        failed = absent or any(word in self.failing for word in words)
        return subprocess.CompletedProcess(words, int(failed), json.dumps(self.torch))

    def matching(self, word: str) -> list[list[str]]:
        return [words for words in self if any(word in given for given in words)]


@pytest.fixture
def tasks(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("tasks.py")


@pytest.fixture
def pyproject(tmp_path: Path) -> Path:
    (tmp_path / "constraints.txt").write_text(
        "# exact\nnumpy==2.4.6\nSetup_Tools==84.0\ntriton==3.9.0\n", encoding="utf-8"
    )
    path = tmp_path / "pyproject.toml"
    path.write_text("[project]", encoding="utf-8")
    return path


def install(
    tasks: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    extra: str,
    pyproject: Path,
    *failing: str,
    torch: tuple[str, list[str]] | None = ("2.13.0", []),
    locked: bool = True,
) -> Calls:
    calls = Calls(set(failing), torch)
    monkeypatch.setattr(tasks.subprocess, "run", calls)
    tasks.install(
        pyproject.parent,
        extra,
        pyproject=pyproject,
        constraints=pyproject.with_name("constraints.txt"),
        locked=locked,
    )
    return calls


def test_a_present_torch_is_kept(tasks: ModuleType, monkeypatch: pytest.MonkeyPatch, pyproject: Path) -> None:
    calls = install(tasks, monkeypatch, "demo", pyproject, torch=("2.9.0+cu130", []))
    assert not calls.matching("torch==") and calls.matching(".[demo]")
    assert [text.splitlines()[-1] for text in calls.constraints] == ["torch==2.9.0+cu130"]


def test_a_missing_torch_is_installed_first(
    tasks: ModuleType, monkeypatch: pytest.MonkeyPatch, pyproject: Path
) -> None:
    calls = install(tasks, monkeypatch, "demo", pyproject, torch=None)
    assert [words[-1] for words in calls if "install" in words] == [tasks.TORCH, ".[demo]"]
    # A build for CUDA brings the one Triton that fits it, and says so once it is here.
    assert "triton" not in calls.constraints[0] and "triton==3.9.0" in calls.constraints[1]
    assert all("numpy==2.4.6" in text for text in calls.constraints)


@pytest.mark.parametrize(
    ("requirement", "left"),
    [
        ("setuptools<82", ["numpy", "triton"]),
        ('triton==3.7.1; platform_system == "Linux"', ["numpy", "Setup_Tools"]),
        ("setup-tools (~=80.1) ; python_version>='3.12'", ["numpy", "triton"]),
        ("setup.tools[core]!=70,<82", ["numpy", "triton"]),
        ('numpy>=1.26; python_version < "4"', ["numpy", "Setup_Tools", "triton"]),
    ],
)
def test_what_a_torch_limits_is_left_to_it(tasks: ModuleType, requirement: str, left: list[str]) -> None:
    constraints = "# exact\nnumpy==2.4.6\nSetup_Tools==84.0\ntriton==3.9.0\n".replace(
        "Setup_Tools", "setuptools" if "setuptools" in requirement else "Setup_Tools"
    )
    kept = tasks.applicable(constraints, ("2.9.0", (requirement,))).splitlines()
    assert [line.partition("==")[0] for line in kept] == ["# exact", *left, "torch"]


@pytest.mark.parametrize("extra", ["demo", "dev"])
def test_the_installation_is_seen(
    tasks: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    pyproject: Path,
    capsys: pytest.CaptureFixture[str],
    extra: str,
) -> None:
    calls = install(tasks, monkeypatch, extra, pyproject, torch=None)
    assert not any(word in ("--quiet", "-q") for words in calls for word in words)
    printed = capsys.readouterr().out
    assert (
        f"[1/2] installing {tasks.TORCH}" in printed
        and f"[2/2] installing tfmq[{extra}]" in printed
        and "installed in 0 s" in printed
    )


@pytest.mark.parametrize(
    ("first", "second", "again"), [("demo", "demo", False), ("dev", "demo", False), ("demo", "dev", True)]
)
def test_a_stamp_spares_the_installation(
    tasks: ModuleType, monkeypatch: pytest.MonkeyPatch, pyproject: Path, first: str, second: str, again: bool
) -> None:
    install(tasks, monkeypatch, first, pyproject)
    assert bool(install(tasks, monkeypatch, second, pyproject)) is again


def test_another_pyproject_is_installed_again(
    tasks: ModuleType, monkeypatch: pytest.MonkeyPatch, pyproject: Path
) -> None:
    install(tasks, monkeypatch, "dev", pyproject)
    pyproject.write_text("[project] # changed", encoding="utf-8")
    assert install(tasks, monkeypatch, "dev", pyproject)


def test_other_constraints_are_installed_again(
    tasks: ModuleType, monkeypatch: pytest.MonkeyPatch, pyproject: Path
) -> None:
    install(tasks, monkeypatch, "dev", pyproject)
    pyproject.with_name("constraints.txt").write_text("numpy==2.5.0\n", encoding="utf-8")
    assert "numpy==2.5.0" in install(tasks, monkeypatch, "dev", pyproject).constraints[0]


def test_new_constraints_come_from_the_newest_versions(
    tasks: ModuleType, monkeypatch: pytest.MonkeyPatch, pyproject: Path
) -> None:
    install(tasks, monkeypatch, "dev", pyproject)
    assert install(tasks, monkeypatch, "dev", pyproject, locked=False).constraints == ["torch==2.13.0\n"]


def test_pins_are_releases_and_know_their_python(tasks: ModuleType) -> None:
    def found(name: str, version: str, **fields: object) -> dict[str, dict[str, object]]:
        return {"metadata": {"name": name, "version": version, **fields}}

    torch = found(
        "torch",
        "2.13.0+cpu",
        requires_dist=["nvidia-nccl-cu13==2.28", "filelock", 'triton (==3.7.1) ; platform_system == "Linux"'],
    )
    others = [
        found("triton", "3.7.1"),
        found("nvidia_nccl.cu13", "2.28"),
        found("pip", "23.2"),
        found("tfmq", "0.1.0"),
    ]
    kept = [
        found("Zipp", "4.1.2", requires_python=">=3.9"),
        found("new_thing", "2.0+local", requires_python=">=3.12,<4"),
        found("filelock", "4.3.1"),
    ]
    lines = tasks.pins([torch, *others, *kept]).splitlines()
    assert [line for line in lines if not line.startswith("#")] == [
        "filelock==4.3.1",
        'new-thing==2.0; python_version >= "3.12"',
        "zipp==4.1.2",
    ]


def test_the_constraints_hold_what_the_extras_ask_for_and_no_torch(tasks: ModuleType) -> None:
    lines = [
        line
        for line in tasks.CONSTRAINTS.read_text(encoding="utf-8").splitlines()
        if not line.startswith("#")
    ]
    assert all(re.fullmatch(r'[a-z0-9-]+==[\w.!]+(; python_version >= "3\.\d+")?', line) for line in lines)
    names = [line.partition("==")[0] for line in lines]
    assert names == sorted(set(names)) and "torch" not in names
    project = tomllib.loads((tasks.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    asked, waiting = list(project["dependencies"]), ["demo", "dev"]
    while waiting:
        for requirement in extras[waiting.pop()]:
            nested = re.fullmatch(r"tfmq\[(.+)\]", requirement)
            waiting += nested[1].split(",") if nested else []
            asked += [] if nested else [requirement]
    assert len(asked) > 20 and {tasks.required(requirement)[0] for requirement in asked} - {"torch"} <= set(
        names
    )


def test_the_oldest_versions_are_those_that_the_project_allows(tasks: ModuleType) -> None:
    extras = tomllib.loads((tasks.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pins = dict(
        line.split("==")
        for line in tasks.OLDEST.read_text(encoding="utf-8").splitlines()
        if not line.startswith("#")
    )
    for requirement in extras["optional-dependencies"]["diffusers"]:
        name, least = requirement.split(">=")
        assert pins[name].split(".")[:2] == least.split(".")


def test_the_oldest_versions_are_installed_once_and_found_first(
    tasks: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ran: list[tuple[list[str], dict[str, str]]] = []

    def run(
        command: list[object], *, env: dict[str, str] | None = None, **_: object
    ) -> subprocess.CompletedProcess[str]:
        words = [str(word) for word in command]
        ran.append((words, env or {}))
        if "--target" in words:
            Path(words[words.index("--target") + 1]).mkdir()
        return subprocess.CompletedProcess(words, 0)

    monkeypatch.setattr(tasks.subprocess, "run", run)
    monkeypatch.setattr(tasks, "VENV", tmp_path)
    for _ in range(2):
        tasks.oldest(Path("python"), {"PYTHONPATH": "src"})
    assert ["pytest" in words for words, _ in ran] == [False, True, True]
    first, second = ran[1][1]["PYTHONPATH"].split(os.pathsep)
    assert Path(first).is_dir() and Path(first).parent == tmp_path and second == "src"


def test_a_failed_installation_leaves_no_stamp(
    tasks: ModuleType, monkeypatch: pytest.MonkeyPatch, pyproject: Path
) -> None:
    with pytest.raises(SystemExit, match=r"error: pip could not install tfmq\[dev\]"):
        install(tasks, monkeypatch, "dev", pyproject, ".[dev]")
    assert install(tasks, monkeypatch, "dev", pyproject)


def test_the_first_failing_step_ends_the_run(tasks: ModuleType, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        tasks.run_all(
            Path(sys.executable),
            [["json.tool", "--help"], ["json.tool", "absent.json"], ["this"]],
            environment={},
        )
    assert stopped.value.code not in (0, None)
    assert "Beautiful" not in capfd.readouterr().out


def test_steps_side_by_side_are_shown_in_their_order(
    tasks: ModuleType, capfd: pytest.CaptureFixture[str]
) -> None:
    steps = [(["json.tool", "absent.json"], {}), (["this"], {})]
    tasks.run_side_by_side(Path(sys.executable), steps[1:])
    assert "Beautiful" in capfd.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        tasks.run_side_by_side(Path(sys.executable), steps)
    shown = capfd.readouterr().out
    assert stopped.value.code not in (0, None)
    assert "$ json.tool absent.json" in shown and "absent.json'" in shown and "Beautiful" not in shown


def test_an_own_interpreter_is_used_as_it_is(tasks: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(set())
    monkeypatch.setattr(tasks.subprocess, "run", calls)
    monkeypatch.setenv("TFMQ_PYTHON", sys.executable)
    python, environment = tasks.prepare("dev", system_site_packages=False)
    assert (
        python == Path(sys.executable)
        and environment["PYTHONPATH"].startswith(str(tasks.ROOT / "src"))
        and not calls
    )


def test_an_absent_interpreter_is_named(tasks: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TFMQ_PYTHON", "nowhere/python")
    with pytest.raises(SystemExit, match="TFMQ_PYTHON is not a file: nowhere/python"):
        tasks.prepare("dev", system_site_packages=False)


def test_the_matrix_fails_with_its_script(tasks: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(set())
    monkeypatch.setattr(tasks.subprocess, "run", calls)
    tasks.matrix(Path(sys.executable), {})
    assert len(calls) == 1 and Path(calls[0][1]).is_file()
    monkeypatch.setattr(tasks.subprocess, "run", Calls({calls[0][1]}))
    with pytest.raises(SystemExit):
        tasks.matrix(Path(sys.executable), {})
