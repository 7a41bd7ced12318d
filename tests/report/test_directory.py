"""Output directories that change once their content is complete."""

import errno
from pathlib import Path

import pytest

from tfmq.report.directory import completed_directory
from tfmq.storage.errors import OutputExistsError, StorageFullError

OWNED = ("[0-9]*.png", "a.npz")


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_files_arrive_together(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    with completed_directory(target, owned=OWNED) as folder:
        (folder / "a.npz").write_text("1")
        assert names(target) == []
    assert names(target) == ["a.npz"] and names(tmp_path / "deep") == ["out"]


def test_an_earlier_run_is_replaced_whole(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    for name in ("00.png", "01.png", "a.npz"):
        (tmp_path / "out" / name).write_text("old")
    with completed_directory(tmp_path / "out", owned=OWNED) as folder:
        (folder / "00.png").write_text("new")
    assert names(tmp_path / "out") == ["00.png"] and (tmp_path / "out" / "00.png").read_text() == "new"


def test_foreign_files_are_not_touched(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years")
    with (
        pytest.raises(OutputExistsError, match=r"thesis\.tex"),
        completed_directory(tmp_path / "out", owned=OWNED),
    ):
        raise AssertionError("the block must not run")
    assert names(tmp_path / "out") == ["thesis.tex"]


@pytest.mark.parametrize("existed", [False, True])
@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), ValueError("no")]
)
def test_a_failure_leaves_what_was_there(tmp_path: Path, existed: bool, error: BaseException) -> None:
    target = tmp_path / "out"
    if existed:
        target.mkdir()
        (target / "00.png").write_text("old")
    expected = StorageFullError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected), completed_directory(target, owned=OWNED) as folder:
        (folder / "00.png").write_text("new")
        raise error
    assert names(tmp_path) == (["out"] if existed else [])
    assert not existed or (target / "00.png").read_text() == "old"


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with (
        pytest.raises(OutputExistsError, match="not a directory"),
        completed_directory(tmp_path / "out", owned=OWNED),
    ):
        raise AssertionError("the block must not run")


def test_the_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with completed_directory(Path("."), owned=OWNED) as folder:
        (folder / "a.npz").write_text("1")
    assert names(tmp_path / "here") == ["a.npz"] and names(tmp_path) == ["here"]
