"""Set up the project and run it: `python3 tasks.py demo` or `python3 tasks.py test`.

Either command works on a fresh machine with Python 3.11 or newer. It makes a virtual environment in `.venv`,
installs torch and then the project with the extra it needs, at the versions of `constraints.txt`, and skips
all of that once a stamp says that the same `pyproject.toml` and `constraints.txt` have been installed.

To use another torch than the one installed by default, which no version in `constraints.txt` then replaces:

    python3 tasks.py demo --system-site-packages
    TFMQ_PYTHON=/path/to/python python3 tasks.py demo

The first makes a new .venv that sees the packages, torch included, of the Python that runs this script. The
second uses that interpreter as it is; nothing is created or installed.

`python3 tasks.py oldest` tests with the oldest libraries that the project supports, beside those of `.venv`.
`python3 tasks.py docs` builds the documentation as a site in `site/`. `python3 tasks.py matrix` writes the
tables of docs/capabilities.md anew.

To move to today's versions, delete `.venv` and run `python3 tasks.py lock`: it installs the newest that
`pyproject.toml` allows, and writes them to `constraints.txt`. Use the oldest Python that the project
supports, since every later one has to find the same versions.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
RUNS = Path("runs", "demo")
TORCH = "torch==2.13.0"
CONSTRAINTS = ROOT / "constraints.txt"
OLDEST = ROOT / "oldest.txt"
HEADER = """# The versions that pip installs; written by `python3 tasks.py lock`. A constraint installs
# nothing, so that no line needs its platform. torch is not among them, nor what it asks for by exact version.
"""
SATISFIED_BY = {"demo": ("demo", "dev"), "docs": ("docs", "dev"), "dev": ("dev",)}
# A torch for CUDA brings the exact one that it needs.
OF_TORCH = frozenset({"triton"})
# No package is compiled ahead of its first import: most modules are never imported. Without --quiet pip shows
# each package, its size and its speed.
PIP = ("-m", "pip", "install", "--disable-pip-version-check", "--no-input", "--no-compile")
OLDEST_PYTHON = (3, 11)


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
    elif system_site_packages and "include-system-site-packages = true" not in (
        venv / "pyvenv.cfg"
    ).read_text(encoding="utf-8"):
        raise SystemExit(
            f"error: {venv.name} already exists without --system-site-packages; delete it to make it anew"
        )
    if not succeeds(python, "-m", "pip", "--version"):
        call(
            python, "-m", "ensurepip", "--upgrade", error=f"{venv.name} has no pip; delete it to make it anew"
        )


def canonical(name: str) -> str:
    """Return a distribution's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def required(requirement: str) -> tuple[str, bool]:
    """Return whom a requirement asks for, and whether it refuses later versions."""
    specifier, _, _ = requirement.partition(";")
    name = re.match(r"[\w.-]+", specifier.strip())
    assert name is not None, requirement
    return canonical(name[0]), bool(re.search(r"==|~=|<", specifier))


