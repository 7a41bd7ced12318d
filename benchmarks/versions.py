"""Whether a version of the package quantizes and computes as fast as an earlier one.

    git worktree add ../before f275246
    python benchmarks/versions.py --before ../before --rounds 5

Each version runs in a process of its own, on one thread, and they take turns: each quantizes the embedded
model with the short recipes of its own `benchmarks/bits.py`, then calls it with every backend. Printed are
medians of processor seconds of a quantization and of milliseconds of a call, and the ratio of each pair of
neighbouring turns, median and quartiles. A processor second counts what a stage computes and not what others
on the machine do; a call takes wall time, since its engine may have threads of its own.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from names import names_of

from tfmq.recipes.presets import PRESETS

ROOT = Path(__file__).resolve().parents[1]
QUANTIZED = ["tfmq_w4a8", "tfmq_w8a8", "rtn_w4a8", "transformer_w8a8"]
CALLS = 20


class Side:
    """One version in a process of its own, which answers a line with a line."""

    def __init__(self, root: Path) -> None:
        environment = os.environ | {"PYTHONPATH": str(root / "src"), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), "--serve", str(root)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, question: str) -> float | None:
        """Return the figure that answers; None where this version has none.

        Raises:
            RuntimeError: the process ended.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(question + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process of {self.process.args} ended at {question!r}")
        return json.loads(line)


@contextmanager
def sides(*roots: Path) -> Iterator[list[Side]]:
    """Run a process for each version until the block ends."""
    with ExitStack() as stack:
        found = []
        for root in roots:
            side = Side(root)
            stack.callback(side.process.kill)
            found.append(side)
        yield found


def serve(root: Path) -> None:
    """Answer each line of standard input: a preset by the seconds to quantize with it, a backend by the
    milliseconds of a call of the model that was quantized last.
    """
    sys.path.insert(0, str(root / "benchmarks"))
    import warnings

    import bits
    import torch

    import tfmq

    assert Path(tfmq.__file__).is_relative_to(root / "src"), tfmq.__file__
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    answers, sys.stdout = sys.stdout, sys.stderr
    sampler: Any = None
    for line in sys.stdin:
        name = line.strip()
        answer = None
        if name in PRESETS:
            sampler = bits.open_sampler(bits.EMBEDDED)
            began = time.process_time()
            tfmq.quantize(sampler, bits.short(tfmq.scheme(name), steps=4, samples=4), seed=0)
            answer = time.process_time() - began
        elif name in bits.BACKENDS:
            answer = called(bits, sampler, name)
        print(json.dumps(answer), file=answers, flush=True)


def called(bits: Any, sampler: Any, backend: str) -> float | None:
    """Return the median milliseconds of a call at a calibrated timestep; None without the backend."""
    import torch

    import tfmq

    try:
        tfmq.execute(sampler.denoiser.module, backend, options=bits.Options())
    except (bits.MissingExtraError, ValueError):
        return None
    inputs, times = bits.calls(sampler)["known"], []
    with torch.no_grad():
        for _ in range(2 + CALLS):
            began = time.perf_counter()
            sampler.denoiser(inputs)
            times.append(1e3 * (time.perf_counter() - began))
    return statistics.median(times[2:])


def line(name: str, before: list[float], after: list[float]) -> str:
    """Return a row of the table."""
    ratios = [one / other for one, other in zip(after, before, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return (
        f"| {name} | {statistics.median(before):.2f} | {statistics.median(after):.2f} "
        f"| {middle:.2f} ({low:.2f} to {high:.2f}) |"
    )


def compare(before: Side, after: Side, question: str, rounds: int) -> tuple[list[float], list[float]]:
    """Return what both answer, in turns of which each begins with the other version."""
    found: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds):
        order = [(before, found[0]), (after, found[1])]
        for side, answers in order if number % 2 == 0 else reversed(order):
            answer = side.ask(question)
            if answer is not None:
                answers.append(answer)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--before", type=Path, help="checkout of the earlier version")
    parser.add_argument("--after", type=Path, default=ROOT, help="checkout of the later version; this one")
    parser.add_argument("--presets", type=names_of(PRESETS), default=QUANTIZED)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve is not None:
        serve(options.serve.resolve())
        return
    if options.before is None:
        parser.error("--before names the checkout to compare with")
    from bits import BACKENDS

    from tfmq.evaluation.cost.system import describe_machine, machine_in_words

    with sides(options.before.resolve(), options.after.resolve()) as (before, after):
        print(machine_in_words(describe_machine(1)))
        print("| | before | after | ratio |\n|---|---|---|---|", flush=True)
        for question in (*options.presets, *BACKENDS):
            earlier, later = compare(before, after, question, options.rounds)
            if earlier and len(earlier) == len(later):
                print(line(question, earlier, later), flush=True)


if __name__ == "__main__":
    main()
