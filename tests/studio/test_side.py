"""A model in a process of its own draws what it draws here, and its end is no end of the page."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tfmq
from tfmq.evaluation.sampling import draw
from tfmq.studio.side import Side, SideError, Wish, draw_here
from tfmq.targets import open_sampler

SOURCE = str(Path(tfmq.__file__).parent.parent)


@pytest.fixture
def side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Side]:
    """Return a side whose processes are forked from one that has imported diffusers, which takes seconds;
    those of other tests import by themselves.
    """
    # diffusers imports these where they are, for seconds; the tiny model needs none of them.
    lacking = 'import sys\nsys.modules |= dict.fromkeys(["peft", "scipy", "transformers"])\n'
    (tmp_path / "sitecustomize.py").write_text(lacking)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    context = get_context("forkserver")
    needs = ("diffusers.pipelines.ddim.pipeline_ddim", "diffusers.models.unets.unet_2d", "tfmq.studio.side")
    context.set_forkserver_preload([*needs, "tfmq.integrations.diffusers.pipelines"])
    monkeypatch.setattr("tfmq.studio.worker.get_context", lambda _: context)
    made = Side(backend="simulated")
    yield made
    made.close()


def test_models_have_a_process_each_and_one_that_dies_is_replaced(
    side: Side, quantized: Path, original: Path
) -> None:
    drawn = side.draw(str(quantized), Wish(seed=3, steps=3))
    assert np.array_equal(
        drawn.image, draw(open_sampler(str(quantized)), 1, steps=3, seed=3, batch_size=1)[0]
    )
    assert drawn.backend == "simulated" and drawn.seconds > 0 and 0 < drawn.memory_bytes < 2**32
    assert drawn.warnings == ()
    for _ in range(2):
        (warning,) = side.draw(str(quantized), Wish(steps=2)).warnings
        assert "was not calibrated" in warning
    with pytest.raises(ValueError, match="steps"):
        side.draw(str(quantized), Wish(steps=0))
    # Another model, another process; the first one's is gone.
    first = side.process_ids()
    drawn = side.draw(str(original), Wish(steps=2))
    assert drawn.backend is None
    (process,) = side.process_ids()
    assert process not in first
    os.kill(process, signal.SIGKILL)
    with pytest.raises(SideError, match="out of memory"):
        side.draw(str(original), Wish(steps=2))
    assert np.array_equal(side.draw(str(original), Wish(steps=2)).image, drawn.image)


def test_a_model_that_is_not_there_is_named() -> None:
    """As a process says it; that what is raised there is raised here too is seen above."""
    with pytest.raises(ValueError, match="does not exist"):
        draw_here("/no/such/model", "simulated", None, Wish())


def test_what_is_closed_starts_no_process(original: Path) -> None:
    closed = Side()
    closed.close()
    with pytest.raises(SideError, match="the studio is closed"):
        closed.draw(str(original), Wish(steps=1))
    assert closed.process_ids() == []


PAGE = """
import os, time
from tfmq.studio.worker import Worker

if __name__ == "__main__":
    worker = Worker()
    print(worker.call(os.getpid), flush=True)
    time.sleep(600)
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="asks Linux whether a process runs")
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_a_models_process_does_not_outlive_the_page(tmp_path: Path, end: signal.Signals) -> None:
    (tmp_path / "page.py").write_text(PAGE)
    page = subprocess.Popen(
        [sys.executable, tmp_path / "page.py"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": SOURCE},
    )
    with page:
        assert page.stdout is not None
        process = int(page.stdout.readline())
        os.kill(process, 0)
        page.send_signal(end)
    for _ in range(600):
        if not alive(process):
            return
        time.sleep(0.05)
    os.kill(process, signal.SIGKILL)
    pytest.fail("the process of the model is still there")


# The studio without its page and with a model of its own: what it does about Ctrl-C is the same, and Gradio
# and diffusers take seconds to import.
INTERRUPTED = """
import signal, sys, threading, time
from contextlib import suppress
from functools import partial
from types import SimpleNamespace
import torch, typer
from tfmq.cli.outcome import verb
from tfmq.studio import side as sides
from tfmq.studio.page import Studio
from tfmq.studio.side import SideError, Wish

class Slow:
    denoiser = SimpleNamespace(module=torch.nn.Identity())

    def run(self, indices, *, steps, seed):
        for _ in range(steps):
            time.sleep(0.1)
        return torch.zeros(len(indices), 3, 8, 8)

sides._opened = lambda *_: sides._Open(Slow(), None, 0)

# A verb keeps stdout for its result.
say = partial(print, file=sys.__stdout__, flush=True)

class Page:
    local_url = "nowhere"

    def close(self, *, verbose):
        say("closed")

def opened(address):
    def draw():
        with suppress(SideError):
            if moment == "drawing":
                side.draw(model, Wish(steps=1))
                threading.Timer(0.5, say, ["busy"]).start()
            else:
                say("busy")
            side.draw(model, Wish(steps=1000))
            say("drawn")

    threading.Thread(target=draw, daemon=True).start()

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    (moment,) = sys.argv[1:]
    model = "slow"
    studio = Studio([], model)
    studio.launch, side = lambda port: Page(), studio.sides["reference"]
    try:
        with verb(interrupted="the page is closed"):
            studio.serve(opened=opened)
    except typer.Exit as end:
        sys.exit(end.exit_code)
"""


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize("moment", ["starting", "drawing"])
def test_interrupted_during_a_draw_it_ends_with_130_and_one_line(tmp_path: Path, moment: str) -> None:
    """A terminal sends Ctrl-C to every process of the group, the model's included."""
    (tmp_path / "studio.py").write_text(INTERRUPTED)
    command = [sys.executable, str(tmp_path / "studio.py"), moment]
    pipes: dict[str, Any] = {
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
        "start_new_session": True,
    }
    with subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": SOURCE, "OMP_NUM_THREADS": "1"}, **pipes
    ) as studio:
        assert studio.stdout is not None
        said = studio.stdout.readline()
        os.killpg(studio.pid, signal.SIGINT)
        try:
            out, err = studio.communicate(timeout=300)
        finally:
            studio.kill()
    assert said == "busy\n", err
    assert studio.returncode == 130 and out == "closed\n"
    assert err.strip() == "error: interrupted; the page is closed"


def alive(process: int) -> bool:
    """Whether a process runs; one that ended and that nobody has asked after does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
