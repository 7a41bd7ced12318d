"""Files that lie: a tiny checkpoint and a tiny pipeline, mutated in every way that a stranger or a bad disk
may think of, all seeded.

Whatever is done to them, loading ends in one of the documented errors, in no other and in no time; or the
model loads and computes.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

import tfmq
from tfmq.recipes.recipe import Calibration
from tfmq.storage import (
    MANIFEST_FILE,
    TENSORS_FILE,
    CheckpointError,
    ChecksumError,
    ForeignFileError,
    MissingFileError,
    TensorMismatchError,
    TruncatedFileError,
    VersionError,
    read_tensors,
    seal,
    tensor_digest,
    write_tensors,
)
from tfmq.storage.digest import module_digest
from tfmq.storage.listing import LISTING_FILE

pytest.importorskip("diffusers")

Mutation = Callable[[Path, Random], None]
WEIGHTS = "diffusion_pytorch_model.safetensors"
# What no field of a manifest can be, and what some can.
VALUES: list[Any] = [
    None,
    True,
    -1,
    0,
    1,
    3,
    10**12,
    10**400,
    0.5,
    1e300,
    float("nan"),
    float("inf"),
    "",
    "x",
    "x" * 5000,
    "\ud800",
    "\0",
    "..",
    [],
    [[]],
    [0],
    [10**9],
    [-1],
    ["x"],
    [None],
    {},
    {"x": 1},
    {"": {}},
]


@dataclass(frozen=True)
class Kind:
    """A way to lie: what is done, how often, and the errors that are right for it; `loads` where some of it
    does no harm.
    """

    mutate: Mutation
    cases: int
    errors: tuple[type[Exception], ...]
    loads: bool = False


def spoiled(path: Path, change: Callable[[bytearray], object]) -> None:
    content = bytearray(path.read_bytes())
    change(content)
    path.write_bytes(content)


def flip(content: bytearray, position: int) -> None:
    content[position // 8] ^= 1 << position % 8


def header_end(content: bytes) -> int:
    return 8 + int.from_bytes(content[:8], "little")


def edited(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a JSON file as Python's writer spells it, NaN and half surrogate pairs included."""
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def places(value: Any) -> list[tuple[Any, Any]]:
    """Return every place in a JSON value, as a container and a key or index."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [place for key in keys for place in ((value, key), *places(value[key]))]


def lie(value: dict[str, Any], chance: Random) -> None:
    """Put something else, or nothing, at one place; now and then what stands there already becomes a key."""
    container, key = chance.choice(places(value))
    if chance.random() < 0.2:
        del container[key]
        return
    before = container[key]
    container[key] = chance.choice([other for other in VALUES if repr(other) != repr(before)])


def checkpoint_of(directory: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return read_tensors(directory / TENSORS_FILE)[0], json.loads((directory / MANIFEST_FILE).read_text())


def resealed(directory: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], object]) -> None:
    """Change a bare checkpoint as one who knows the format does: with a digest and a seal that are right."""
    tensors, manifest = checkpoint_of(directory)
    change(tensors, manifest)
    kept = {name: manifest[name] for name in ("format", "version") if name in manifest}
    with suppress(
        ValueError, TypeError, AttributeError
    ):  # what is no JSON, or no structure, cannot be sealed
        manifest = {**seal(tensors, manifest, table="tensors" in manifest), **kept}
    write_tensors(directory / TENSORS_FILE, tensors)
    (directory / MANIFEST_FILE).write_text(json.dumps(manifest))


def a_bit_of_the_data(directory: Path, chance: Random) -> None:
    spoiled(
        directory / TENSORS_FILE,
        lambda content: flip(content, chance.randrange(8 * header_end(content), 8 * len(content))),
    )


def a_bit_of_the_header(directory: Path, chance: Random) -> None:
    spoiled(
        directory / TENSORS_FILE, lambda content: flip(content, chance.randrange(8 * header_end(content)))
    )


def an_entry_of_the_header(directory: Path, chance: Random) -> None:
    path = directory / TENSORS_FILE
    content = path.read_bytes()
    end = header_end(content)
    header = json.loads(content[8:end])
    container, key = chance.choice(places(header))
    container[key] = chance.choice([value for value in VALUES if repr(value) != repr(container[key])])
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])


def a_shorter_file(directory: Path, chance: Random) -> None:
    spoiled(
        directory / TENSORS_FILE,
        lambda content: content.__delitem__(slice(chance.randrange(len(content)), None)),
    )


def a_longer_file(directory: Path, chance: Random) -> None:
    spoiled(
        directory / TENSORS_FILE, lambda content: content.extend(chance.randbytes(chance.randrange(1, 99)))
    )


def a_shorter_manifest(directory: Path, chance: Random) -> None:
    spoiled(
        directory / MANIFEST_FILE,
        lambda content: content.__delitem__(slice(chance.randrange(len(content) - 2), None)),
    )


def a_bit_of_the_manifest(directory: Path, chance: Random) -> None:
    text = (directory / MANIFEST_FILE).read_bytes()
    letters = [place for place, letter in enumerate(text) if not chr(letter).isspace()]
    spoiled(
        directory / MANIFEST_FILE,
        lambda content: flip(content, 8 * chance.choice(letters) + chance.randrange(8)),
    )


def a_field(directory: Path, chance: Random) -> None:
    edited(directory / MANIFEST_FILE, lambda manifest: lie(manifest, chance))


def a_field_resealed(directory: Path, chance: Random) -> None:
    resealed(directory, lambda _, manifest: lie(manifest, chance))


def a_part_resealed(directory: Path, chance: Random) -> None:
    resealed(directory, lambda _, manifest: lie(manifest["structure"], chance))


def a_depth(directory: Path, chance: Random) -> None:
    opened, closed = chance.choice([("[", "]"), ('{"x":', "}")])
    count = chance.choice([100, 3000, 200_000])
    value = opened * count + "1" + closed * count
    text = chance.choice([value, '{"format": "tfmq", "version": 2, "structure": ' + value + "}"])
    (directory / MANIFEST_FILE).write_text(text)


def a_scale(directory: Path, chance: Random) -> None:
    def change(tensors: dict[str, Tensor], _: Any) -> None:
        scale = tensors[chance.choice([name for name in tensors if name.endswith(".scale")])].view(-1)
        scale[chance.randrange(len(scale))] = chance.choice(
            [0.0, -0.0, -1.0, torch.inf, -torch.inf, torch.nan]
        )

    resealed(directory, change)


def a_timestep(directory: Path, chance: Random) -> None:
    def change(tensors: dict[str, Tensor], _: Any) -> None:
        steps = tensors["tfmq_steps.timesteps"]
        steps.copy_(
            chance.choice(
                [
                    steps.flip(0),
                    steps[:1].expand(len(steps)),
                    steps * torch.nan,
                    steps * torch.inf,
                    steps.roll(1),
                ]
            ).clone()
        )

    resealed(directory, change)


def a_zero_point(directory: Path, chance: Random) -> None:
    def change(tensors: dict[str, Tensor], manifest: dict[str, Any]) -> None:
        groups = [
            group
            for group in manifest["structure"]["layers"]
            if group["bits"] == 4 and not group["symmetric"]
        ]
        name = chance.choice(chance.choice(groups)["names"])
        grid = tensors.get(f"{name}.zero_point", tensors.get(f"{name}.block.zero_point"))
        assert grid is not None
        grid.view(-1)[chance.randrange(grid.numel())] = chance.randrange(16, 256)

    resealed(directory, change)


def a_tensor(directory: Path, chance: Random) -> None:
    """One tensor is gone, of another shape or of another kind."""

    def change(tensors: dict[str, Tensor], _: Any) -> None:
        name = chance.choice(sorted(tensors))
        tensor = tensors.pop(name)
        other = chance.choice(
            [None, tensor[..., :-1], tensor[None], tensor.to(torch.int32), tensor[:0], torch.zeros(7, 7)]
        )
        if other is not None:
            tensors[name] = other.contiguous()

    resealed(directory, change)


def a_size(directory: Path, chance: Random) -> None:
    """A size that would take gigabytes, were it believed."""
    sizes = [1_000_000_000, 2**24, 2**23, 10**18]

    def change(_: Any, manifest: dict[str, Any]) -> None:
        structure, size = manifest["structure"], chance.choice(sizes)
        group = chance.choice(structure["layers"])
        widths = chance.choice([[size], [1, size], [1] * 100_000])
        where = chance.randrange(3)
        if where == 0:
            structure["steps"] = size
        else:
            group["segments"] = widths
            if where == 2 and group["input"]:
                group["input"]["segments"] = widths

    resealed(directory, change)


def a_stranger_below(directory: Path, chance: Random) -> None:
    """Tensors of another model under this manifest, or its manifest above these tensors; then sealed as if
    they belonged together.
    """
    tensors, manifest = checkpoint_of(directory)
    other = {
        name: torch.rand_like(tensor) if tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }
    if chance.random() < 0.5:
        write_tensors(directory / TENSORS_FILE, other)
    else:
        (directory / MANIFEST_FILE).write_text(json.dumps(seal(other, manifest)))


def a_name_in_the_list(directory: Path, chance: Random) -> None:
    outside = directory.parent / "outside"
    outside.write_text("secret")
    (directory / "link").symlink_to(outside)
    (directory / "up").symlink_to("..")
    (directory / "device").symlink_to("/dev/zero")
    (directory / "round").symlink_to("round")
    os.mkfifo(directory / "pipe")
    names = [
        str(outside),
        "/dev/zero",
        "/etc/hostname",
        "../outside",
        "scheduler/../../outside",
        "..",
        ".",
        "",
        "/",
        "scheduler/",
        "./model_index.json",
        "scheduler//scheduler_config.json",
        "link",
        "up/outside",
        "device",
        "pipe",
        "scheduler",
        "x" * 5000,
        "x" * 300,
        "y/" * 400 + "y",
        "model_index.json\0",
        "\ud800",
    ]
    edited(
        directory / LISTING_FILE, lambda listing: listing["files"].update({chance.choice(names): "0" * 64})
    )


def a_value_in_the_list(directory: Path, chance: Random) -> None:
    """Everything but a name: digests, the two tables themselves."""

    def change(listing: dict[str, Any]) -> None:
        container, key = chance.choice(places(listing))
        container[key] = chance.choice([value for value in VALUES if value != container[key]])

    edited(directory / LISTING_FILE, change)


def a_listed_file(directory: Path, chance: Random) -> None:
    name = chance.choice(sorted(json.loads((directory / LISTING_FILE).read_text())["files"]))
    spoiled(directory / name, lambda content: flip(content, chance.randrange(8 * len(content))))


def something_gone(directory: Path, chance: Random) -> None:
    """The list, a file in it, the component's folder, or one of the two files in that."""
    gone = chance.choice(
        [LISTING_FILE, "model_index.json", "scheduler", "unet", f"unet/{WEIGHTS}", "unet/config.json"]
    )
    shutil.rmtree(directory / gone) if (directory / gone).is_dir() else (directory / gone).unlink()


