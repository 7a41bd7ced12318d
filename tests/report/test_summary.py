"""The numbers of a comparison, and its files."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tfmq.evaluation.comparison import Comparison
from tfmq.report.summary import COMPARISON_FILES, summarize, write_comparison_files

Make = Callable[..., Comparison]


def test_summary_and_files(tmp_path: Path, comparison: Make) -> None:
    made = comparison()
    metrics = summarize(made, scheme="w4a8", reference_bytes=1000, quantized_bytes=150)
    assert metrics["num_images"] == 3 and metrics["bytes"] == {"reference": 1000, "quantized": 150}
    assert metrics["psnr_db"] == {"mean": made.fidelity.psnr_db.mean(), "min": made.fidelity.psnr_db.min()}
    assert metrics["psnr_db"]["min"] < metrics["psnr_db"]["mean"]
    assert metrics["ssim"] == made.fidelity.ssim.mean()
    errors = np.stack([error.numpy() for error in made.temporal.relative_error.values()])
    np.testing.assert_allclose(metrics["temporal"]["max_relative_error"], errors.max(), rtol=1e-6)
    np.testing.assert_allclose(metrics["temporal"]["mean_relative_error"], errors.mean(), rtol=1e-6)
    assert metrics["temporal"]["mismatches"] == made.temporal.mismatches
    write_comparison_files(tmp_path, made, metrics)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(COMPARISON_FILES)
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    with np.load(tmp_path / "samples.npz") as stored:
        assert np.array_equal(stored["reference"], made.reference) and np.array_equal(
            stored["quantized"], made.quantized
        )
