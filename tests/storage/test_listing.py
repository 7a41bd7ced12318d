"""Files without a manifest: listed, and checked."""

import json
from pathlib import Path

import pytest

from tfmq.storage.errors import CheckpointError, ChecksumError, ForeignFileError, MissingFileError
from tfmq.storage.listing import LISTING_FILE, verify_listed, write_listing
from tfmq.storage.manifest import Manifest, Provenance
from tfmq.storage.parts import Structure

SEAL = "5" * 64


def component(seal: str = SEAL) -> Manifest:
    return Manifest({}, "d" * 64, seal, Structure(1, "timestep"), {}, Provenance())


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    for name in ("model_index.json", "scheduler/config.json", "unet/config.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f'{{"name": "{name}"}}')
    write_listing(tmp_path, components={tmp_path / "unet": component()})
    return tmp_path


def test_a_list_names_every_file_that_nothing_else_seals_and_the_seals(listed: Path) -> None:
    found = {listed / "unet": component()}
    before = (listed / LISTING_FILE).read_bytes()
    values = json.loads(before)
    assert list(values["files"]) == ["model_index.json", "scheduler/config.json"] and values[
        "components"
    ] == {"unet": SEAL}
    verify_listed(listed, found)
    digest = write_listing(listed, components=found)
    assert (listed / LISTING_FILE).read_bytes() == before
    verify_listed(listed, found, expected=digest)
    with pytest.raises(ChecksumError, match="is not the list"):
        verify_listed(listed, found, expected="0" * 64)


def test_what_was_added_or_is_sealed_elsewhere_may_change(listed: Path) -> None:
    found = {listed / "unet": component()}
    (listed / "README.md").write_text("a card")
    (listed / "unet" / "config.json").write_text("{}")
    verify_listed(listed, found)
    (listed / LISTING_FILE).unlink()
    (listed / "scheduler" / "config.json").unlink()
    verify_listed(listed, found)
    with pytest.raises(MissingFileError, match=LISTING_FILE):
        verify_listed(listed, found, expected="0" * 64)


def test_components_are_those_that_were_listed(listed: Path) -> None:
    for found in ({}, {"unet": component("6" * 64)}, {"unet": component(), "vae": component()}):
        with pytest.raises(ChecksumError):
            verify_listed(listed, {listed / name: manifest for name, manifest in found.items()})
    (listed / "unet" / "config.json").unlink()
    (listed / "unet").rmdir()
    with pytest.raises(MissingFileError, match="unet is missing"):
        verify_listed(listed, {})


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("scheduler/config.json", "{}", ChecksumError),
        ("model_index.json", "", ChecksumError),
        ("model_index.json", None, MissingFileError),
        (LISTING_FILE, '{"model_index.json": 1}', ForeignFileError),
        (LISTING_FILE, '{"files": {}, "components": []}', ForeignFileError),
        (LISTING_FILE, "[", ForeignFileError),
    ],
)
def test_each_damage_has_its_error(
    listed: Path, name: str, content: str | None, error: type[CheckpointError]
) -> None:
    path = listed / name
    if content is None:
        path.unlink()
    else:
        path.write_text(content)
    with pytest.raises(error, match=path.name):
        verify_listed(listed, {listed / "unet": component()})
