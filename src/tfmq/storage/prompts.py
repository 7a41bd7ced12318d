"""How the directory of a text-to-image pipeline wants to be drawn: prompts and guidance that count, in
calibration too, unless others are given.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tfmq.storage.atomic import read_json
from tfmq.storage.fields import Fields

PROMPTS_FILE = "prompts.json"
GUIDANCE = "guidance_scale"
# Characters of the longest prompt, far more than a text encoder reads.
LONGEST = 20_000


@dataclass(frozen=True)
class Brought:
    """What a directory brings: prompts, and arguments of the pipeline's call."""

    prompts: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


def prompts_content(prompts: Sequence[str], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `PROMPTS_FILE` holds for these prompts and the guidance among `options`."""
    guidance = {GUIDANCE: float(options[GUIDANCE])} if options.get(GUIDANCE) is not None else {}
    return {"prompts": list(prompts), **guidance}


def brought(directory: Path) -> Brought:
    """Return what a pipeline's directory brings; nothing where it has no such file.

    Raises:
        TruncatedFileError, ForeignFileError: its `prompts.json` is damaged.
    """
    path = directory / PROMPTS_FILE
    if not path.is_file():
        return Brought()
    fields = Fields.of(read_json(path), str(path))
    found = fields.items("prompts")
    if not found or not all(
        isinstance(text, str) and text.strip() and len(text) <= LONGEST for text in found
    ):
        raise fields.refuse("prompts", f"a list of texts of 1 to {LONGEST} characters")
    guidance = fields.number(GUIDANCE) if GUIDANCE in fields.values else None
    if guidance is not None and guidance < 0:
        raise fields.refuse(GUIDANCE, "a number that is not negative")
    return Brought(tuple(found), {} if guidance is None else {GUIDANCE: guidance})
