from pathlib import Path

import pytest
import torch
from torch import Tensor

from tfmq.storage.errors import JobMismatchError, MissingFileError
from tfmq.storage.journal import Journal

FINGERPRINT = {"model": "abc", "recipe": {"weights": {"bits": 4}, "rules": [{"match": "*"}]}, "seed": 0}


def counting(log: list[str], name: str) -> dict[str, Tensor]:
    log.append(name)
    return {"x": torch.arange(3) + len(log)}


def test_a_finished_stage_is_read_back_and_not_computed_again(tmp_path: Path) -> None:
    log: list[str] = []
    for resume in (False, True):
        journal = Journal(tmp_path / "job", FINGERPRINT, resume=resume)
        for name in ("a", "b"):
            assert journal.done(name) is resume
            found = journal.stage(name, lambda name=name: counting(log, name))
            assert found["x"].tolist() == ([1, 2, 3] if name == "a" else [2, 3, 4])
            assert journal.done(name)
    assert log == ["a", "b"]


def test_a_stage_that_was_not_finished_cannot_be_read(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "job", FINGERPRINT, resume=False)
    journal.stage("a", lambda: counting([], "a"))
    assert journal.read("a")["x"].tolist() == [1, 2, 3]
    for missing in (journal, Journal(None, FINGERPRINT, resume=False)):
        with pytest.raises(MissingFileError, match="b"):
            missing.read("b")


def test_without_resume_a_job_starts_over(tmp_path: Path) -> None:
    log: list[str] = []
    for _ in range(2):
        Journal(tmp_path / "job", FINGERPRINT, resume=False).stage("a", lambda: counting(log, "a"))
    assert log == ["a", "a"]


def test_a_stage_that_fails_leaves_nothing(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "job", FINGERPRINT, resume=False)

    def fail() -> dict[str, Tensor]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        journal.stage("a", fail)
    assert not journal.done("a") and [path.name for path in (tmp_path / "job").iterdir()] == ["job.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed was 0 and is 1"),
        (
            {"recipe": {"weights": {"bits": 8}, "rules": [{"match": "*"}]}},
            r"recipe\.weights\.bits was 4 and is 8",
        ),
        ({"recipe": {"weights": {"bits": 4}, "rules": []}}, r"recipe\.rules was \[.*\] and is \[\]"),
        ({"extra": 1}, "extra was None and is 1"),
    ],
)
def test_another_job_is_refused_by_the_field_that_differs(tmp_path: Path, change: dict, message: str) -> None:
    Journal(tmp_path / "job", FINGERPRINT, resume=False).stage("a", lambda: counting([], "a"))
    with pytest.raises(JobMismatchError, match=message):
        Journal(tmp_path / "job", {**FINGERPRINT, **change}, resume=True)
    assert Journal(tmp_path / "job", FINGERPRINT, resume=True).done("a"), (
        "the refused attempt destroyed nothing"
    )


def test_resuming_what_never_began_begins(tmp_path: Path) -> None:
    assert not Journal(tmp_path / "new", FINGERPRINT, resume=True).done("a")
    (tmp_path / "empty").mkdir()
    assert not Journal(tmp_path / "empty", FINGERPRINT, resume=True).done("a")


def test_without_a_directory_every_stage_is_computed_and_nothing_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    journal, log = Journal(None, FINGERPRINT, resume=False), []
    for _ in range(2):
        journal.stage("a", lambda: counting(log, "a"))
        assert not journal.done("a")
    journal.remove()
    assert log == ["a", "a"] and list(tmp_path.iterdir()) == []


def test_removing_deletes_the_job(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "job", FINGERPRINT, resume=False)
    journal.stage("a", lambda: counting([], "a"))
    journal.remove()
    assert not (tmp_path / "job").exists()
