"""A comparison, an analysis, an evaluation and a folder of a quantized model, made of numbers, without a
model.
"""

import json
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import pytest
import torch

from tfmq.evaluation.analysis.accumulation import Accumulation
from tfmq.evaluation.analysis.analyze import Analysis
from tfmq.evaluation.analysis.layers import LayerError
from tfmq.evaluation.analysis.ranges import Bounds, Ranges
from tfmq.evaluation.analysis.sensitivity import LayerGroup, Sensitivity
from tfmq.evaluation.comparison import Comparison
from tfmq.evaluation.deviation import Trajectory
from tfmq.evaluation.paired import paired_fidelity
from tfmq.evaluation.result import Evaluation, Paired, Row, Spread
from tfmq.report.analysis import analysis_values, write_analysis
from tfmq.report.evaluation import evaluation_values, write_evaluation
from tfmq.report.model import ModelReport, gather
from tfmq.storage.checkpoint import MANIFEST_FILE, seal
from tfmq.storage.digest import tensor_digest
from tfmq.temporal.disturbance import disturbance


@pytest.fixture(scope="session")
def comparison() -> Callable[..., Comparison]:
    """Return a function that gives a comparison of random images, and of features with noise of the given
    size.
    """

    def make(
        *,
        count: int = 3,
        side: int = 8,
        channels: int = 3,
        features: int = 2,
        noise: float = 0.1,
        steps: int = 5,
    ) -> Comparison:
        rng = np.random.default_rng(0)
        reference = rng.integers(0, 200, (count, side, side, channels), dtype=np.uint8)
        quantized = reference + rng.integers(0, 9, reference.shape, dtype=np.uint8)
        generator = torch.Generator().manual_seed(0)
        full = {f"layer.{i}": torch.randn(steps, 16, generator=generator) for i in range(features)}
        low = {
            name: value + noise * torch.randn(value.shape, generator=generator)
            for name, value in full.items()
        }
        temporal = disturbance(torch.arange(steps) * 100.0, full, low)
        return Comparison(reference, quantized, paired_fidelity(reference, quantized), temporal)

    return make


@pytest.fixture(scope="session")
def analysis(comparison: Callable[..., Any]) -> Callable[..., Analysis]:
    """Return a function that gives an analysis made of numbers."""

    def make(**shape: Any) -> Analysis:
        disturbed = comparison(**shape).temporal
        steps = len(disturbed.timesteps)
        line = torch.linspace(-1, 1, steps)
        parts = LayerGroup("mid", ("mid.a", "mid.b")), LayerGroup("out", ("out",))
        found = Sensitivity(
            parts, torch.tensor([5.0, 1.0]), torch.tensor([[0.1, 0.3], [0.2, 0.1]]), torch.tensor([0.4, 0.4])
        )
        layers = (LayerError("mid.a", 0.1, 1.0, 2.0), LayerError("out", 0.05, 1.0, 0.5))
        bounds = Bounds({"a": line - 1}, {"a": line + 1})
        ranges = Ranges(disturbed.timesteps, bounds, bounds)
        pair = (0.1, 0.2)
        added = Accumulation((5.0, 1.0), pair, pair, pair, pair, (None, 0.5), pair, pair, 0.3)
        return Analysis(
            disturbed,
            ranges,
            Trajectory((5.0, 1.0), (0.0, 0.2), (0.0, 0.3)),
            found,
            layers,
            len(found.parts),
            added,
        )

    return make


# Of the tensors of `write_model`: it has none.
DIGEST = tensor_digest({})
PROTOCOL = {
    "settings": {"num_images": 100, "steps": 4, "seed": 7, "batch_size": 10},
    "versions": {"tfmq": "1", "torch": "2", "torch-fidelity": None},
    "quantized": {"device": "cpu", "backend": "torch", "weights": DIGEST},
}


