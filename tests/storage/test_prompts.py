"""Prompts that the directory of a pipeline brings."""

import json
from pathlib import Path
from typing import Any

import pytest

from tfmq.storage.errors import ForeignFileError
from tfmq.storage.prompts import LONGEST, PROMPTS_FILE, brought_prompts, prompts_content


def test_what_is_written_is_read(tmp_path: Path) -> None:
    assert brought_prompts(tmp_path) == ()
    (tmp_path / PROMPTS_FILE).write_text(json.dumps(prompts_content(["a red seven", "ein weißer Bär"])))
    assert brought_prompts(tmp_path) == ("a red seven", "ein weißer Bär")


@pytest.mark.parametrize("prompts", [None, "a", [], [1], [" "], ["a", None], ["a" * (LONGEST + 1)]])
def test_anything_else_is_refused(tmp_path: Path, prompts: Any) -> None:
    (tmp_path / PROMPTS_FILE).write_text(json.dumps({"prompts": prompts}))
    with pytest.raises(ForeignFileError, match="prompts"):
        brought_prompts(tmp_path)