def a_component_resealed(directory: Path, chance: Random) -> None:
    """A component that is whole, and not the one that this pipeline was saved with."""

    def change(config: dict[str, Any]) -> None:
        manifest = config["quantization_config"]
        provenance = {**manifest["provenance"], "seed": chance.randrange(1, 10**6)}
        config["quantization_config"] = seal(
            read_tensors(directory / "unet" / WEIGHTS)[0], {**manifest, "provenance": provenance}, table=False
        )

    edited(directory / "unet" / "config.json", change)


def a_component_edited(directory: Path, chance: Random) -> None:
    def change(config: dict[str, Any]) -> None:
        if chance.random() < 0.3:
            config["quantization_config"] = chance.choice(
                [value for value in VALUES if value not in (None, True)]
            )
        else:
            lie(config["quantization_config"], chance)

    edited(directory / "unet" / "config.json", change)


def a_bit_of_the_component(directory: Path, chance: Random) -> None:
    spoiled(
        directory / "unet" / WEIGHTS,
        lambda content: flip(content, chance.randrange(8 * header_end(content), 8 * len(content))),
    )


FOREIGN, MISMATCH = ForeignFileError, TensorMismatchError
# A misfit of manifest and architecture is a plain `ValueError` that names what does not fit (docs/format.md).
BARE = {
    "a bit of the data": Kind(a_bit_of_the_data, 30, (ChecksumError,)),
    "a bit of the header": Kind(a_bit_of_the_header, 30, (FOREIGN, TruncatedFileError, MISMATCH)),
    "an entry of the header": Kind(an_entry_of_the_header, 40, (FOREIGN, TruncatedFileError, MISMATCH)),
    "a shorter file": Kind(a_shorter_file, 30, (TruncatedFileError,)),
    "a longer file": Kind(a_longer_file, 10, (FOREIGN,)),
    "a shorter manifest": Kind(a_shorter_manifest, 20, (FOREIGN, TruncatedFileError)),
    "a bit of the manifest": Kind(
        a_bit_of_the_manifest, 30, (FOREIGN, VersionError, MISMATCH, ChecksumError)
    ),
    "a field": Kind(a_field, 50, (FOREIGN, VersionError, MISMATCH, ChecksumError)),
    "a field, resealed": Kind(
        a_field_resealed, 60, (FOREIGN, VersionError, MISMATCH, ValueError), loads=True
    ),
    "a part, resealed": Kind(a_part_resealed, 100, (FOREIGN, MISMATCH, ValueError), loads=True),
    "a depth": Kind(a_depth, 6, (FOREIGN,)),
    "a scale, resealed": Kind(a_scale, 15, (MISMATCH,)),
    "a timestep, resealed": Kind(a_timestep, 8, (MISMATCH,)),
    "a zero-point, resealed": Kind(a_zero_point, 8, (MISMATCH,)),
    "a tensor, resealed": Kind(a_tensor, 40, (MISMATCH, ValueError)),
    "a size, resealed": Kind(a_size, 20, (FOREIGN, MISMATCH)),
    "a stranger below": Kind(a_stranger_below, 6, (ChecksumError,)),
}
PIPELINE = {
    "a name in the list": Kind(a_name_in_the_list, 30, (FOREIGN, MissingFileError)),
    "a value in the list": Kind(a_value_in_the_list, 20, (FOREIGN, ChecksumError)),
    "a listed file": Kind(a_listed_file, 10, (ChecksumError,)),
    "something gone": Kind(something_gone, 12, (MissingFileError, FOREIGN)),
    "a component, resealed": Kind(a_component_resealed, 6, (ChecksumError,)),
    "a component, edited": Kind(a_component_edited, 25, (FOREIGN, VersionError, ChecksumError)),
    "a bit of the component": Kind(a_bit_of_the_component, 6, (ChecksumError,)),
}


