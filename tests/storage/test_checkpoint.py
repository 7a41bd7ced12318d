import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from tfmq.storage import (
    FORMAT_VERSION,
    MANIFEST_FILE,
    TENSORS_FILE,
    CheckpointError,
    ChecksumError,
    ForeignFileError,
    MissingFileError,
    OutputExistsError,
    StorageFullError,
    TensorMismatchError,
    TruncatedFileError,
    VersionError,
    checkpoint,
    load_checkpoint,
    prepare_output,
    save_checkpoint,
    seal,
    tensor_digest,
    verify,
)

TENSORS = {
    "weight": torch.arange(64, dtype=torch.uint8).reshape(8, 8),
    "scale": torch.linspace(0.5, 1, 8),
    "step": torch.tensor(3),
}
MANIFEST = {"scheme": "w4a8", "steps": [1, 2]}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_checkpoint(tmp_path / "model", TENSORS, MANIFEST)
    return tmp_path / "model"


def edit(directory: Path, **changes: Any) -> None:
    path = directory / MANIFEST_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_checkpoints_invert(saved: Path) -> None:
    tensors, manifest = load_checkpoint(saved)
    assert tensor_digest(tensors) == tensor_digest(TENSORS)
    assert manifest == seal(TENSORS, MANIFEST)
    assert sorted(os.listdir(saved)) == [MANIFEST_FILE, TENSORS_FILE]


def test_the_manifest_on_disk_has_the_documented_fields(saved: Path) -> None:
    manifest = json.loads((saved / MANIFEST_FILE).read_text())
    assert (
        manifest.items()
        >= {**MANIFEST, "format": "tfmq", "version": 2, "digest": tensor_digest(TENSORS)}.items()
    )
    assert manifest["tensors"]["scale"] == {"dtype": "float32", "shape": [8]}


def test_saving_twice_gives_equal_bytes(saved: Path) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    tensors, manifest = load_checkpoint(saved)
    save_checkpoint(saved, dict(reversed(tensors.items())), manifest)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_sealing_again_renews_the_four_fields_and_keeps_the_rest() -> None:
    first = seal(TENSORS, MANIFEST)
    assert seal({"x": torch.zeros(1)}, first) == seal({"x": torch.zeros(1)}, MANIFEST)
    assert MANIFEST == {"scheme": "w4a8", "steps": [1, 2]}


def test_the_version_is_the_lowest_that_has_all_of_the_structure() -> None:
    plain = {"bits": 4, "symmetric": False, "segments": [], "input": None, "names": ["a"]}
    assert seal(TENSORS, {"structure": {"layers": [plain]}})["version"] == 2
    kinds = [{**plain, "kind": kind} for kind in ("embedding", "transposed_convolution")]
    kinds += [{**plain, "grid": "e2m1", "values": [-1, 0, 1]}, {**plain, "group": 32}]
    assert all(
        seal(TENSORS, {"structure": {"layers": [plain, group]}})["version"] == FORMAT_VERSION == 3
        for group in kinds
    )


