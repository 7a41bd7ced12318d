"""The verbs of the command line on a cluster: the same values and pixels, by whichever number of workers, and
at an address.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tfmq.cli.commands import run

pytest.importorskip("torchmetrics")
RECIPE = """\
name: quick
temporal: {learning: {iterations: 3, learning_rate: 0.01}}
rounding: {solver: gptq}
calibration: {samples: 3, steps: 3, interval: 2, batch_size: 2}
"""


@pytest.fixture
def tfmq(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Return a function that runs `tfmq` with its arguments and `--json`, and returns what it printed. What
    foretells times looks no longer than it must.
    """
    monkeypatch.setattr("tfmq.stopwatch.LOOKED", 0.0)

    def call(*arguments: object) -> Any:
        capsys.readouterr()
        status = run([str(argument) for argument in (*arguments, "--json")])
        out, err = capsys.readouterr()
        assert status == 0, err
        return json.loads(out)

    return call


def test_the_verbs_together(ray: Any, tfmq: Callable[..., Any], model: Path, tmp_path: Path) -> None:
    address = ray.get_runtime_context().gcs_address
    (tmp_path / "quick.yaml").write_text(RECIPE)
    made = [
        tfmq(
            "quantize",
            model,
            "--recipe",
            tmp_path / "quick.yaml",
            "--unit-inputs",
            "full",
            "--output-dir",
            tmp_path / name,
            *options,
        )
        for name, options in (("alone", ()), ("together", ("--cluster", address)))
    ]
    assert made[0]["sha256"] == made[1]["sha256"]
    samples = ("sample", tmp_path / "alone", "--num-images", 5, "--batch-size", 2, "--backend", "simulated")
    drawn = [
        tfmq(*samples, "--output-dir", tmp_path / name, *options)
        for name, options in (("a", ()), ("b", ("--cluster", "--workers", 1)))
    ]
    assert {key: drawn[0][key] for key in ("shape", "steps", "backend")} == {
        key: drawn[1][key] for key in ("shape", "steps", "backend")
    }
    assert (tmp_path / "a" / "00004.png").read_bytes() == (tmp_path / "b" / "00004.png").read_bytes()
    request = (
        "evaluate",
        tmp_path / "alone",
        "--reference",
        model,
        "--extractor",
        "pooled-pixels",
        "--num-images",
        5,
        "--batch-size",
        2,
    )
    places = {"x": (), "y": ("--cluster", "--workers", 1), "z": ("--cluster", address)}
    for name, options in places.items():
        tfmq(*request, "--num-pairs", 3, "--backend", "simulated", "--output-dir", tmp_path / name, *options)
    for file in ("evaluation.json", "pairs.npz"):
        assert len({(tmp_path / name / file).read_bytes() for name in places}) == 1
    assert not list(tmp_path.glob("*.job"))


def test_a_shard_of_a_cluster_is_refused(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["evaluate", str(model), "--cluster", "--shard", "0/2"]) == 2
    assert "shares the work out itself" in capsys.readouterr().err