def recipe() -> tfmq.Recipe:
    return replace(tfmq.scheme("rtn_w4a8"), calibration=Calibration(samples=1, steps=3))


@pytest.fixture(scope="module")
def bare(sampler: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint of a plain module, with a split layer, products and tables."""
    directory = tmp_path_factory.mktemp("bare") / "model"
    tfmq.quantize(sampler("plain"), recipe(), output_dir=directory)
    return directory


def save_pipeline(directory: Path, *, seed: int = 0) -> None:
    """Quantize a pipeline with no more layers than a UNet has to have, since it is loaded so often."""
    from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DModel(
            sample_size=8,
            block_out_channels=(8,),
            layers_per_block=1,
            norm_num_groups=4,
            attention_head_dim=8,
            down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",),
        )
    tfmq.quantize(DDIMPipeline(unet.eval(), DDIMScheduler()), recipe(), output_dir=directory)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pipeline") / "model"
    save_pipeline(directory)
    return directory


def run_cases(name: str, kind: Kind, whole: Path, folder: Path, use: Callable[[Path], object]) -> None:
    """Do all cases of a kind to copies of `whole`; each must end as the table says."""
    wrong = []
    for case in range(kind.cases):
        directory = folder / f"{case}" / "model"
        shutil.copytree(whole, directory)
        kind.mutate(directory, Random(f"{name} {case}"))
        try:
            use(directory)
        except Exception as error:  # what may be raised is the question
            if type(error) not in kind.errors or len(str(error)) > 2000:
                wrong.append(f"case {case}: {type(error).__name__}: {str(error)[:300]}")
        else:
            if not kind.loads:
                wrong.append(f"case {case}: loaded")
        shutil.rmtree(directory.parent)
    assert wrong == []


@pytest.mark.filterwarnings("ignore:timestep .* was not calibrated")
@pytest.mark.parametrize("name", BARE)
def test_a_checkpoint_that_lies_is_refused(
    build: Callable[..., Any], bare: Path, tmp_path: Path, name: str
) -> None:
    def use(directory: Path) -> None:
        denoiser, inputs = build("plain")
        module = tfmq.load(directory, module=denoiser.module, backend="simulated")
        # What loads must compute: nothing is left to fall over at the first call.
        assert module(inputs.sample, inputs.timestep.float()).shape == inputs.sample.shape

    run_cases(name, BARE[name], bare, tmp_path, use)


@pytest.mark.parametrize("name", PIPELINE)
def test_a_pipeline_that_lies_is_refused(pipeline: Path, tmp_path: Path, name: str) -> None:
    run_cases(
        name, PIPELINE[name], pipeline, tmp_path, lambda directory: tfmq.load(directory, backend="simulated")
    )


def test_there_are_enough_cases() -> None:
    assert sum(kind.cases for kind in (*BARE.values(), *PIPELINE.values())) >= 500


def test_what_was_not_touched_loads(build: Callable[..., Any], bare: Path, pipeline: Path) -> None:
    tfmq.load(bare, module=build("plain")[0].module, backend="simulated")
    tfmq.load(pipeline, backend="simulated")


@pytest.mark.parametrize("widths", [[1_000_000_000], [2**23], [1] * 100_000])
def test_sizes_are_compared_with_the_tensors_before_anything_is_built(
    bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, widths: list[int]
) -> None:
    shutil.copytree(bare, tmp_path / "q")

    def change(_: Any, manifest: dict[str, Any]) -> None:
        for group in manifest["structure"]["layers"]:
            group["segments"] = widths
            if group["input"]:
                group["input"]["segments"] = widths

    resealed(tmp_path / "q", change)
    monkeypatch.setattr("tfmq.artifact.assemble", lambda *_: pytest.fail("built something"))
    with pytest.raises(CheckpointError):
        tfmq.load(tmp_path / "q", module=torch.nn.Identity())


def test_an_unknown_timestep_argument_is_refused_by_its_name(
    build: Callable[..., Any], bare: Path, tmp_path: Path
) -> None:
    shutil.copytree(bare, tmp_path / "q")
    resealed(tmp_path / "q", lambda _, manifest: manifest["structure"].update(timestep="sigma"))
    with pytest.raises(ValueError, match="PlainDenoiser has no argument 'sigma' for the timestep"):
        tfmq.load(tmp_path / "q", module=build("plain")[0].module)


@pytest.mark.parametrize("networks", [[], ["decoder"], [3], "decoder"])
def test_networks_are_names_and_stand_for_no_timestep(bare: Path, tmp_path: Path, networks: Any) -> None:
    shutil.copytree(bare, tmp_path / "q")
    resealed(tmp_path / "q", lambda _, manifest: manifest["structure"].update(networks=networks))
    with pytest.raises(ForeignFileError, match=r"structure\.networks"):
        tfmq.load(tmp_path / "q", module=torch.nn.Identity())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"axis": -1}, "splits axis -1 of the input, the channels of the architecture are on axis 1"),
        ({"dynamic": "token"}, "has a dynamic input, which linear layers alone have"),
    ],
)
def test_an_input_that_the_layer_cannot_have_is_refused(
    build: Callable[..., Any], bare: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    shutil.copytree(bare, tmp_path / "q")

    def edit(_: Any, manifest: dict[str, Any]) -> None:
        split = [group for group in manifest["structure"]["layers"] if group["segments"]]
        assert split, "the model has a layer that reads a concatenation"
        for group in split:
            group["input"].update(change)

    resealed(tmp_path / "q", edit)
    with pytest.raises(ValueError, match=message):
        tfmq.load(tmp_path / "q", module=build("plain")[0].module)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": [-7, 0, 7]}, r"values is \[-7, 0, 7\]; it must be a list of 9 to 16 integers"),
        ({"values": [*range(-7, 7), 6]}, "ascending, 0 among them"),
        ({"values": [*range(-7, 7), 7.0]}, "ascending, 0 among them"),
        ({"values": [*range(-7, 7), 128]}, "integers of -128 to 127"),
        ({"values": [*range(1, 16)]}, "0 among them"),
        ({"bits": 1, "values": [0, 1]}, "2 to 2 integers of -128 to 127, ascending, one on either side of 0"),
        ({"bits": 0, "values": [-1, 1]}, "bits is 0; it must be an integer of 1 to 8"),
        ({"values": {}}, "it must be a list"),
        ({"grid": 4, "values": [*range(-7, 8)]}, "grid is 4; it must be a text"),
        ({"grid": "", "values": [*range(-7, 8)]}, "grid is ''; it must be a text"),
        ({"symmetric": False, "values": [*range(-7, 8)]}, "symmetric is False; it must be true"),
        ({"values": [*range(-7, 8)]}, r"has the code 15, beyond a table of 15 values"),
    ],
)
def test_a_table_that_lies_is_refused_before_anything_is_built(
    bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], message: str
) -> None:
    shutil.copytree(bare, tmp_path / "q")

    def edit(tensors: dict[str, torch.Tensor], manifest: dict[str, Any]) -> None:
        groups = [group for group in manifest["structure"]["layers"] if group["bits"] == 4]
        assert groups, "the model has a layer of 4 bits"
        for group in groups:
            group.update({"grid": "odd", "symmetric": True, **change})
        manifest["version"] = 3

    resealed(tmp_path / "q", edit)
    monkeypatch.setattr("tfmq.artifact.assemble", lambda *_: pytest.fail("built something"))
    with pytest.raises(CheckpointError, match=message):
        tfmq.load(tmp_path / "q", module=torch.nn.Identity())


@pytest.fixture(scope="module")
def grouped(sampler: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint of a plain module with groups of eight inputs in its linear layers."""
    directory, made = tmp_path_factory.mktemp("grouped") / "model", recipe()
    weights = replace(made.weights, group=8)
    tfmq.quantize(sampler("plain"), replace(made, weights=weights), output_dir=directory)
    return directory


def test_a_checkpoint_with_groups_opens_and_is_one_of_version_3(
    build: Callable[..., Any], grouped: Path
) -> None:
    tensors, manifest = checkpoint_of(grouped)
    assert manifest["version"] == 3
    module = tfmq.load(grouped, module=build("plain")[0].module, backend="simulated")
    assert tensor_digest(module.state_dict()) == tensor_digest(tensors)


Tensors = dict[str, Tensor]


@pytest.mark.parametrize(
    ("spoil", "change", "message"),
    [
        (None, {"group": 0}, "group is 0; it must be an integer of 8 to"),
        (None, {"group": True}, "group is True; it must be an integer of 8 to"),
        (None, {"group": 4096}, "has more groups than"),
        (None, {"group": 16, "segments": [8, 8]}, "group is 16; it must be a number that divides every"),
        (None, {"group": 8, "kind": "embedding"}, "group is 8; it must be absent: an embedding"),
        (lambda tensors, name: tensors.pop(name), {}, "needs the tensor .*multiplier, which is missing"),
        (lambda tensors, name: tensors[name].zero_(), {}, "multiplier: it has a multiple of 0, or one that"),
        (lambda tensors, name: tensors[name].fill_(17), {}, "leaves eight signed bits"),
        (
            lambda tensors, name: tensors.update({name: tensors[name].short()}),
            {},
            r"is torch.int16 .*, not uint8",
        ),
        (
            lambda tensors, name: tensors.update({name: tensors[name][:, :1].contiguous()}),
            {},
            r"zero_point: it is torch.uint8 .*, not uint8",
        ),
    ],
)
def test_groups_that_lie_are_refused_before_anything_is_built(
    grouped: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[[Tensors, str], Any] | None,
    change: dict[str, Any],
    message: str,
) -> None:
    shutil.copytree(grouped, tmp_path / "q")

    def edit(tensors: Tensors, manifest: dict[str, Any]) -> None:
        groups = [group for group in manifest["structure"]["layers"] if "group" in group]
        assert groups, "the model has a layer with groups"
        groups[0].update(change)
        if "segments" in change and groups[0]["input"]:
            groups[0]["input"]["segments"] = change["segments"]
        if spoil is not None:
            first = groups[0]["names"][0]
            spoil(tensors, next(n for n in tensors if n.startswith(first) and n.endswith(".multiplier")))

    resealed(tmp_path / "q", edit)
    monkeypatch.setattr("tfmq.artifact.assemble", lambda *_: pytest.fail("built something"))
    with pytest.raises(CheckpointError, match=message):
        tfmq.load(tmp_path / "q", module=torch.nn.Identity())


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (9, "shift: the checkpoint has weights in groups of 9 inputs, the architecture has 16 there"),
        (16, "multiplier"),
    ],
)
def test_groups_that_the_layer_does_not_divide_into_are_refused_by_its_name(
    build: Callable[..., Any], grouped: Path, tmp_path: Path, size: int, message: str
) -> None:
    shutil.copytree(grouped, tmp_path / "q")

    def edit(tensors: Tensors, manifest: dict[str, Any]) -> None:
        layers, name = manifest["structure"]["layers"], "stages.0.shift"
        group = next(group for group in layers if name in group["names"])
        assert group["group"] == 8
        group["names"].remove(name)
        layers.append({**group, "names": [name], "group": size})
        manifest["structure"]["layers"] = [entry for entry in layers if entry["names"]]
        for kind in ("multiplier", "zero_point"):
            if size == 9:
                tensors[f"{name}.{kind}"] = tensors[f"{name}.{kind}"][:, :1].contiguous()

    resealed(tmp_path / "q", edit)
    with pytest.raises(ValueError, match=message):
        tfmq.load(tmp_path / "q", module=build("plain")[0].module)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("constant", [0]),
        ("row_bits", True),
        ("reuse", [{"names": ["entry"]}]),
    ],
)
def test_what_the_format_reserves_is_refused_by_its_name(
    bare: Path, tmp_path: Path, name: str, value: object
) -> None:
    shutil.copytree(bare, tmp_path / "q")

    def edit(_: Any, manifest: dict[str, Any]) -> None:
        structure = manifest["structure"]
        (structure if name == "reuse" else structure["layers"][0])[name] = value

    resealed(tmp_path / "q", edit)
    page = (Path(__file__).parents[2] / "docs" / "format.md").read_text(encoding="utf-8")
    assert name in page[page.index("### Reserved") : page.index("## Errors")]
    with pytest.raises(ForeignFileError, match=rf"\b{name} is .*must be absent.*upgrade tfmq"):
        tfmq.load(tmp_path / "q", module=torch.nn.Identity())


