"""Whether a picture shows what its prompt says, attribute by attribute."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from torch import Tensor

from tfmq.storage.atomic import read_json

# Name of the metric; each of its values is named `adherence.ATTRIBUTE`.
ADHERENCE = "adherence"
# Name of the file beside a model that names its judge: `{"judge": NAME}`.
JUDGE_FILE = "judge.json"


class Judge(Protocol):
    """Reads the attributes of pictures.

    Called with images `[N, 3, H, W]` in [0, 1] and a prompt for each, it returns for each attribute one
    verdict a picture: True or False, and None where the prompt says nothing of it. The same picture and
    prompt always get the same verdict.
    """

    @property
    def attributes(self) -> tuple[str, ...]:
        """Return the names of the attributes that it reads."""

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Mapping[str, list[bool | None]]: ...


JUDGES: dict[str, Callable[[], Judge]] = {}


def register_judge(name: str) -> Callable[[Callable[[], Judge]], Callable[[], Judge]]:
    """Return a decorator that registers what makes a judge under `name`, the name that a model's `judge.json`
    gives.

    Raises:
        ValueError: the name is taken.
    """

    def fill(make: Callable[[], Judge]) -> Callable[[], Judge]:
        if name in JUDGES:
            raise ValueError(f"a judge called {name} is registered already")
        JUDGES[name] = make
        return make

    return fill


def brought_judge(directory: Path) -> str | None:
    """Return the name of the judge that the model in `directory` brings; None where it brings none.

    Raises:
        TruncatedFileError, ForeignFileError: its `judge.json` is damaged.
    """
    path = directory / JUDGE_FILE
    name = read_json(path).get("judge") if path.is_file() else None
    return None if name is None else str(name)
