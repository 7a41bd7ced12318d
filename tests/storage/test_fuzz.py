"""Files of `corpus/`, spoiled byte by byte: every reader ends in an error of the closed set, or reads.

hypothesis draws the edits, and shrinks those that break something; the failing bytes become a case of the
`test_hostile` of their format. By hand for longer, and with edits that no run has drawn:

    TFMQ_FUZZ=20000 TFMQ_TEST_SEED=random pytest tests/storage/test_fuzz.py
"""

import os
import shutil
import tempfile
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tfmq
from tfmq.models.denoiser import Denoiser, Inputs
from tfmq.recipes import yaml
from tfmq.storage.atomic import read_tensors
from tfmq.storage.comfy import split_layers
from tfmq.storage.errors import CheckpointError
from tfmq.storage.gguf import read_gguf

Plain = tuple[Denoiser, Inputs]
CORPUS = Path(__file__).parent / "corpus"
# Edits of a file; a thousand take a minute in all.
EXAMPLES = int(os.environ.get("TFMQ_FUZZ", "1000"))
# Where Linux keeps files in memory.
MEMORY = "/dev/shm"
# Characters of the longest message.
LONGEST = 2000
# What lengths, counts and offsets are when they lie.
NUMBERS = (0, 1, 7, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1)
# What JSON and YAML of strangers hold.
WORDS = (b"null", b"NaN", b"-1", b"1e999", b"[]", b"{}", b'""', b"[" * 50, b"&a", b"*a", b"\xff\xfe", b"\0")


class Edit(NamedTuple):
    """A change of bytes at a place, which is a share of the length."""

    kind: str
    place: float
    size: int
    content: bytes


def edits() -> st.SearchStrategy[list[Edit]]:
    content = st.one_of(
        st.binary(min_size=1, max_size=12),
        st.sampled_from(WORDS),
        st.sampled_from(NUMBERS).map(lambda number: number.to_bytes(8, "little")),
        st.sampled_from(NUMBERS[:7]).map(lambda number: (number % 2**32).to_bytes(4, "little")),
    )
    kinds = st.sampled_from(["flip", "set", "insert", "drop", "repeat", "cut"])
    # Headers decide, so that half of the edits are near the beginning.
    places = st.one_of(st.floats(0, 1), st.floats(0, 0.1))
    return st.lists(st.builds(Edit, kinds, places, st.integers(1, 64), content), min_size=1, max_size=4)


def spoiled(whole: bytes, changes: list[Edit]) -> bytes:
    for kind, share, size, content in changes:
        place = int(share * len(whole))
        before, after = whole[:place], whole[place:]
        match kind:
            case "flip" if after:
                whole = before + bytes([after[0] ^ 1 << size % 8]) + after[1:]
            case "set":
                whole = before + content + after[len(content) :]
            case "insert":
                whole = before + content + after
            case "drop":
                whole = before + after[size:]
            case "repeat":
                whole = before + after[:size] * 2 + after[size:]
            case "cut":
                whole = before
    return whole


def in_checkpoint(path: Path, plain: Plain) -> None:
    """Load a module from the folder of a file into a copy of the plain one, and compute with it."""
    denoiser, inputs = plain
    module = tfmq.load(path.parent, module=deepcopy(denoiser.module), backend="simulated")
    with torch.no_grad():
        module(inputs.sample, inputs.timestep.float())


READERS: dict[str, Callable[[Path, Plain], object]] = {
    "comfy.safetensors": lambda path, _: split_layers(*read_tensors(path), source=path),
    "blocks.gguf": lambda path, _: read_gguf(path),
    "recipe.yaml": lambda path, _: yaml.load(path),
    "checkpoint/tfmq.json": in_checkpoint,
    "checkpoint/tfmq_model.safetensors": in_checkpoint,
}


@pytest.mark.filterwarnings("ignore:timestep .* was not calibrated")
@pytest.mark.parametrize("name", READERS)
def test_whatever_the_bytes_are_the_reader_ends_as_documented(
    name: str, build: Callable[[str], Plain]
) -> None:
    source, read = CORPUS / name, READERS[name]
    whole, plain = source.read_bytes(), build("plain")
    # Recipes are no checkpoints: they are refused as values.
    allowed: type[Exception] = ValueError if name.endswith(".yaml") else CheckpointError

    # Some disks take milliseconds to write a file anew.
    with tempfile.TemporaryDirectory(dir=MEMORY if os.access(MEMORY, os.W_OK) else None) as folder:
        where = Path(folder) / "model"
        shutil.copytree(source.parent, where)
        read(where / source.name, plain)

        @settings(max_examples=EXAMPLES)
        @given(edits())
        def ends(changes: list[Edit]) -> None:
            (where / source.name).write_bytes(spoiled(whole, changes))
            try:
                read(where / source.name, plain)
            except allowed as error:
                assert 0 < len(str(error)) <= LONGEST

        ends()
