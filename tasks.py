"""Set up the project and run it: `python3 tasks.py demo` or `python3 tasks.py test`.

Either command works on a fresh machine with Python 3.11 or newer. It makes a virtual environment in `.venv`, installs torch and then the
project with the extras it needs, and skips all of that once a stamp says that the same `pyproject.toml` has been installed.

To use another torch than the one installed by default:

    python3 tasks.py demo --system-site-packages      a new .venv sees the packages, torch included, of the Python that runs this script
    TFMQ_PYTHON=/path/to/python python3 tasks.py demo  that interpreter is used as it is; nothing is created or installed
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
RUNS = Path("runs", "demo")
TORCH = "torch==2.13.0"
SATISFIED_BY = {"all": ("all", "dev"), "dev": ("dev",)}


def venv_python(venv: Path) -> Path:
    """Return where a virtual environment keeps its interpreter on this system."""
    return venv / "Scripts" / "python.exe" if os.name == "nt" else venv / "bin" / "python"


def succeeds(python: Path, *arguments: str) -> bool:
    """Return whether `python` with these arguments exits with 0, showing nothing."""
    return subprocess.run([python, *arguments], cwd=ROOT, capture_output=True).returncode == 0


def call(python: Path, *arguments: str, error: str) -> None:
    """Run `python` with these arguments, or exit with `error` in one line."""
    if subprocess.run([python, *arguments], cwd=ROOT).returncode:
        raise SystemExit(f"error: {error}")


def say(line: str) -> None:
    """Print a progress line ahead of anything a subprocess prints next."""
    print(line, flush=True)


def create_venv(venv: Path, *, system_site_packages: bool) -> None:
    """Make `venv` if it has no interpreter, and give it pip if it has none."""
    python = venv_python(venv)
    if not python.exists():
        say(f"creating {venv.name} ...")
        flags = ["--system-site-packages"] if system_site_packages else []
        missing = "could not create the environment; on Debian and Ubuntu install the package python3-venv"
        call(Path(sys.executable), "-m", "venv", *flags, str(venv), error=missing)
    elif system_site_packages and "include-system-site-packages = true" not in (venv / "pyvenv.cfg").read_text(encoding="utf-8"):
        raise SystemExit(f"error: {venv.name} already exists without --system-site-packages; delete it to make it anew")
    if not succeeds(python, "-m", "pip", "--version"):
        call(python, "-m", "ensurepip", "--upgrade", error=f"{venv.name} has no pip; delete it to make it anew")


def install(venv: Path, extra: str, *, pyproject: Path) -> None:
    """Install torch and the project with `extra`, unless a stamp in `venv` records that for the same `pyproject`."""
    digest = hashlib.sha256(pyproject.read_bytes()).hexdigest()
    stamps = {name: venv / f"tfmq-{name}.stamp" for name in SATISFIED_BY}
    if any(stamps[name].exists() and stamps[name].read_text(encoding="utf-8") == digest for name in SATISFIED_BY[extra]):
        return
    python = venv_python(venv)
    pip = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    if not succeeds(python, "-c", "import torch"):
        say(f"installing {TORCH} (large, takes minutes) ...")
        call(python, *pip, TORCH, error=f"pip could not install {TORCH}")
    say(f"installing tfmq[{extra}] ...")
    call(python, *pip, "--editable", f".[{extra}]", error=f"pip could not install tfmq[{extra}]")
    stamps[extra].write_text(digest, encoding="utf-8")


def prepare(extra: str, *, system_site_packages: bool) -> tuple[Path, dict[str, str]]:
    """Return the interpreter to use, with the packages of `extra`, and the environment to run it in."""
    environment = dict(os.environ)
    if own := environment.get("TFMQ_PYTHON"):
        if system_site_packages:
            raise SystemExit("error: --system-site-packages has no effect with TFMQ_PYTHON; use one of them")
        if not Path(own).is_file():
            raise SystemExit(f"error: TFMQ_PYTHON is not a file: {own}")
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT / "src"), environment.get("PYTHONPATH")]))
        # Not resolved: a virtual environment is recognised by the path of the link to its interpreter.
        return Path(own).absolute(), environment
    create_venv(VENV, system_site_packages=system_site_packages)
    install(VENV, extra, pyproject=ROOT / "pyproject.toml")
    return venv_python(VENV), environment


def run_all(python: Path, steps: list[list[str]], *, environment: dict[str, str]) -> None:
    """Run each step as `python -m STEP`; leave with the exit status of the first that fails."""
    for step in steps:
        say(f"$ {shlex.join(step)}")
        status = subprocess.run([python, "-m", *step], cwd=ROOT, env=environment).returncode
        if status:
            raise SystemExit(status)


def demo(python: Path, environment: dict[str, str]) -> None:
    """Quantize the embedded model, compare it with the original, and say where the picture is."""
    model, compare = str(RUNS / "model"), RUNS / "compare"
    quantize_step = ["tfmq", "quantize", "default", "--output-dir", model, "--scheme", "w4a8", "--resume"]
    images = ["--num-images", "16", "--seed", "0"]
    compare_step = ["tfmq", "compare", model, "--reference", "default", *images, "--output-dir", str(compare)]
    run_all(python, [quantize_step, compare_step], environment=environment)
    pictures = sorted((ROOT / compare).rglob("*.png"))
    if not pictures:
        raise SystemExit(f"error: no picture in {ROOT / compare}")
    for picture in pictures:
        print(f"picture: {picture}")


CHECKS = ("ruff format --check .", "ruff check .", "mypy", "pytest -q -n 2 --dist loadgroup --no-loadscope-reorder")


def test(python: Path, environment: dict[str, str]) -> None:
    """Check format, lint and types, then run the tests; pytest's summary is the last thing printed."""
    environment.pop("OMP_NUM_THREADS", None)
    run_all(python, [command.split() for command in CHECKS], environment=environment)


TASKS = {"demo": (demo, "all"), "test": (test, "dev")}


def main() -> None:
    """Parse the command line, prepare the environment, run the task."""
    if sys.version_info < (3, 11):  # noqa: UP036 - an older Python can parse this file, and should say why it cannot go on
        raise SystemExit(f"error: Python 3.11 or newer is needed, this is {sys.version.split()[0]}")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--system-site-packages", action="store_true", help="let a new .venv see the packages of this Python")
    arguments = parser.parse_args()
    task, extra = TASKS[arguments.task]
    try:
        task(*prepare(extra, system_site_packages=arguments.system_site_packages))
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