@pytest.fixture
def bench_file(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes what `tfmq bench --json` prints of the model of `write_model`, with other
    values of the given fields.
    """
    machine = {
        "processor": "A 1",
        "instructions": ["avx2"],
        "threads": 2,
        "processors": 4,
        "accelerator": None,
        "versions": {"torch": "2"},
    }
    row = {
        "backend": "torch",
        "batch": 1,
        "ms_per_step": 1234.25,
        "speedup": 2.5,
        "peak_rss_bytes": 1.25e9,
        "clean": True,
    }

    def write(*, without: str = "", of_row: Any = None, **fields: Any) -> Path:
        values = {"machine": machine, "weights": DIGEST, "rows": [{**row, **(of_row or {})}], **fields}
        values.pop(without, None)
        (tmp_path / "bench.json").write_text(json.dumps(values))
        return tmp_path / "bench.json"

    return write


@pytest.fixture(scope="session")
def drawn_model(
    tmp_path_factory: pytest.TempPathFactory, analysis: Callable[..., Analysis]
) -> Callable[..., Path]:
    """Return a function that gives a folder with `model`, `model.evaluation` and `model.analysis`; drawing
    takes a second, so it keeps each.
    """

    def write(images: Any, layers: tuple[str, ...], scheme: str, columns: int) -> Path:
        root = tmp_path_factory.mktemp("drawn")
        folder, evaluated, analysed = (root / f"model{suffix}" for suffix in ("", ".evaluation", ".analysis"))
        for path in (folder, evaluated, analysed):
            path.mkdir()
        entry = {"axis": 1, "bits": 8, "per_step": True, "segments": [4, 4], "symmetric": False}
        structure = {
            **{"steps": 4, "timestep": "t", "products": [], "tables": [], "skipped": []},
            "layers": [
                {
                    "bits": 4,
                    "input": entry,
                    "names": list(layers[:-1]),
                    "segments": [4, 4],
                    "symmetric": False,
                },
                {"bits": 8, "input": None, "names": list(layers[-1:]), "segments": [], "symmetric": True},
            ],
        }
        recipe = {
            "name": scheme,
            "weights": {"bits": 4},
            "rules": [{"match": "role:first", "weights": {"bits": 8}}],
        }
        manifest = seal(
            {},
            {"provenance": {"recipe": recipe, "seed": 5, "tfmq": "1", "torch": "2"}, "structure": structure},
        )
        (folder / MANIFEST_FILE).write_text(json.dumps(manifest))
        report = {
            "scheme": scheme,
            "bytes": {"fp32": 10_000, "quantized": 1},
            "temporal": {"mean_relative_error": 0.01, "max_relative_error": 0.02, "mismatches": 0},
            "units": [{"name": "mid", "error_before": 0.2, "error_after": 0.1}],
            "floating": {
                "bytes": 840,
                "share": 0.07,
                "modules": [
                    {"name": f"norms.{i}", "kind": "GroupNorm", "bytes": 120, "reason": "norm"}
                    for i in range(7)
                ],
            },
        }
        (folder / "tfmq_report.json").write_text(json.dumps(report))
        pixels = np.zeros((2, 8, 8, 3), dtype=np.uint8) if images is None else images
        paired = Paired(
            len(pixels),
            {"psnr": Spread(30.0, 20.0, 40.0)},
            Trajectory((9.0, 1.0), (0.0, 0.1), (0.0, 0.2), 0.05, 0.07),
            pixels,
            255 - pixels,
        )
        rows = (
            Row("fid", "full precision", "real", 3.25, None),
            Row("fid", "quantized", "real", 3.5, None),
            Row("fid", "quantized", "full precision", 0.75, None),
            Row("is", "full precision", None, 9.0, 0.5),
        )
        found = Evaluation(rows[: columns + 1], paired, ())
        write_evaluation(evaluated, found, evaluation_values(found, PROTOCOL))
        made = analysis()
        write_analysis(analysed, made, analysis_values(made, {"weights": DIGEST}), title=scheme)
        return root

    kept = cache(partial(write, None))
    return lambda images, *rest: kept(*rest) if images is None else write(images, *rest)


@pytest.fixture
def write_model(tmp_path: Path, drawn_model: Callable[..., Path]) -> Callable[..., Path]:
    """Return a function that writes `model`, `model.evaluation` and `model.analysis` and returns the
    first.
    """

    def write(
        *,
        images: Any = None,
        layers: tuple[str, ...] = ("mid.a", "out"),
        scheme: str = "w4a8",
        columns: int = 3,
    ) -> Path:
        copytree(drawn_model(images, layers, scheme, columns), tmp_path, dirs_exist_ok=True)
        return tmp_path / "model"

    return write


@pytest.fixture
def gathered() -> Callable[..., ModelReport]:
    """Return a function that reads everything beside a folder of `write_model`."""

    def read(folder: Path, **options: Any) -> ModelReport:
        beside = {name: folder.with_name(f"{folder.name}.{name}") for name in ("evaluation", "analysis")}
        return gather(folder, **{**beside, **options})

    return read
