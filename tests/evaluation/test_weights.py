"""Weight files: found, missing, damaged."""

from pathlib import Path

import pytest
import torch

from tfmq.evaluation.perceptual import FILE as ALEXNET
from tfmq.evaluation.perceptual import lpips
from tfmq.evaluation.weights import WeightFile, WeightFolder, check_state
from tfmq.storage.digest import file_digest
from tfmq.storage.errors import ForeignFileError, MissingFileError


def test_a_file_is_found_where_torch_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    path = tmp_path / "hub" / "checkpoints" / "a.pth"
    path.write_bytes(b"weights")
    file = WeightFile(name="a.pth", digest=file_digest(path)[:8], origin="https://example.org/a.pth")
    assert WeightFolder().find(file, instead="") == path
    path.write_bytes(b"other weights")
    with pytest.raises(ForeignFileError, match="another sha256"):
        WeightFolder().find(file, instead="")


def test_libraries_look_into_the_users_folder_for_a_while(tmp_path: Path) -> None:
    before = torch.hub.get_dir()
    with pytest.raises(KeyError), WeightFolder(tmp_path).as_cache():
        assert torch.hub.get_dir() == str(tmp_path)
        raise KeyError
    assert torch.hub.get_dir() == before


def test_without_alexnet_lpips_says_which_file_goes_where(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError) as error:
        lpips(WeightFolder(tmp_path))
    assert str(tmp_path / "checkpoints" / ALEXNET.name) in str(error.value) and ALEXNET.origin in str(
        error.value
    )


@pytest.mark.parametrize("content", [b"", b"no weights at all", b"PK\x03\x04 and then nothing"])
def test_what_holds_no_weights_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(ForeignFileError, match=r"w\.pth is no file of weights"):
        check_state(tmp_path / "w.pth")


def test_weights_are_accepted(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "w.pth")
    check_state(tmp_path / "w.pth")
