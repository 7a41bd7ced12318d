"""Prompts that the directory of a text-to-image pipeline brings: what it is drawn and calibrated with unless
others are given.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tfmq.storage.atomic import read_json
from tfmq.storage.fields import Fields

PROMPTS_FILE = "prompts.json"
# Characters of the longest prompt, far more than a text encoder reads.
LONGEST = 20_000


def prompts_content(prompts: Sequence[str]) -> dict[str, Any]:
    """Return what `PROMPTS_FILE` holds for these prompts."""
    return {"prompts": list(prompts)}


def brought_prompts(directory: Path) -> tuple[str, ...]:
    """Return the prompts of a pipeline's directory; none where it brings none.

    Raises:
        TruncatedFileError, ForeignFileError: its `prompts.json` is damaged.
    """
    path = directory / PROMPTS_FILE
    if not path.is_file():
        return ()
    fields = Fields.of(read_json(path), str(path))
    found = fields.items("prompts")
    if not found or not all(
        isinstance(text, str) and text.strip() and len(text) <= LONGEST for text in found
    ):
        raise fields.refuse("prompts", f"a list of texts of 1 to {LONGEST} characters")
    return tuple(found)
