"""What the command line says about itself, and exit status 2."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]


def test_version_and_help(tfmq: Run) -> None:
    import tfmq as package

    assert tfmq("--version") == (0, f"tfmq {package.__version__}\n", "")
    bare, asked = tfmq(), tfmq("--help")
    assert bare.status == asked.status == 0 and not bare.err + asked.err
    for word in ("quantize", "sample", "compare", "evaluate", "analyze", "inspect", "bench", "Exit status"):
        assert word in bare.out and word in asked.out


@pytest.mark.parametrize(
    ("verb", "options"),
    [
        (
            "quantize",
            (
                "--output-dir --scheme --recipe --steps --calib-size --iterations "
                "--seed --device --prompts --resume --json"
            ),
        ),
        ("sample", "--num-images --steps --seed --output-dir --prompts --backend --weights"),
        ("compare", "--reference --num-images --seed --output-dir --prompts --backend --weights --json"),
        (
            "evaluate",
            (
                "--reference --real --num-images --steps --seed --metrics "
                "--extractor --weights-dir --shard --resume --json"
            ),
        ),
        (
            "analyze",
            "--reference --num-images --steps --seed --output-dir --prompts --backend --weights --json",
        ),
        (
            "report",
            "--evaluation --analysis --bench --base-model --push-to-hub --private --output-dir --json",
        ),
        ("inspect", "--json"),
        ("import", "--config --base --prediction --output-dir --tokenizer --json"),
        ("bench", "--reference --backends --peers --batch --rounds --threads --steps --prompts --json"),
    ],
)
def test_options_of_the_contract(tfmq: Run, monkeypatch: pytest.MonkeyPatch, verb: str, options: str) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    shown = tfmq(verb, "--help").out
    assert [option for option in options.split() if option not in shown] == []


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        ("frobnicate", "frobnicate"),
        ("quantize m", "--output-dir"),
        ("quantize --output-dir d", "MODEL"),
        ("quantize m --output-dir d --bogus 3", "--bogus"),
        ("quantize m --output-dir d --scheme int4", "int4"),
        ("quantize m --output-dir d --scheme w1a8", "w1a8"),
        ("quantize m --output-dir d --scheme w9a8", "w9a8"),
        ("quantize m --output-dir d --scheme w4a1", "w4a1"),
        ("quantize m --output-dir d --scheme w32a32", "w32a32"),
        ("quantize m --output-dir d --scheme w4a8 --recipe r.yaml", "--recipe"),
        ("quantize m --output-dir d --steps 0", "--steps"),
        ("quantize m --output-dir d --steps many", "--steps"),
        ("quantize m --output-dir d --calib-size 0", "--calib-size"),
        ("quantize m --output-dir d --iterations -1", "--iterations"),
        ("quantize m --output-dir d --seed -1", "--seed"),
        ("quantize m --output-dir d --device abacus", "abacus"),
        ("sample m --output-dir d --num-images 0", "--num-images"),
        ("sample m --output-dir d --batch-size 0", "--batch-size"),
        ("sample m --output-dir d --backend abacus", "auto, "),
        ("sample m --output-dir d --weights heavy", "heavy"),
        ("compare m --output-dir d", "--reference"),
        ("compare m --reference m --output-dir d --backend abacus", "reference, simulated, torch"),
        ("compare m --reference m --output-dir d --weights heavy", "unpacked"),
        ("evaluate m --metrics fid,fud", "fud; give all, or some of fid"),
        ("evaluate m --metrics ,", "--metrics"),
        ("evaluate m --extractor vgg", "'vgg'; give one of inception"),
        ("evaluate m --shard 2/2", "0/4"),
        ("evaluate m --shard one", "0/4"),
        ("evaluate m --num-images 0", "--num-images"),
        ("evaluate", "DIR"),
        ("analyze m", "--reference"),
        ("report", "DIR"),
        ("inspect", "MODEL"),
        ("import c --config c.yaml --base b --output-dir d", "--base"),
        ("import --config c.yaml --output-dir d", "CHECKPOINT"),
        ("inspect m n", "n"),
        ("bench", "DIR"),
        (
            "bench m --backends torch,abacus",
            "'abacus'; give all, none, or some of simulated, reference, torch",
        ),
        ("bench m --peers torch", "'torch'; give all, none, or some of fp32, fp32-channels-last"),
        ("bench m --batch 1,0", "--batch"),
        ("bench m --batch 1,", "--batch"),
        ("bench m --rounds 0", "--rounds"),
    ],
)
def test_usage_errors(
    tfmq: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: str, cause: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = tfmq(*arguments.split())
    assert result.status == 2 and result.out == ""
    assert result.err.startswith("error: ") and result.err.count("\n") == 1 and cause in result.err
    assert list(tmp_path.iterdir()) == []


def test_help_imports_nothing_heavy(environment: dict[str, str]) -> None:
    code = (
        "import sys\nfrom tfmq.cli.commands import run\nrun(['quantize', "
        "'--help'])\nprint(*sys.modules, file=sys.stderr)"
    )
    child = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    loaded = set(child.stderr.split())
    assert "typer" in loaded and not loaded & {
        "torch",
        "numpy",
        "diffusers",
        "transformers",
        "matplotlib",
        "skimage",
    }


def test_without_the_extra(environment: dict[str, str]) -> None:
    code = "import sys\nsys.modules['typer'] = None\nfrom tfmq.cli.app import main\nmain()"
    child = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert child.returncode == 1 and child.stdout == ""
    assert "tfmq[cli]" in child.stderr and child.stderr.count("\n") == 1
