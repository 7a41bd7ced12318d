"""A process that holds one variant: loads it, reports what that took, then computes steps as it is told to.

`python -m tfmq.evaluation.cost.worker JOB`, `JOB` being JSON. It answers each line on stdin with one JSON
line on stdout; whatever libraries print goes to stderr. The first answer comes unasked, once the model is
loaded and has computed two steps.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import tfmq.evaluation.cost.variants  # noqa: F401 - fills the registry
from tfmq.evaluation.cost.source import Source
from tfmq.evaluation.cost.system import foreign_seconds, peak_bytes, resident_bytes
from tfmq.evaluation.cost.timing import timed
from tfmq.evaluation.cost.variant import VARIANTS, PreparedStep, Setting, import_needs
from tfmq.models.denoiser import Inputs
from tfmq.storage.atomic import write_tensors


def _loaded(name: str, setting: Setting) -> tuple[PreparedStep, list[Inputs], dict[str, Any]]:
    """Return the variant, the calls, and what loading it and its first step took."""
    import_needs(name)
    if not VARIANTS[name].builds:
        setting.source.import_needs()
    calls = setting.calls()
    baseline, began = resident_bytes(), time.perf_counter()
    prepared = VARIANTS[name].prepare(setting)
    loaded = time.perf_counter()
    prepared.step(calls[0])
    first = time.perf_counter()
    prepared.step(calls[0])
    spent = {"load_s": loaded - began, "compile_s": first - loaded}
    return (
        prepared,
        calls,
        {
            **spent,
            "baseline_rss_bytes": baseline,
            "peak_rss_bytes": peak_bytes(),
            "disk_bytes": prepared.disk_bytes,
        },
    )


def _timed(prepared: PreparedStep, calls: list[Inputs], order: Mapping[str, Any]) -> dict[str, Any]:
    call = calls[len(calls) // 2]
    return asdict(timed(lambda: prepared.step(call), seconds=order["seconds"], busy=foreign_seconds))


def _written(prepared: PreparedStep, calls: list[Inputs], order: Mapping[str, Any]) -> dict[str, Any]:
    write_tensors(
        Path(order["path"]), {str(number): prepared.step(call) for number, call in enumerate(calls)}
    )
    return {}


ORDERS: dict[str, Callable[[PreparedStep, list[Inputs], Mapping[str, Any]], dict[str, Any]]] = {
    "time": _timed,
    "outputs": _written,
}


def main(job: Mapping[str, Any]) -> None:
    """Do the job until stdin ends."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def reply(answer: Mapping[str, Any]) -> None:
        replies.write(json.dumps(answer) + "\n")
        replies.flush()

    torch.set_num_threads(job["threads"])
    given = {name: job[name] for name in ("batch", "threads", "device")}
    setting = Setting(source=Source.from_json(job["source"]), folder=Path(job["folder"]), **given)
    with torch.no_grad():
        if job["build"]:
            VARIANTS[job["variant"]].build(setting)
            reply({})
            return
        prepared, calls, spent = _loaded(job["variant"], setting)
        reply(spent)
        for line in sys.stdin:
            order = json.loads(line)
            reply(ORDERS[order["do"]](prepared, calls, order))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
