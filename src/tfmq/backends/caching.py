"""The directory in which backends keep what they made for this machine."""

import os
from pathlib import Path

CACHE = "TFMQ_CACHE"


def cache_directory(name: str) -> Path:
    """Return a backend's own folder in `$TFMQ_CACHE`, or in `tfmq` in the user's cache directory."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get(CACHE) or Path(home) / "tfmq") / name