def present_torch(python: Path) -> tuple[str, tuple[str, ...]] | None:
    """Return the version of the torch that `python` imports, and its requirements; None without a torch."""
    code = (
        "import json, torch, importlib.metadata as m; "
        "print(json.dumps([m.version('torch'), m.requires('torch') or []]))"
    )
    done = subprocess.run([python, "-c", code], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        return None
    version, requirements = json.loads(done.stdout)
    return version, tuple(requirements)


def applicable(constraints: str, torch: tuple[str, tuple[str, ...]] | None) -> str:
    """Return the `constraints` that hold beside a `torch`, which stays as it is; without one those that fit
    any.

    Where that torch sets a limit itself, its word counts: otherwise pip would look for another torch.
    """
    limited = OF_TORCH if torch is None else {name for name, refuses in map(required, torch[1]) if refuses}
    kept = [
        line for line in constraints.splitlines() if line.startswith("#") or required(line)[0] not in limited
    ]
    return "\n".join(kept + ([] if torch is None else [f"torch=={torch[0]}"])) + "\n"


def install(venv: Path, extra: str, *, pyproject: Path, constraints: Path, locked: bool = True) -> None:
    """Install torch and the project with `extra`, unless a stamp in `venv` records that for the same
    `pyproject` and `constraints`.

    Versions are those of `constraints` if `locked`, else the newest.
    """
    text = constraints.read_text(encoding="utf-8") if locked else ""
    digest = hashlib.sha256(pyproject.read_bytes() + text.encode()).hexdigest()
    stamps = {name: venv / f"tfmq-{name}.stamp" for name in SATISFIED_BY}
    if any(
        stamps[name].exists() and stamps[name].read_text(encoding="utf-8") == digest
        for name in SATISFIED_BY[extra]
    ):
        return
    python, chosen, began = venv_python(venv), venv / "tfmq-constraints.txt", time.monotonic()
    limits = ("--constraint", str(chosen))
    torch = present_torch(python)
    if torch is None:
        say(
            f"[1/2] installing {TORCH}: by far the largest, with CUDA "
            "libraries where there is a build for them ..."
        )
        chosen.write_text(applicable(text, None), encoding="utf-8")
        call(python, *PIP, *limits, TORCH, error=f"pip could not install {TORCH}")
        torch = present_torch(python)
    else:
        say(f"[1/2] torch {torch[0]} is here")
    say(f"[2/2] installing tfmq[{extra}] ({time.monotonic() - began:.0f} s so far) ...")
    chosen.write_text(applicable(text, torch), encoding="utf-8")
    call(python, *PIP, *limits, "--editable", f".[{extra}]", error=f"pip could not install tfmq[{extra}]")
    stamps[extra].write_text(digest, encoding="utf-8")
    say(f"installed in {time.monotonic() - began:.0f} s; the next run skips this")


def pins(inspected: list[dict[str, dict[str, object]]]) -> str:
    """Return constraints of what `pip inspect` found, one `name==version` a line.

    torch and what it asks for by exact version are left out. What does not run on the oldest Python says so.
    """
    found = {canonical(str(one["metadata"]["name"])): one["metadata"] for one in inspected}
    of_torch = {
        canonical(name)
        for name in re.findall(r"'([\w.-]+) ?\(?==", str(found.get("torch", {}).get("requires_dist", "")))
    }
    lines = []
    for name in sorted(found.keys() - {"pip", "tfmq", "torch"} - of_torch):
        # A label of one build, such as +cpu, is no release.
        version, python = (
            str(found[name]["version"]).partition("+")[0],
            str(found[name].get("requires_python", "")),
        )
        least = max((int(minor) for minor in re.findall(r">=\s*3\.(\d+)", python)), default=0)
        lines.append(
            f"{name}=={version}" + (f'; python_version >= "3.{least}"' if least > OLDEST_PYTHON[1] else "")
        )
    return HEADER + "\n".join(lines) + "\n"


def prepare(extra: str, *, system_site_packages: bool, locked: bool = True) -> tuple[Path, dict[str, str]]:
    """Return the interpreter to use, with the packages of `extra`, at locked versions or the newest, and the
    environment to run it in.
    """
    environment = dict(os.environ)
    if own := environment.get("TFMQ_PYTHON"):
        if system_site_packages:
            raise SystemExit("error: --system-site-packages has no effect with TFMQ_PYTHON; use one of them")
        if not Path(own).is_file():
            raise SystemExit(f"error: TFMQ_PYTHON is not a file: {own}")
        environment["PYTHONPATH"] = os.pathsep.join(
            filter(None, [str(ROOT / "src"), environment.get("PYTHONPATH")])
        )
        # Not resolved: a virtual environment is recognised by the path of the link to its interpreter.
        return Path(own).absolute(), environment
    if environment.pop("PYTHONDONTWRITEBYTECODE", None):
        # Each of many processes would compile a thousand modules anew. Here they are in nobody's way.
        environment["PYTHONPYCACHEPREFIX"] = str(VENV / "bytecode")
    create_venv(VENV, system_site_packages=system_site_packages)
    install(VENV, extra, pyproject=ROOT / "pyproject.toml", constraints=CONSTRAINTS, locked=locked)
    return venv_python(VENV), environment


def run_all(python: Path, steps: list[list[str]], *, environment: dict[str, str]) -> None:
    """Run each step as `python -m STEP`; leave with the exit status of the first that fails."""
    for step in steps:
        say(f"$ {shlex.join(step)}")
        status = subprocess.run([python, "-m", *step], cwd=ROOT, env=environment).returncode
        if status:
            raise SystemExit(status)


def run_side_by_side(python: Path, steps: list[tuple[list[str], dict[str, str]]]) -> None:
    """Run steps, each in its environment, at once; show what each printed, in their order, and leave with the
    exit status of the first that failed.
    """

    def run(step: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            [python, "-m", *step], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    with ThreadPoolExecutor(len(steps)) as pool:
        # As each ends, so that a slow one holds back no word of those before it.
        for (step, _), done in zip(steps, pool.map(run, *zip(*steps, strict=True)), strict=True):
            say(f"$ {shlex.join(step)}")
            sys.stdout.buffer.write(done.stdout)
            if done.returncode:
                raise SystemExit(done.returncode)


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


# Material's notice of its successor.
QUIET_SITE = {"NO_MKDOCS_2_WARNING": "1"}
SITE = "mkdocs build --strict --quiet"
STYLE = ("ruff format --check .", "ruff check .")
TESTS = "pytest -q -n 2 --dist loadfile --no-loadscope-reorder"


# Tests of what tfmq gives to the libraries of `OLDEST`, which warn of much that is newer than they.
OLDEST_TESTS = (
    "pytest -q -W default tests/integrations/test_at_load.py tests/integrations/test_pipelines.py "
    "tests/families/test_components.py::test_a_loaded_pipeline_is_saved_again_to_the_same_seals[sd1] "
    "tests/families/test_components.py::test_codes_keep_their_type_where_transformers_holds_a_layer_in_float32"
)


def with_oldest(python: Path, environment: dict[str, str]) -> dict[str, str]:
    """Return an environment with the oldest supported libraries, in a folder that Python searches before
    `.venv`; install them if they are not there.
    """
    versions = OLDEST.read_text(encoding="utf-8")
    folder = VENV / f"oldest-{hashlib.sha256(versions.encode()).hexdigest()[:16]}"
    if not folder.is_dir():
        say(f"installing {OLDEST.name} ...")
        # A name of its own until it is whole.
        began = folder.with_suffix(".part")
        shutil.rmtree(began, ignore_errors=True)
        target = ("--no-deps", "--target", str(began), "--requirement", str(OLDEST))
        call(python, *PIP, "--quiet", *target, error=f"pip could not install {OLDEST.name}")
        began.rename(folder)
    searched = filter(None, [str(folder), environment.get("PYTHONPATH")])
    return environment | {"PYTHONPATH": os.pathsep.join(searched)}


def oldest(python: Path, environment: dict[str, str]) -> None:
    """Test with the oldest supported libraries."""
    run_all(python, [OLDEST_TESTS.split()], environment=with_oldest(python, environment))


def test(python: Path, environment: dict[str, str]) -> None:
    """Check format and lint; check types, build the site and test with the oldest libraries (not where an own
    interpreter is used, for which nothing is installed), side by side, as each leaves a core idle; then run
    the tests. pytest's summary is the last thing printed.
    """
    environment.pop("OMP_NUM_THREADS", None)
    environment |= QUIET_SITE
    run_all(python, [command.split() for command in STYLE], environment=environment)
    checks = [(command.split(), environment) for command in ("mypy", SITE)]
    if "TFMQ_PYTHON" not in environment:
        checks.append((OLDEST_TESTS.split(), with_oldest(python, environment)))
    run_side_by_side(python, checks)
    run_all(python, [TESTS.split()], environment=environment)


def lock(python: Path, environment: dict[str, str]) -> None:
    """Write the versions that `python` has to the constraints."""
    command: list[str | Path] = [python, "-m", "pip", "inspect", "--local", "--disable-pip-version-check"]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit("error: pip could not tell what is installed")
    CONSTRAINTS.write_text(pins(json.loads(done.stdout)["installed"]), encoding="utf-8")
    say(f"wrote {CONSTRAINTS.name}")


def docs(python: Path, environment: dict[str, str]) -> None:
    """Build the documentation as a site in `site/`; a link that leads nowhere is an error."""
    run_all(python, [SITE.split()], environment=environment | QUIET_SITE)
    say("open site/index.html")


def matrix(python: Path, environment: dict[str, str]) -> None:
    """Write the tables of docs/capabilities.md anew."""
    if status := subprocess.run(
        [python, str(ROOT / "docs" / "capabilities.py")], cwd=ROOT, env=environment
    ).returncode:
        raise SystemExit(status)
    say("wrote docs/capabilities.md")


TASKS = {
    "demo": (demo, "demo"),
    "test": (test, "dev"),
    "oldest": (oldest, "dev"),
    "lock": (lock, "dev"),
    "docs": (docs, "docs"),
    "matrix": (matrix, "dev"),
}


def main() -> None:
    """Parse the command line, prepare the environment, run the task."""
    # An older Python can parse this file, and should say why it cannot go on.
    if sys.version_info < OLDEST_PYTHON:
        raise SystemExit(f"error: Python 3.11 or newer is needed, this is {sys.version.split()[0]}")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", choices=TASKS)
    parser.add_argument(
        "--system-site-packages", action="store_true", help="let a new .venv see the packages of this Python"
    )
    arguments = parser.parse_args()
    task, extra = TASKS[arguments.task]
    try:
        task(*prepare(extra, system_site_packages=arguments.system_site_packages, locked=task is not lock))
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
