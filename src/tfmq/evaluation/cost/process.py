"""The other end of a worker: start it, ask it, end it."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from tfmq.backends.caching import CACHE
from tfmq.evaluation.cost.timing import Slice
from tfmq.evaluation.cost.variant import Setting

# Least seconds of one turn of a variant. Processor time is counted in hundredths of a second.
TURN = 0.5
# Matches the line of a traceback that names the exception; the lines after it continue its message.
RAISED = re.compile(r"[A-Za-z_][\w.]*(Error|Exception|Unsupported|Exit|Interrupt)\b")
# The folder that tfmq is imported from.
PACKAGES = Path(__file__).parents[3]


class WorkerError(RuntimeError):
    """A worker ended early; says why in its own last words."""


def _environment(setting: Setting) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(PACKAGES), os.environ.get("PYTHONPATH")]))
    # Give the process caches of its own, so that its first start converts and compiles.
    own = {"PYTHONPATH": path, "OMP_NUM_THREADS": str(setting.threads)}
    own |= {"TORCHINDUCTOR_CACHE_DIR": str(setting.folder / "inductor"), CACHE: str(setting.folder / "cache")}
    return {**os.environ, **own, "PYTHONWARNINGS": "ignore"}


class Child:
    """A process that answers each line of JSON with one. Use it as a context: it ends with the block.

    What it says on its standard error goes to the file `log`.
    """

    def __init__(
        self, command: Sequence[str], *, log: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        self.log = log
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        with log.open("w") as errors:
            self.child: Any = subprocess.Popen(command, env=environment, text=True, stderr=errors, **pipes)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.child.stdin.close()
        if error[0] is not None:
            self.child.kill()
        self.child.wait()
        self.child.stdout.close()

    def answer(self) -> dict[str, Any]:
        """Return its next answer.

        Raises:
            WorkerError: it ended without one.
        """
        line = self.child.stdout.readline()
        if not line:
            status = self.child.wait()
            lines = self.log.read_text(errors="replace").splitlines()
            raise WorkerError(
                next(filter(RAISED.match, reversed(lines)), f"the process ended with status {status}")
            )
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, **order: Any) -> dict[str, Any]:
        """Give an order and return the answer.

        Raises:
            WorkerError: it ended instead.
        """
        try:
            self.child.stdin.write(json.dumps(order) + "\n")
            self.child.stdin.flush()
        except BrokenPipeError:
            pass
        return self.answer()


class Worker(Child):
    """A running worker."""

    def __init__(self, variant: str, setting: Setting, *, build: bool = False) -> None:
        setting.folder.mkdir(parents=True, exist_ok=True)
        source = setting.source.to_json()
        job = {
            "variant": variant,
            "source": source,
            "folder": str(setting.folder),
            "batch": setting.batch,
            "threads": setting.threads,
        }
        job["device"] = setting.device
        command = [sys.executable, "-m", "tfmq.evaluation.cost.worker", json.dumps({**job, "build": build})]
        super().__init__(command, log=setting.folder / "log.txt", environment=_environment(setting))

    def turn(self) -> Slice:
        """Let the variant compute steps for a while."""
        return Slice(**self.ask(do="time", seconds=TURN))
