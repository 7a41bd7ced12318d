"""What reaches the hub: the files, the card, in one commit. The hub itself is stood in for."""

from pathlib import Path
from typing import Any

import pytest

from tfmq.integrations import hub


class Recorder:
    """Stands in for the hub's client."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def create_repo(self, repository: str, **options: Any) -> str:
        self.calls.append(("create", (repository, options)))
        return f"https://example.org/{repository}"

    def create_commit(self, repository: str, operations: Any, *, commit_message: str) -> None:
        files = {operation.path_in_repo: operation.path_or_fileobj for operation in operations}
        self.calls.append(("commit", (repository, files)))


def test_files_and_card_in_one_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    monkeypatch.setattr(hub, "HfApi", lambda: recorder)
    (tmp_path / "unet").mkdir()
    for name in ("model_index.json", "unet/config.json", "README.md"):
        (tmp_path / name).write_text(name)
    assert (
        hub.push_folder(tmp_path, "me/model", card="# card", private=True) == "https://example.org/me/model"
    )
    (_, (created, options)), (_, (committed, files)) = recorder.calls
    assert created == committed == "me/model" and options == {"private": True, "exist_ok": True}
    assert files.keys() == {"model_index.json", "unet/config.json", "README.md"}
    assert (
        files["README.md"] == b"# card" and Path(files["unet/config.json"]).read_text() == "unet/config.json"
    )


def test_a_refusal_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import HFValidationError

    class Refusing(Recorder):
        def create_repo(self, repository: str, **options: Any) -> str:
            raise HFValidationError("no such name\nand more")

    monkeypatch.setattr(hub, "HfApi", Refusing)
    with pytest.raises(ValueError, match="cannot push to me/model: no such name; log in"):
        hub.push_folder(tmp_path, "me/model", card="")
