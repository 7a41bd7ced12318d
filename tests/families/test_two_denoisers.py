"""Pipelines that call two denoisers in turn, as Wan 2.2 does: both are quantized, one after the other, and
neither is left out in silence.
"""

import copy
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

import tfmq
from tfmq.artifact import stored_bytes
from tfmq.nn.swap import is_quantized, steps_of
from tfmq.recipes import Calibration

Make = Callable[[str], Any]
pytestmark = pytest.mark.filterwarnings("default")
RECIPE = replace(tfmq.scheme("rtn_w8a8"), calibration=Calibration(samples=1, steps=4, batch_size=1))


@pytest.fixture
def wan(family: Make) -> tuple[Any, dict[str, Any]]:
    """Return a pipeline whose second transformer takes over below timestep 600, and the options that keep it
    tiny.
    """
    made = family("wan")
    parts = made.sampler(made.stock).pipeline.components
    second = copy.deepcopy(parts["transformer"])
    with torch.no_grad():
        second.proj_out.weight.mul_(0.5)
    return diffusers.WanPipeline(
        **(parts | {"transformer_2": second}), boundary_ratio=0.6
    ), made.reference.options


def sampler(wan: tuple[Any, dict[str, Any]], component: str | None = None) -> Any:
    return tfmq.PipelineSampler(wan[0], prompts=("a",), options=wan[1], component=component)


def test_each_is_quantized_at_its_own_timesteps_and_both_come_back(
    wan: tuple[Any, dict[str, Any]], tmp_path: Path
) -> None:
    expected = sampler(wan).run(range(1), steps=4, seed=0)
    with pytest.warns(
        UserWarning,
        match=r"also calls transformer_2, which stays in full precision; .* --component transformer_2",
    ):
        tfmq.quantize(sampler(wan), RECIPE, output_dir=tmp_path / "one")
    pipeline = wan[0]
    assert is_quantized(pipeline.transformer) and not is_quantized(pipeline.transformer_2)
    with pytest.raises(
        ValueError,
        match=(
            r"quantized already; quantize the full-precision one, or its "
            r"transformer_2 \(--component transformer_2\)"
        ),
    ):
        tfmq.quantize(sampler(wan), RECIPE)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(also calls|was not calibrated)")
        tfmq.quantize(sampler(wan, "transformer_2"), RECIPE, output_dir=tmp_path / "both")
        images = sampler(wan).run(range(1), steps=4, seed=0)
    early, late = (
        steps_of(denoiser).timesteps for denoiser in (pipeline.transformer, pipeline.transformer_2)
    )
    assert float(early.min()) >= 600 > float(late.max()) and len(early) + len(late) == 4
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "both")
    tfmq.execute(loaded, "simulated")
    assert torch.equal(sampler((loaded, wan[1])).run(range(1), steps=4, seed=0), images)
    assert 0 < float((images - expected).abs().mean()) < 0.05
    covered = tfmq.execute(tfmq.load(tmp_path / "both"), "reference")
    assert covered.integer and not covered.floating
    assert (
        stored_bytes(tmp_path / "both")
        == stored_bytes(tmp_path / "one")
        == stored_bytes(tmp_path / "both" / "transformer")
    )


def test_a_denoiser_that_is_not_there_is_refused_by_name(wan: tuple[Any, dict[str, Any]]) -> None:
    with pytest.raises(
        ValueError, match="WanPipeline has no denoiser transformer_3; it has transformer, transformer_2"
    ):
        tfmq.quantize(wan[0], RECIPE, component="transformer_3")
    with pytest.raises(ValueError, match="a sampler brings its own denoiser"):
        tfmq.quantize(sampler(wan), RECIPE, component="transformer_2")


def test_of_one_denoiser_nothing_is_said(family: Make) -> None:
    made = family("sd1")
    assert made.in_memory.others == made.reference.others == ()
