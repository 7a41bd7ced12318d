"""Files without a manifest: listed, and checked."""

import json
from pathlib import Path

import pytest

from tfmq.storage.errors import CheckpointError, ChecksumError, ForeignFileError, MissingFileError
from tfmq.storage.listing import LISTING_FILE, verify_listed, write_listing


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    for name in ("model_index.json", "scheduler/config.json", "unet/config.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f'{{"name": "{name}"}}')
    write_listing(tmp_path, sealed=[tmp_path / "unet"])
    return tmp_path


def test_a_list_names_every_file_that_nothing_else_seals(listed: Path) -> None:
    before = (listed / LISTING_FILE).read_bytes()
    assert list(json.loads(before)) == ["model_index.json", "scheduler/config.json"]
    verify_listed(listed)
    write_listing(listed, sealed=[listed / "unet"])
    assert (listed / LISTING_FILE).read_bytes() == before


def test_what_was_added_or_is_sealed_elsewhere_may_change(listed: Path) -> None:
    (listed / "README.md").write_text("a card")
    (listed / "unet" / "config.json").write_text("{}")
    verify_listed(listed)
    (listed / LISTING_FILE).unlink()
    (listed / "scheduler" / "config.json").unlink()
    verify_listed(listed)


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("scheduler/config.json", "{}", ChecksumError),
        ("model_index.json", "", ChecksumError),
        ("model_index.json", None, MissingFileError),
        (LISTING_FILE, '{"model_index.json": 1}', ChecksumError),
        (LISTING_FILE, "[", ForeignFileError),
    ],
)
def test_each_damage_has_its_error(listed: Path, name: str, content: str | None, error: type[CheckpointError]) -> None:
    path = listed / name
    if content is None:
        path.unlink()
    else:
        path.write_text(content)
    with pytest.raises(error, match=path.name):
        verify_listed(listed)
