import errno
import os
import stat
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tfmq.storage import (
    CheckpointError,
    ForeignFileError,
    MissingFileError,
    StorageFullError,
    TruncatedFileError,
    atomic,
    atomic_write,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
)
from tfmq.storage.atomic import full_disk_named, remove_orphans

TENSORS = {
    "b": torch.arange(6.0).reshape(2, 3),
    "a": torch.tensor([1, 2, 3], dtype=torch.uint8),
    "c": torch.tensor(1.5),
    "d": torch.zeros(0, 2),
}


def names(directory: Path) -> list[str]:
    return sorted(os.listdir(directory))


@pytest.fixture
def old(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    return path


def test_success_replaces_the_file_and_leaves_nothing_else(old: Path) -> None:
    with atomic_write(old) as temporary:
        assert temporary.parent == old.parent
        temporary.write_bytes(b"new")
        assert old.read_bytes() == b"old"
    assert old.read_bytes() == b"new"
    assert names(old.parent) == ["file"]


def test_file_and_then_directory_are_synced(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[tuple[bool, bytes]] = []
    monkeypatch.setattr(
        os,
        "fsync",
        lambda descriptor: synced.append((stat.S_ISDIR(os.fstat(descriptor).st_mode), old.read_bytes())),
    )
    with atomic_write(old) as temporary:
        temporary.write_bytes(b"new")
    assert synced == [(False, b"old"), (True, b"new")]


def test_on_macos_the_drive_is_flushed_too(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for the system's module; else `fsync` is all there is."""
    flushed: list[tuple[bool, int]] = []

    def control(descriptor: int, command: int) -> None:
        flushed.append((stat.S_ISDIR(os.fstat(descriptor).st_mode), command))
        if failing:
            raise OSError(failing, os.strerror(failing))

    monkeypatch.setattr("tfmq.storage.flush.fcntl", SimpleNamespace(F_FULLFSYNC=51, fcntl=control))
    failing = 0
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", None)
        write_json(old, {})
    assert flushed == [(False, 51), (True, 51)]
    failing = errno.ENOTSUP
    write_json(old, {"a": 1})
    assert read_json(old) == {"a": 1}
    failing = errno.EIO
    with pytest.raises(OSError, match="Input/output"):
        write_json(old, {})
    monkeypatch.setattr("tfmq.storage.flush.fcntl", None)
    write_json(old, {})


def test_on_windows_no_directory_is_opened(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for the system, whose `os.open` refuses directories as that one does."""

    class Windows:
        name = "nt"

        def __getattr__(self, name: str) -> Any:
            return getattr(os, name)

        @staticmethod
        def open(path: Path, flags: int, mode: int = 0o777) -> int:
            if Path(path).is_dir():
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return os.open(path, flags, mode)

    monkeypatch.setattr(atomic, "os", Windows())
    with atomic_write(old) as temporary:
        temporary.write_bytes(b"new")
    assert old.read_bytes() == b"new" and names(old.parent) == ["file"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, PermissionError])
def test_failure_leaves_the_old_file(old: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), atomic_write(old) as temporary:
        temporary.write_bytes(b"half")
        raise error
    assert old.read_bytes() == b"old"
    assert names(old.parent) == ["file"]


def test_files_obey_the_umask(tmp_path: Path) -> None:
    previous = os.umask(0o027)
    try:
        write_json(tmp_path / "file", {})
    finally:
        os.umask(previous)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


def test_missing_directory_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(MissingFileError, match="absent does not exist"),
        atomic_write(tmp_path / "absent" / "file"),
    ):
        pass


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("call", ["fsync", "replace", "open"])
def test_full_disk_is_named_and_leaves_the_old_file(
    old: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    def full(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(StorageFullError, match=r"file needs 8\d+ bytes") as caught:
        write_tensors(old, {"x": torch.zeros(200)})
    monkeypatch.undo()
    assert isinstance(caught.value.__cause__, OSError)
    assert old.read_bytes() == b"old"
    assert names(old.parent) == ["file"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_that_the_library_puts_into_words(code: int) -> None:
    with (
        pytest.raises(StorageFullError, match=rf"file needs 80 bytes \({os.strerror(code)}\)"),
        full_disk_named(Path("file"), needed_bytes=80),
    ):
        raise SafetensorError(f"Error while serializing: I/O error: {os.strerror(code)} (os error {code})")


def test_other_failures_of_the_library_pass(tmp_path: Path) -> None:
    with pytest.raises(SafetensorError), full_disk_named(tmp_path):
        save_file({"x": torch.zeros(20)}, tmp_path / "nowhere" / "file")


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="needs /dev/full")
def test_full_disk_is_noticed_while_writing(old: Path) -> None:
    with (
        pytest.raises(StorageFullError, match="needs more bytes than are left"),
        atomic_write(old) as temporary,
    ):
        temporary.unlink()
        temporary.symlink_to("/dev/full")
        temporary.write_bytes(bytes(100))
    assert old.read_bytes() == b"old"
    assert names(old.parent) == ["file"]


def test_directories_that_cannot_be_synced_are_tolerated(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", refuse)
    code = errno.EINVAL
    write_json(old, {})
    code = errno.EIO
    with pytest.raises(OSError, match="Input/output"):
        write_json(old, {})


def test_json_is_canonical_and_inverts(tmp_path: Path) -> None:
    write_json(tmp_path / "file", {"b": [1, None], "a": "ü"})
    assert (tmp_path / "file").read_text(encoding="utf-8") == '{\n "a": "ü",\n "b": [\n  1,\n  null\n ]\n}\n'
    assert read_json(tmp_path / "file") == {"a": "ü", "b": [1, None]}


@pytest.mark.parametrize(("value", "error"), [(float("nan"), ValueError), (object(), TypeError)])
def test_values_json_lacks_leave_the_old_file(old: Path, value: object, error: type[Exception]) -> None:
    with pytest.raises(error):
        write_json(old, {"a": value})
    assert old.read_bytes() == b"old"


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b"", TruncatedFileError),
        (b'{"a": 1', ForeignFileError),
        (b"\x80\x04", ForeignFileError),
        (b"[1]", ForeignFileError),
        (b"[" * 100_000, ForeignFileError),
        (b'{"a": ' * 70 + b"1" + b"}" * 70, ForeignFileError),
        (b'{"a": NaN}', ForeignFileError),
        (b'{"a": -Infinity}', ForeignFileError),
        (b'{"a": 1e999}', ForeignFileError),
        (b'{"a": "\\ud800"}', ForeignFileError),
        (b'{"\\udc00": 1}', ForeignFileError),
        (b'{"a": ' + b"1" * 5000 + b"}", ForeignFileError),
        (b" " * (16 * 2**20) + b"{}", ForeignFileError),
    ],
)
def test_each_malformed_json_has_its_error(
    tmp_path: Path, content: bytes, error: type[CheckpointError]
) -> None:
    (tmp_path / "file.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"file\.json .*; (copy|pass)") as caught:
        read_json(tmp_path / "file.json")
    assert caught.type is error


def test_devices_and_pipes_are_not_read_as_json(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(ForeignFileError, match="not a regular file"):
            read_json(path)


def test_orphans_are_told_from_files_of_others(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    orphans = [tmp_path / ".a.json.0123456789ab.tmp", tmp_path / "deep" / ".b.safetensors.abcdef012345.tmp"]
    others = [
        tmp_path / "a.tmp",
        tmp_path / ".a.tmp",
        tmp_path / "a.json.0123456789ab.tmp",
        tmp_path / ".a.0123456789AB.tmp",
    ]
    for path in (*orphans, *others):
        path.write_bytes(b"half")
    remove_orphans(tmp_path)
    assert not any(path.exists() for path in orphans) and all(path.exists() for path in others)


def test_missing_json_and_directories(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="absent"):
        read_json(tmp_path / "absent")
    with pytest.raises(ForeignFileError, match="is a directory"):
        read_json(tmp_path)


def test_tensors_invert_and_the_library_reads_them(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    write_tensors(path, TENSORS, metadata={"z": "1", "a": "2"})
    tensors, metadata = read_tensors(path)
    for loaded in (tensors, load_file(path)):
        assert loaded.keys() == TENSORS.keys()
        for name, tensor in TENSORS.items():
            torch.testing.assert_close(loaded[name], tensor, rtol=0, atol=0)
    assert metadata == {"z": "1", "a": "2"}


def test_bytes_do_not_depend_on_order_strides_or_sharing(tmp_path: Path) -> None:
    written = set()
    metadata = {"z": "1", "a": "2", "m": "3"}
    for index, order in enumerate(permutations(TENSORS)):
        tensors = {name: TENSORS[name].clone() for name in order}
        tensors["b"] = tensors["b"].T.contiguous().T
        tensors["e"] = tensors["a"] if index % 2 else tensors["a"].clone()
        write_tensors(
            tmp_path / "file", tensors, metadata=dict(sorted(metadata.items(), reverse=bool(index % 2)))
        )
        written.add((tmp_path / "file").read_bytes())
    assert len(written) == 1


def test_no_tensors_are_a_valid_file(tmp_path: Path) -> None:
    write_tensors(tmp_path / "file", {})
    assert read_tensors(tmp_path / "file") == ({}, {})


def test_loaded_tensors_outlive_a_rewrite_of_their_file(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    write_tensors(path, {"x": torch.ones(1000)})
    tensors, _ = read_tensors(path)
    write_tensors(path, {"x": torch.zeros(1000)})
    assert torch.equal(tensors["x"], torch.ones(1000))


def test_tensors_without_values_leave_the_old_file(old: Path) -> None:
    with pytest.raises(ValueError, match="meta"):
        write_tensors(old, {"x": torch.empty(2, device="meta")})
    assert old.read_bytes() == b"old"
    assert names(old.parent) == ["file"]
