"""LPIPS against the library's own call, where torchvision is installed."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tfmq.evaluation import perceptual
from tfmq.evaluation.weights import WeightFolder
from tfmq.storage.digest import file_digest


def test_it_is_the_librarys_distance_pair_by_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torchvision = pytest.importorskip(
        "torchvision", reason="torchvision is not installed (pip install 'tfmq[eval]')"
    )
    functional = pytest.importorskip("torchmetrics.functional.image")
    (tmp_path / "checkpoints").mkdir()
    path = tmp_path / "checkpoints" / perceptual.FILE.name
    torch.save(torchvision.models.alexnet(weights=None).state_dict(), path)
    monkeypatch.setattr(perceptual, "FILE", replace(perceptual.FILE, digest=file_digest(path)[:8]))
    reference = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    images = 255 - reference
    images[0] = reference[0]
    found = perceptual.lpips(WeightFolder(tmp_path))(reference, images)
    assert found.shape == (3,) and found[0] == 0 and (found[1:] > 0).all()
    for index in range(3):
        pair = (
            torch.from_numpy(array[index : index + 1]).permute(0, 3, 1, 2).float() / 255
            for array in (reference, images)
        )
        with WeightFolder(tmp_path).as_cache():
            own = functional.learned_perceptual_image_patch_similarity(*pair, net_type="alex", normalize=True)
        assert found[index] == pytest.approx(float(own), abs=1e-6)
