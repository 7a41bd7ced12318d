"""One Ray with two workers for all tests here, small, and a tiny pipeline on disk beside its quantized
twin.
"""

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tfmq.models.sampler import Sampler

OpenModel = Callable[[], Sampler]


@pytest.fixture(scope="session")
def ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Return Ray, started here with two CPUs; programs that find it started go on with it."""
    module = pytest.importorskip("ray", reason="ray is not installed; pip install 'tfmq[ray]' has it")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # By default workers give way to all others, here to the other half of the tests.
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112
    size = {"num_cpus": 2, "object_store_memory": 100 * 2**20, "include_dashboard": False}
    # diffusers imports it in every worker, for a second; the tiny model does not need it.
    lacking = 'import sys\nsys.modules["peft"] = None\n'
    (folder := tmp_path_factory.mktemp("lacking")).joinpath("sitecustomize.py").write_text(lacking)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
        module.init(address="local", log_to_driver=False, logging_level="error", **size)
    yield module
    module.shutdown()


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a tiny DDIM pipeline."""
    from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

    torch.manual_seed(0)
    shape = {
        "sample_size": 8,
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (8,),
        "layers_per_block": 1,
        "norm_num_groups": 4,
    }
    kinds = {
        "down_block_types": ("AttnDownBlock2D",),
        "up_block_types": ("UpBlock2D",),
        "attention_head_dim": 8,
    }
    directory = tmp_path_factory.mktemp("models") / "tiny"
    DDIMPipeline(UNet2DModel(**shape, **kinds), DDIMScheduler()).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def open_model(model: Path) -> OpenModel:
    """Return what opens the tiny pipeline, in any process."""
    from tfmq.targets import open_sampler

    return partial(open_sampler, str(model))