def test_verify_takes_tensors_and_manifest_from_elsewhere() -> None:
    manifest = json.loads(json.dumps(seal(TENSORS, {**MANIFEST, "quant_method": "tfmq"})))
    verify(
        {name: torch.nn.Parameter(tensor, requires_grad=False) for name, tensor in TENSORS.items()}, manifest
    )


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"format": "other"}, ForeignFileError, "'other'"),
        ({"format": None}, ForeignFileError, "None"),
        ({"version": 4}, VersionError, "version 4, this tfmq reads 1, 2 and 3"),
        ({"version": "1"}, VersionError, "'1'"),
        ({"version": True}, VersionError, "True"),
        ({"digest": None}, ForeignFileError, "digest"),
        ({"tensors": []}, ForeignFileError, "tensors"),
        ({"digest": "0" * 64}, ChecksumError, "0" * 64),
        ({"extra": 1}, ChecksumError, "was changed since it was sealed"),
    ],
)
def test_each_defect_of_the_manifest_has_its_error(
    saved: Path, changes: dict[str, Any], error: type[CheckpointError], message: str
) -> None:
    edit(saved, **changes)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(saved)
    assert caught.type is error
    assert str(saved / MANIFEST_FILE) in str(caught.value)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({name: TENSORS[name] for name in ("weight", "step")}, "missing: scale;"),
        ({**TENSORS, "extra": torch.zeros(1)}, "unexpected: extra;"),
        ({**TENSORS, "scale": TENSORS["scale"].double()}, r"different: scale .*float32.*float64"),
        ({**TENSORS, "weight": TENSORS["weight"].reshape(4, 16)}, r"different: weight .*\[8, 8\].*\[4, 16\]"),
        ({f"t{index}": torch.zeros(1) for index in range(20)}, "unexpected: t0, .* and 12 more"),
    ],
)
def test_tensors_the_manifest_does_not_list_are_named(tensors: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(TensorMismatchError, match=message):
        verify(tensors, seal(TENSORS, MANIFEST))


def test_changed_values_fail_the_checksum() -> None:
    with pytest.raises(ChecksumError, match="damaged"):
        verify({**TENSORS, "step": torch.tensor(4)}, seal(TENSORS, MANIFEST))


@pytest.mark.parametrize("name", [MANIFEST_FILE, TENSORS_FILE])
def test_missing_files_are_named(saved: Path, name: str) -> None:
    (saved / name).unlink()
    with pytest.raises(MissingFileError, match=name):
        load_checkpoint(saved)


def test_no_flipped_bit_of_the_tensors_file_goes_unnoticed(saved: Path) -> None:
    path = saved / TENSORS_FILE
    good = path.read_bytes()
    data = 8 + int.from_bytes(good[:8], "little")
    positions = random.Random(0).sample(range(len(good) * 8), 400)
    for position in [*range(64), *positions]:
        damaged = bytearray(good)
        damaged[position // 8] ^= 1 << position % 8
        path.write_bytes(damaged)
        expected = (
            ChecksumError
            if position // 8 >= data
            else (ForeignFileError, TruncatedFileError, TensorMismatchError)
        )
        with pytest.raises(expected):
            load_checkpoint(saved)


@pytest.mark.parametrize("stop", ["write_tensors", "write_json"])
@pytest.mark.parametrize("fresh", [True, False])
def test_an_interrupted_save_never_loads_as_the_new_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: str, fresh: bool
) -> None:
    directory = tmp_path / "model"
    if not fresh:
        save_checkpoint(directory, TENSORS, MANIFEST)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, stop, interrupted)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(directory, {**TENSORS, "step": torch.tensor(4)}, {"scheme": "w8a8"})
    if fresh:
        with pytest.raises(MissingFileError):
            load_checkpoint(directory)
    elif stop == "write_tensors":
        assert load_checkpoint(directory)[1] == seal(TENSORS, MANIFEST)
    else:
        with pytest.raises(ChecksumError):
            load_checkpoint(directory)


def test_a_manifest_that_cannot_be_written_costs_nothing(saved: Path) -> None:
    with pytest.raises(TypeError):
        save_checkpoint(saved, {"x": torch.zeros(1)}, {"scheme": object()})
    assert load_checkpoint(saved)[1] == seal(TENSORS, MANIFEST)


def test_outputs_are_created_with_their_parents(tmp_path: Path) -> None:
    target = prepare_output(tmp_path / "a" / "b", overwrite=False)
    assert target.is_dir()
    assert prepare_output(str(target), overwrite=False) == target
    assert not list(target.iterdir())


def test_outputs_that_hold_files_need_overwrite(saved: Path) -> None:
    with pytest.raises(OutputExistsError, match=f"{saved} already holds {MANIFEST_FILE}, {TENSORS_FILE}"):
        prepare_output(saved, overwrite=False)
    prepare_output(saved, overwrite=True)
    load_checkpoint(saved)


@pytest.mark.parametrize("below", ["", "deeper"])
def test_outputs_that_are_files_are_refused(saved: Path, below: str) -> None:
    with pytest.raises(OutputExistsError, match=MANIFEST_FILE):
        prepare_output(saved / MANIFEST_FILE / below, overwrite=True)


@pytest.mark.parametrize(
    ("code", "error"),
    [("EROFS", PermissionError), ("EACCES", PermissionError), ("ENOSPC", StorageFullError), ("EIO", OSError)],
)
def test_outputs_that_cannot_be_written_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, error: type[Exception]
) -> None:
    number = getattr(checkpoint.errno, code)

    def refuse(**_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(checkpoint.tempfile, "TemporaryFile", refuse)
    with pytest.raises((OSError, CheckpointError)) as caught:
        prepare_output(tmp_path, overwrite=True)
    assert caught.type is error


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_outputs_without_permission_are_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match="change its permissions"):
        prepare_output(tmp_path, overwrite=False)