def test_a_device_and_a_pipe_are_never_opened(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    digest = tfmq.storage.listing.file_digest
    monkeypatch.setattr(
        "tfmq.storage.listing.file_digest", lambda path: (opened.append(Path(path).name), digest(path))[1]
    )
    for name in ("device", "pipe", "scheduler"):
        directory = tmp_path / name
        shutil.copytree(pipeline, directory)
        (directory / "device").symlink_to("/dev/zero")
        os.mkfifo(directory / "pipe")
        # First in the list, so that nothing else refuses it.
        edited(
            directory / LISTING_FILE,
            lambda listing, name=name: listing.update(files={name: "0" * 64, **listing["files"]}),
        )
        with pytest.raises(ForeignFileError, match=name):
            tfmq.load(directory)
    assert not {"device", "pipe", "scheduler"}.intersection(opened)


@pytest.mark.parametrize("make", [lambda path: path.symlink_to("/dev/zero"), os.mkfifo])
@pytest.mark.parametrize("name", [MANIFEST_FILE, TENSORS_FILE])
def test_a_checkpoint_of_no_regular_files_is_refused(
    bare: Path, tmp_path: Path, make: Callable[[Path], object], name: str
) -> None:
    shutil.copytree(bare, tmp_path / "q")
    (tmp_path / "q" / name).unlink()
    make(tmp_path / "q" / name)
    with pytest.raises(ForeignFileError, match=f"{name} is not a regular file"):
        tfmq.load(tmp_path / "q", module=torch.nn.Identity())


def test_a_component_belongs_to_its_pipeline(pipeline: Path, tmp_path: Path) -> None:
    """The whole denoiser of another artifact draws other images; each file of it is as its own manifest has
    it.
    """
    save_pipeline(tmp_path / "other", seed=1)
    shutil.copytree(pipeline, tmp_path / "q")
    shutil.rmtree(tmp_path / "q" / "unet")
    shutil.copytree(tmp_path / "other" / "unet", tmp_path / "q" / "unet")
    with pytest.raises(ChecksumError, match="unet is of another pipeline than the files beside it"):
        tfmq.load(tmp_path / "q")
    # As long as nobody says that this is meant.
    tfmq.relist(tmp_path / "q")
    tfmq.load(tmp_path / "q", backend="simulated")
    shutil.copytree(tmp_path / "q" / "unet", tmp_path / "q" / "added")
    with pytest.raises(ChecksumError, match="added is no part of the pipeline"):
        tfmq.load(tmp_path / "q")


@pytest.mark.parametrize(
    ("gone", "message"), [(LISTING_FILE, "tfmq_files.json does not exist"), ("unet", "unet is missing")]
)
def test_a_missing_list_or_folder_is_said(pipeline: Path, tmp_path: Path, gone: str, message: str) -> None:
    shutil.copytree(pipeline, tmp_path / "q")
    shutil.rmtree(tmp_path / "q" / gone) if (tmp_path / "q" / gone).is_dir() else (
        tmp_path / "q" / gone
    ).unlink()
    with pytest.raises(MissingFileError, match=message):
        tfmq.load(tmp_path / "q")


def test_pipelines_of_earlier_releases_open(pipeline: Path, tmp_path: Path) -> None:
    """Their lists have files alone, and their reports say nothing of the list."""
    shutil.copytree(pipeline, tmp_path / "q")
    edited(tmp_path / "q" / "tfmq_report.json", lambda report: report.pop("files"))
    files = json.loads((tmp_path / "q" / LISTING_FILE).read_text())["files"]
    (tmp_path / "q" / LISTING_FILE).write_text(json.dumps(files))
    tfmq.load(tmp_path / "q", backend="simulated")
    (tmp_path / "q" / "scheduler" / "scheduler_config.json").write_text("{}")
    with pytest.raises(ChecksumError, match="scheduler_config"):
        tfmq.load(tmp_path / "q")
    (tmp_path / "q" / LISTING_FILE).unlink()
    tfmq.load(tmp_path / "q", backend="simulated")


def test_a_snapshot_of_the_hubs_cache_opens(pipeline: Path, tmp_path: Path) -> None:
    """Its files are links into the store beside it; links to anywhere else are refused there too."""
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    shutil.copytree(pipeline, snapshot)
    blobs.mkdir()
    for number, path in enumerate(path for path in sorted(snapshot.rglob("*")) if path.is_file()):
        path.rename(blobs / str(number))
        path.symlink_to(os.path.relpath(blobs / str(number), path.parent))
    tfmq.load(snapshot, backend="simulated")
    index = snapshot / "model_index.json"
    shutil.copy(index, tmp_path / "elsewhere")
    index.unlink()
    index.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ForeignFileError, match="link out of the directory"):
        tfmq.load(snapshot)


def test_tensors_are_hashed_once(
    pipeline: Path, build: Callable[..., Any], bare: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[Mapping[str, Tensor]] = []
    monkeypatch.setattr(
        "tfmq.storage.checkpoint.tensor_digest",
        lambda tensors: (hashed.append(tensors), tensor_digest(tensors))[1],
    )
    monkeypatch.setattr(
        "tfmq.storage.digest.tensor_digest",
        lambda tensors: (hashed.append(tensors), tensor_digest(tensors))[1],
    )
    for load in (
        lambda: tfmq.load(pipeline, backend="simulated").unet,
        lambda: tfmq.load(bare, module=build("plain")[0].module, backend="simulated"),
    ):
        module = load()
        assert len(hashed) == 1
        expected = tensor_digest(module.state_dict())
        assert module_digest(module) == expected and len(hashed) == 1
        # What was written to since then has another digest.
        parameter = next(module.parameters())
        parameter.data.add_(1)
        with torch.no_grad():
            parameter.add_(1)
        assert module_digest(module) == tensor_digest(module.state_dict()) != expected
        hashed.clear()
