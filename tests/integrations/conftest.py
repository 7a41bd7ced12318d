"""Python as it is before diffusers and tfmq are imported."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

import tfmq

Elsewhere = Callable[[Sequence[str], Path], None]
# Runs each script in a fork of its own, so that what diffusers imports of others is imported once for all.
FORKS = """
import contextlib, importlib, json, os, sys, traceback
for name in ("torch._dynamo", "scipy.stats", "transformers.modeling_utils", "peft"):
    with contextlib.suppress(ImportError):
        importlib.import_module(name)
assert not {"diffusers", "tfmq"} & sys.modules.keys()
for line in sys.stdin:
    script, folder = json.loads(line)
    child = os.fork() if hasattr(os, "fork") else 0
    if child == 0:
        status = 1
        try:
            exec(script, {"sys": sys, "folder": folder})
            status = 0
        except BaseException:
            traceback.print_exc()
        sys.stderr.flush()
        if not hasattr(os, "fork"):
            print(status, flush=True)
        os._exit(status)
    print(os.waitpid(child, 0)[1], flush=True)
"""


@pytest.fixture(scope="session")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Elsewhere]:
    """Return a function that runs scripts where neither tfmq nor diffusers has been imported, each by itself.
    They know `sys`, and a path as `folder`.
    """
    log = tmp_path_factory.mktemp("elsewhere") / "log.txt"
    source = str(Path(tfmq.__file__).parents[1])
    path = os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")]))
    running: list[subprocess.Popen[str]] = []

    def started() -> subprocess.Popen[str]:
        # Without forks a process runs one script.
        if not running or not hasattr(os, "fork"):
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            with log.open("a") as errors:
                command = [sys.executable, "-c", FORKS]
                environment = {**os.environ, "PYTHONPATH": path}
                running.append(subprocess.Popen(command, env=environment, stderr=errors, **pipes))
        return running[-1]

    def run(scripts: Sequence[str], folder: Path) -> None:
        for script in scripts:
            process = started()
            process.stdin.write(json.dumps([script, str(folder)]) + "\n")
            process.stdin.flush()
            assert process.stdout.readline().strip() == "0", (script, log.read_text())

    yield run
    for process in running:
        process.stdin.close()
        process.stdout.close()
        process.wait()
