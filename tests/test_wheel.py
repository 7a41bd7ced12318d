"""The wheel, in an environment without the source tree: what is in it, and the README's lines of Python."""

import re
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LARGEST = 25 * 10**6  # bytes: the embedded model and the judge's weights are most of it

# Before the README's lines: one short step of everything that takes long.
QUICK = """
from dataclasses import replace
from pathlib import Path
import sys

import tfmq

assert Path(tfmq.__file__).is_relative_to(sys.prefix), tfmq.__file__
assert not {"diffusers", "transformers", "matplotlib"} & set(sys.modules), "import tfmq is heavy"
# diffusers imports these where they are, for seconds; the embedded model needs none of them.
sys.modules |= dict.fromkeys(["peft", "scipy", "transformers"])

from tfmq.backends.auto import CANDIDATES
from tfmq.recipes import Calibration, presets

CANDIDATES["cpu"] = ("float",)
recipe = tfmq.scheme("rtn_w4a8")
weights, activations = (replace(part, ranges="min_max") for part in (recipe.weights, recipe.activations))
calibration = Calibration(samples=1, steps=1, batch_size=1)
recipe = replace(recipe, weights=weights, activations=activations, calibration=calibration)
presets._SCHEMES["w4a8"] = lambda: recipe
"""


def run(*command: object, cwd: Path) -> str:
    done = subprocess.run([str(word) for word in command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    run(
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--wheel-dir",
        folder,
        ROOT,
        cwd=folder,
    )
    (path,) = folder.glob("tfmq-*.whl")
    return path


def test_the_wheel_holds_the_package_and_no_more(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    folders = {name.partition("/")[0] for name in names}
    assert "tfmq" in folders and all(name == "tfmq" or name.endswith(".dist-info") for name in folders)
    shipped = {
        path.relative_to(ROOT / "src").as_posix()
        for path in (ROOT / "src" / "tfmq").rglob("*")
        if path.is_file()
    }
    assert {name for name in shipped if "__pycache__" not in name} == {
        name for name in names if name.startswith("tfmq/")
    }
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    assert wheel.stat().st_size < LARGEST


def test_the_readme_runs_from_the_wheel(wheel: Path, tmp_path: Path) -> None:
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=False, symlinks=True)
    python = environment / "bin" / "python"
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--no-compile",
        "--no-deps",
        "--no-index",
        wheel,
        cwd=tmp_path,
    )
    (own,) = environment.glob("lib/python*/site-packages")
    # The dependencies are those of this environment. Its own .pth files, one of which may lead to the source
    # tree, are not read.
    present = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (own / "dependencies.pth").write_text("\n".join(present), encoding="utf-8")
    found = re.search(
        r"^```python test small\n(.*?)^```$",
        (ROOT / "README.md").read_text(encoding="utf-8"),
        re.MULTILINE | re.DOTALL,
    )
    assert found is not None
    folder = tmp_path / "empty"
    folder.mkdir()
    run(python, "-I", "-c", QUICK + found[1], cwd=folder)
    assert (folder / "digit.png").is_file() and (folder / "digits" / "unet" / "config.json").is_file()
