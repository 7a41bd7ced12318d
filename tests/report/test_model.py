"""What a report knows, and the model card that says it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tfmq.report.card import render_card, write_card
from tfmq.report.model import ModelReport, gather
from tfmq.storage.digest import tensor_digest
from tfmq.storage.errors import CheckpointError

# Of the tensors of `write_model`: it has none.
DIGEST = tensor_digest({})
Write, Read = Callable[..., Path], Callable[..., ModelReport]


def test_everything_is_gathered(write_model: Write, gathered: Read) -> None:
    folder = write_model()
    found = gathered(folder)
    facts = dict(found.facts)
    on_disk = sum(path.stat().st_size for path in folder.iterdir())
    assert facts["stays in floating point"] == "0.8 kB (7.0% of the size) in 7 modules"
    assert facts["the largest of it"].startswith("norms.0 (GroupNorm, 0.1 kB): norm; norms.1") and facts[
        "the largest of it"
    ].endswith("norms.5 (GroupNorm, 0.1 kB): norm; and 1 more")
    assert (
        facts["seed of the quantization"] == "5"
        and f"({on_disk / 10_000:.3f}x)" in facts["size of the denoiser"]
    )
    assert (
        "100 images of 4 steps, seed 7" in facts["evaluated on"]
        and "torch-fidelity" not in facts["evaluated by"]
    )
    assert [(row.name, row.full, row.quantized) for row in found.metrics] == [
        ("fid against real", "3.25", "3.5"),
        ("fid against full precision", "", "0.75"),
        ("is", "9 ± 0.5", ""),
    ]
    assert dict(found.pairs)["latent error"].startswith(
        "relative error 0.05 mean, 0.07 worst"
    ) and found.units == (("mid", 0.2, 0.1),)
    first, last = found.layers
    assert (first.name, first.weight_bits, first.activation_bits, first.error) == ("mid.a", 4, 8, 0.1)
    assert first.scheme == "weight asymmetric, input per timestep, split in 2"
    assert (last.activation_bits, last.scheme, last.quantized_ms) == (
        None,
        "weight symmetric, input in full precision",
        0.5,
    )
    assert dict(found.recipe)["rules[0]"] == "match: role:first, weights.bits: 8"


def test_reports_of_releases_that_did_not_say_what_stays_in_floating_point_are_read(
    write_model: Write,
) -> None:
    folder = write_model()
    report = json.loads((folder / "tfmq_report.json").read_text())
    (folder / "tfmq_report.json").write_text(
        json.dumps({key: value for key, value in report.items() if key != "floating"})
    )
    assert not {"stays in floating point", "the largest of it"} & dict(gather(folder).facts).keys()


def test_what_was_not_measured_is_absent(write_model: Write) -> None:
    found = gather(write_model())
    assert found.evaluation is None and found.analysis is None and found.images is None and not found.metrics
    assert all(layer.error is None for layer in found.layers) and "evaluated on" not in dict(found.facts)
    assert "Not evaluated" in render_card(found)


def test_speed_stands_with_the_machine_it_was_measured_on(
    write_model: Write, gathered: Read, bench_file: Write
) -> None:
    folder = write_model()
    assert gathered(folder).speed is None and "## Speed" not in render_card(gathered(folder))
    card = render_card(gathered(folder, bench=bench_file()))
    assert (
        "Measured on A 1 (avx2), 2 threads on 4 processors, torch 2.\n" in card
        and "| torch | 1 | 1234.2 | 2.50x | 1250 |" in card
    )
    assert "kept the processors busy" in render_card(
        gathered(folder, bench=bench_file(of_row={"clean": False}))
    )


@pytest.mark.parametrize("part", ["evaluation", "analysis"])
def test_values_of_another_model_are_refused(write_model: Write, gathered: Read, part: str) -> None:
    folder = write_model()
    path = folder.with_name(f"model.{part}") / f"{part}.json"
    path.write_text(path.read_text().replace(f'"{DIGEST}"', '"d2"'))
    with pytest.raises(
        CheckpointError, match=f"model.{part} is of a model with sha256 d2, this one has {DIGEST}"
    ):
        gathered(folder)


def test_a_benchmark_of_other_weights_is_refused(
    write_model: Write, gathered: Read, bench_file: Write
) -> None:
    with pytest.raises(
        CheckpointError,
        match=rf"bench\.json is of a model with sha256 d2, this one has {DIGEST}; measure again",
    ):
        gathered(write_model(), bench=bench_file(weights="d2"))


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"without": "weights"}, "lacks weights; it is not from tfmq bench --json: run that again"),
        ({"without": "machine"}, "lacks machine"),
        ({"without": "rows"}, "lacks rows"),
        ({"rows": []}, "holds no rows"),
        ({"rows": [{"backend": "torch"}]}, "holds no rows"),
        ({"of_row": {"ms_per_step": "fast"}}, "holds no rows"),
        ({"machine": {"processor": "A 1"}}, "does not describe the machine"),
        ({"machine": "mine"}, "does not describe the machine"),
    ],
)
def test_what_is_no_benchmark_is_refused(
    write_model: Write, gathered: Read, bench_file: Write, changes: dict[str, Any], cause: str
) -> None:
    with pytest.raises(CheckpointError, match=rf"bench\.json {cause}"):
        gathered(write_model(), bench=bench_file(**changes))


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("model/tfmq_report.json", "{}"),
        ("model/tfmq_report.json", None),
        ("model/tfmq_report.json", '{"scheme": 1, "bytes": {}, "units": 3}'),
        ("model.evaluation/evaluation.json", None),
        ("model.evaluation/evaluation.json", '{"protocol": {}, "rows": [], "paired": null, "baseline": []}'),
        ("model.evaluation/evaluation.json", '{"protocol": 1, "rows": [{}], "paired": 3, "baseline": 2}'),
        ("model.analysis/analysis.json", "no json"),
    ],
)
def test_damaged_files_are_named(write_model: Write, gathered: Read, file: str, content: str | None) -> None:
    folder = write_model()
    path = folder.parent / file
    if content is None:
        path.unlink()
    else:
        path.write_text(content)
    with pytest.raises(CheckpointError, match=path.parent.name):
        gathered(folder)


def test_the_card_has_the_numbers_and_the_hubs_metadata(
    write_model: Write, gathered: Read, tmp_path: Path
) -> None:
    found = gathered(write_model(), base_model="google/ddpm-cifar10-32")
    write_card(tmp_path / "card.md", found)
    _, metadata, text = (tmp_path / "card.md").read_text().split("---\n", 2)
    values: dict[str, Any] = yaml.safe_load(metadata)
    assert (
        values["base_model"] == "google/ddpm-cifar10-32"
        and values["base_model_relation"] == "quantized"
        and "tfmq" in values["tags"]
    )
    for expected in (
        "| metric | full precision | quantized |",
        "| fid against real | 3.25 | 3.5 |",
        "| fid against full precision |  | 0.75 |",
        "| psnr, 2 pairs | 30 dB mean, 20 to 40 dB |",
        "from google/ddpm-cifar10-32, scheme w4a8",
    ):
        assert expected in text
    for name, value in found.facts:
        assert f"| {name} | {value} |" in text
    assert "base_model" not in render_card(gathered(tmp_path / "model"))


def test_no_name_leaves_its_cell(write_model: Write, gathered: Read) -> None:
    card = render_card(gathered(write_model(scheme="a|b\n<script>")))
    assert "| scheme | a\\|b &lt;script> |" in card


@pytest.mark.parametrize("name", ['x"\nlicense: mit', "a b", "", "x/y/z"])
def test_a_base_model_is_a_hub_id(write_model: Write, name: str) -> None:
    with pytest.raises(ValueError, match="hub id"):
        gather(write_model(), base_model=name)
