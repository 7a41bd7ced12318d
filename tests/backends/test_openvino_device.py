"""OpenVINO's devices: which ones may be asked for, what each is told, and what a virtual one computes."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tfmq
from tfmq.backends.backend import Options
from tfmq.backends.execution import execute
from tfmq.backends.openvino_device import SHARED, check_device, settings_for
from tfmq.models.sampler import LoopSampler
from tfmq.numerics.errors import sqnr_db
from tfmq.recipes import Calibration


class Seen:
    """A core of a machine with these devices, all of which take two settings."""

    available_devices = ("CPU", "GPU.0", "GPU.1", "NPU")

    def get_property(self, device: str, name: str) -> list[str]:
        assert name == "SUPPORTED_PROPERTIES"
        return ["PERFORMANCE_HINT", "CACHE_DIR"]


@pytest.mark.parametrize(
    "name",
    ["CPU", "GPU", "GPU.1", "NPU", "AUTO", "AUTO:GPU,CPU", "AUTO:-CPU", "MULTI:GPU(2),NPU", "HETERO:GPU.1"],
)
def test_a_device_that_is_seen_is_taken(name: str) -> None:
    check_device(Seen(), name)


@pytest.mark.parametrize(
    ("name", "lacks"),
    [
        ("TPU", "TPU"),
        ("GPU.2", "GPU.2"),
        ("CUDA", "CUDA"),
        ("AUTO:TPU,CPU", "TPU"),
        ("", ""),
        ("CPU:0", "CPU:0"),
    ],
)
def test_a_device_that_is_not_seen_is_refused_with_those_that_are(name: str, lacks: str) -> None:
    with pytest.raises(
        ValueError, match=rf"no device '{lacks}'.*; it sees CPU, GPU.0, GPU.1, NPU, and shares"
    ):
        check_device(Seen(), name)


def test_a_device_is_told_what_it_takes() -> None:
    wanted = dict.fromkeys((*SHARED, "INFERENCE_NUM_THREADS"), "x")
    assert settings_for(Seen(), "CPU", wanted) == wanted
    assert set(settings_for(Seen(), "GPU", wanted)) == {"PERFORMANCE_HINT", "CACHE_DIR"}
    assert set(settings_for(Seen(), "AUTO:GPU,CPU", wanted)) == set(SHARED)


@torch.no_grad()
def test_a_virtual_device_computes_what_the_cpu_does(
    sampler: Callable[..., LoopSampler], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino")
    monkeypatch.setenv("TFMQ_CACHE", str(tmp_path))
    made, recipe = sampler("plain"), tfmq.scheme("rtn_w8a8")
    tfmq.quantize(
        made, replace(recipe, calibration=Calibration(samples=2, steps=3, interval=1, batch_size=2))
    )
    module: Any = made.denoiser.module
    example = made.example().resized(2)
    inputs = replace(example, timestep=module.tfmq_steps.timesteps[[1, 1]])
    found = []
    for device in ("CPU", "AUTO:CPU"):
        made.denoiser.module = copy.deepcopy(module)
        execute(made.denoiser.module, "openvino", options=Options(device=device))
        found.append(made.denoiser(inputs))
    assert sqnr_db(*found) > 60
    with pytest.raises(ValueError, match=r"OpenVINO sees no device 'ABACUS'; it sees .*CPU"):
        execute(module, "openvino", options=Options(device="ABACUS"))
    assert module.tfmq_executor is None
