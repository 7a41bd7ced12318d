"""A Python file of somebody's, imported by its path."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def loaded(path: Path) -> ModuleType:
    """Return the module in the file `path`.

    Raises:
        ValueError: there is no such Python file.
    """
    spec = importlib.util.spec_from_file_location(f"benchmarked_{path.stem}", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ValueError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
