"""Python as it is before diffusers and tfmq are imported."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

import tfmq

Elsewhere = Callable[[Sequence[str], Path], None]
# Runs each script in a fork of its own, so that what diffusers imports of others is imported once for all.
FORKS = """
import contextlib, importlib, os, sys, warnings
for name in ("torch._dynamo", "scipy.stats", "transformers.modeling_utils", "peft"):
    with contextlib.suppress(ImportError):
        importlib.import_module(name)
assert not {"diffusers", "tfmq"} & sys.modules.keys()
for script in sys.argv[2:]:
    child = os.fork() if hasattr(os, "fork") else 0
    if child == 0:
        exec(script)
        sys.exit()
    assert os.waitpid(child, 0)[1] == 0, script
"""


@pytest.fixture
def elsewhere() -> Elsewhere:
    """Return a function that runs scripts where neither tfmq nor diffusers has been imported, each by itself
    and with a folder as `sys.argv[1]`.
    """

    def run(scripts: Sequence[str], folder: Path) -> None:
        source = str(Path(tfmq.__file__).parents[1])
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")])),
        }
        for together in [scripts] if hasattr(os, "fork") else [[script] for script in scripts]:
            command = [sys.executable, "-c", FORKS, str(folder), *together]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr

    return run
