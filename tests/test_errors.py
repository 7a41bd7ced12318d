import sys
from pathlib import Path

import pytest

from tfmq.errors import MissingExtraError, require
from tfmq.progress import silent


def test_an_installed_dependency_is_returned() -> None:
    assert require("json", extra="cli") is sys.modules["json"]


def test_a_missing_one_names_the_extra_that_brings_it() -> None:
    with pytest.raises(
        MissingExtraError, match=r"needs not_there_at_all; install it with: pip install 'tfmq\[cli\]'"
    ):
        require("not_there_at_all.sub", extra="cli")


def test_a_broken_dependency_is_not_called_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_dependency.py").write_text("import its_own_missing_dependency")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="its_own_missing_dependency") as caught:
        require("broken_dependency", extra="cli")
    assert not isinstance(caught.value, MissingExtraError)


def test_silence_takes_every_advance() -> None:
    with silent("work", 3) as advance:
        advance()
        advance(2)
