"""Prompts that the directory of a pipeline brings."""

import json
from pathlib import Path
from typing import Any

import pytest

from tfmq.storage.errors import ForeignFileError
from tfmq.storage.prompts import LONGEST, PROMPTS_FILE, Brought, brought, prompts_content


def test_what_is_written_is_read(tmp_path: Path) -> None:
    assert brought(tmp_path) == Brought()
    texts = ("a red seven", "ein weißer Bär")
    for options in ({}, {"guidance_scale": 3.0}):
        (tmp_path / PROMPTS_FILE).write_text(json.dumps(prompts_content(texts, options)))
        assert brought(tmp_path) == Brought(texts, options)


@pytest.mark.parametrize("prompts", [None, "a", [], [1], [" "], ["a", None], ["a" * (LONGEST + 1)]])
def test_anything_else_is_refused(tmp_path: Path, prompts: Any) -> None:
    (tmp_path / PROMPTS_FILE).write_text(json.dumps({"prompts": prompts}))
    with pytest.raises(ForeignFileError, match="prompts"):
        brought(tmp_path)


@pytest.mark.parametrize("guidance", ["3", -1.0, None, True])
def test_a_guidance_that_is_no_number_is_refused(tmp_path: Path, guidance: Any) -> None:
    (tmp_path / PROMPTS_FILE).write_text(json.dumps({"prompts": ["a"], "guidance_scale": guidance}))
    with pytest.raises(ForeignFileError, match="guidance_scale"):
        brought(tmp_path)
