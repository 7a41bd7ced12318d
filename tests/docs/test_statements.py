"""What CONTRIBUTING.md, CHANGELOG.md, SECURITY.md and the log say of the project, held to its files."""

import ast
import re
import tomllib
from pathlib import Path

from tfmq.recipes import yaml
from tfmq.reconstruction.solvers import SOLVERS
from tfmq.storage import atomic, checkpoint, container
from tfmq.studio.origin import NAMES

ROOT = Path(__file__).resolve().parents[2]
COMMAND = re.compile(r"`python (benchmarks/\w+\.py)([^`]*)`")


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_changelog_knows_the_version() -> None:
    version = tomllib.loads(page("pyproject.toml"))["project"]["version"]
    text = page("CHANGELOG.md")
    assert f"## [{version}]" in text and "## [Unreleased]" in text
    assert f"The format on disk is at version {checkpoint.FORMAT_VERSION}." in text
    assert all(f"`{solver}`" in text for solver in SOLVERS)


def test_the_limits_are_those_of_the_code() -> None:
    text = page("SECURITY.md")
    assert f"{atomic.JSON_BYTES // 2**20} MiB and {atomic.JSON_DEPTH} levels" in text
    assert f"a safetensors header has at most {container._HEADER_LIMIT // 2**20} MiB" in text
    assert f"{yaml.MOST_BYTES // 2**10} KiB, {yaml.MOST_DEPTH} levels and {yaml.MOST_VALUES} values" in text
    assert f"answers on {NAMES[0]} alone" in text


def test_every_load_of_a_torch_file_is_guarded() -> None:
    loads = [
        (path, node)
        for path in (ROOT / "src" / "tfmq").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"
    ]
    assert loads and all("weights_only=True" in ast.unparse(node) for _, node in loads)


def test_commands_of_the_log_name_scripts_and_their_options() -> None:
    commands = COMMAND.findall(page("docs/log.md"))
    assert len(commands) > 5
    for script, arguments in commands:
        source = page(script)
        assert all(f'"{option}"' in source for option in re.findall(r"--[\w-]+", arguments)), (
            script,
            arguments,
        )


def test_the_log_repeats_figures_that_are_written_where_it_says() -> None:
    for line in page("docs/log.md").splitlines():
        pages = re.findall(r"\]\(([\w.]+\.md)", line)
        figures = re.findall(r"\b\d+\.\d\d+\b", line)
        text = "".join(page(f"docs/{name}") for name in pages)
        assert not pages or all(figure in text for figure in figures), line


def test_scripts_and_tests_that_are_named_exist() -> None:
    for name in ("CONTRIBUTING.md", "SECURITY.md"):
        for path in re.findall(r"(?:src/tfmq|tests|docs|benchmarks)/[\w/.]*\w", page(name)):
            assert (ROOT / path).exists(), (name, path)
