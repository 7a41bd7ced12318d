import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tfmq.calibration.store import CalibrationStore, StoredBatches
from tfmq.models.denoiser import Inputs
from tfmq.storage.atomic import read_tensors

DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool])


def call(timestep: Any, *, rows: int = 2, **conditions: Any) -> Inputs:
    return Inputs(torch.randn(rows, 3), torch.as_tensor(timestep).expand(rows).clone(), conditions)


def equal(one: Any, other: Any) -> bool:
    """Equality of trees, where tensors compare by dtype and bits and values by type."""
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


tensors = st.builds(
    lambda seed, dtype: (torch.randn(2, generator=torch.Generator().manual_seed(seed)) * 3).to(dtype),
    st.integers(0, 99),
    DTYPES,
)
leaves = (
    tensors
    | st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5)
)
trees = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(st.dictionaries(st.text(min_size=1, max_size=5), trees, max_size=3))
def test_nested_conditions_come_back_as_they_were(conditions: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        store = CalibrationStore(Path(directory))
        store.append(
            call(7, **{}) if not conditions else Inputs(torch.randn(2, 3), torch.tensor([7, 7]), conditions)
        )
        assert equal(dict(store.read(0).conditions), conditions)


def test_names_that_spell_the_same_path_are_kept_apart(tmp_path: Path) -> None:
    conditions = {"a.b": torch.zeros(1), "a": {"b": torch.ones(1)}}
    store = CalibrationStore(tmp_path)
    store.append(Inputs(torch.zeros(1, 1), torch.tensor([1]), conditions))
    assert equal(dict(store.read(0).conditions), conditions)


@pytest.mark.parametrize("value", [np.zeros(2), torch.float32, object(), {1, 2}, 1j, {"inner": [b"bytes"]}])
def test_other_types_are_refused_with_the_path_and_the_type(tmp_path: Path, value: Any) -> None:
    store = CalibrationStore(tmp_path)
    inner = value["inner"][0] if isinstance(value, dict) else value
    with pytest.raises(TypeError, match=rf"{type(inner).__name__} cannot be stored \(conditions\.extra"):
        store.append(call(1, extra=value))
    assert len(store) == 0, "nothing half-written is left"


def test_names_that_json_would_change_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"int .*conditions\.extra"):
        CalibrationStore(tmp_path).append(call(1, extra={3: torch.zeros(1)}))


def test_calls_are_read_in_the_order_in_which_they_were_written(tmp_path: Path) -> None:
    calls = [call(timestep, text=torch.randn(2, 4)) for timestep in (9, 3, 3, 7)]
    store = CalibrationStore(tmp_path / "new" / "folder")
    for inputs in calls:
        store.append(inputs)
    again = list(CalibrationStore(store.directory))
    assert len(store) == len(again) == 4
    for one, other in zip(calls, again, strict=True):
        assert torch.equal(one.sample, other.sample) and torch.equal(one.timestep, other.timestep)
        assert equal(dict(one.conditions), dict(other.conditions))
    assert store.timesteps().tolist() == [3.0, 7.0, 9.0] and store.timesteps().dtype == torch.float32
    store.clear()
    assert len(store) == 0 and list(store) == []


def test_what_is_stored_does_not_follow_the_tensors(tmp_path: Path) -> None:
    store, inputs = CalibrationStore(tmp_path), call(1)
    store.append(inputs)
    before = inputs.sample.clone()
    inputs.sample.zero_()
    assert torch.equal(store.read(0).sample, before)


def test_batches_keep_both_guidance_halves_of_every_nth_distinct_timestep(tmp_path: Path) -> None:
    store = CalibrationStore(tmp_path)
    for number, timestep in enumerate([90, 90, 70, 70, 50, 50, 30, 30, 10, 10]):
        store.append(call(timestep, number=number))
    assert [inputs.conditions["number"] for inputs in StoredBatches(store, 1)] == list(range(10))
    assert [int(inputs.timestep[0]) for inputs in StoredBatches(store, 2)] == [90, 90, 50, 50, 10, 10]
    assert [inputs.conditions["number"] for inputs in StoredBatches(store, 99)] == [0, 1, 8, 9], (
        "both ends, whatever the interval"
    )


def of_images(number: int, images: range, timestep: int) -> Inputs:
    """Return a call that says of each row its image, and of the call its number."""
    numbers = torch.tensor([[float(image)] for image in images])
    return Inputs(numbers, torch.full((len(images),), timestep), {"text": numbers + 100, "number": number})


@pytest.mark.parametrize(("batch", "guided"), [(6, False), (4, False), (1, False), (3, True)])
def test_samples_take_turns_from_step_to_step(tmp_path: Path, batch: int, guided: bool) -> None:
    store, steps = CalibrationStore(tmp_path), [90, 80, 70, 60, 50, 40]
    for start in range(0, 12, batch):
        for step in steps:
            for half in range(2 if guided else 1):
                store.append(of_images(half, range(start, start + batch), step))
    seen: dict[int, list[tuple[int, int]]] = {step: [] for step in steps}
    for inputs in StoredBatches(store, 1, turns=3):
        rows = inputs.sample.flatten().tolist()
        assert equal(inputs.conditions["text"], inputs.sample + 100) and len(inputs.timestep) == len(rows)
        seen[int(inputs.timestep[0])] += [(int(row), inputs.conditions["number"]) for row in rows]
    every = 2 * 12 if guided else 12
    assert {len(rows) for rows in seen.values()} == {every // 3}, "as many at each step"
    counts = Counter(row for rows in seen.values() for row in rows)
    assert len(counts) == every and set(counts.values()) == {2}, "each sample as often, in either half"
    assert sum(map(len, StoredBatches(store, 5))) == 2 * every


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64])
def test_timesteps_of_any_dtype_are_found(tmp_path: Path, dtype: torch.dtype) -> None:
    store = CalibrationStore(tmp_path)
    for timestep in (999.9, 333.3, 0.1):
        store.append(call(torch.tensor(timestep, dtype=torch.float64).to(dtype)))
    assert len(list(StoredBatches(store, 1))) == 3


def test_parts_are_taken_over_in_their_order(tmp_path: Path) -> None:
    store = CalibrationStore(tmp_path / "calls")
    store.append(call(9.0))
    for number in (1, 0):
        part = store.part(number)
        part.append(call(float(number)))
        # Whoever was given the part after this one died begins it again.
        part = store.part(number)
        for timestep in (number + 5.0, number + 3.0):
            part.append(call(timestep))
    assert len(store) == 1
    store.adopt(range(2))
    assert [float(inputs.timestep[0]) for inputs in store] == [9, 5, 3, 6, 4]
    assert not list(store.directory.glob("part_*"))
    store.part(0).append(call(1.0))
    store.clear()
    assert not list(store.directory.iterdir())


def test_parts_bring_the_calls_of_other_networks(tmp_path: Path) -> None:
    store = CalibrationStore(tmp_path / "calls")
    for number in range(2):
        part = store.part(number)
        part.append(call(9.0))
        part.of("vae.decoder").append(call(float(number)))
        part.of("vae.decoder").of("held_out").append(call(number + 5.0))
    store.adopt(range(2))
    found = store.of("vae.decoder")
    assert [float(inputs.timestep[0]) for inputs in found] == [0, 1]
    assert [float(inputs.timestep[0]) for inputs in found.of("held_out")] == [5, 6]
    assert len(store) == 2 and not list(store.directory.glob("part_*"))
    store.clear()
    assert not list(store.directory.iterdir())


def test_what_is_left_out_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CalibrationStore(tmp_path)
    for number in range(6):
        store.append(call(float(60 - 10 * number)))
    store.timesteps()
    seen: list[str] = []
    monkeypatch.setattr(
        "tfmq.calibration.store.read_tensors", lambda path: (seen.append(path.name), read_tensors(path))[1]
    )
    assert len(list(StoredBatches(store, 3))) == 3
    assert seen == [f"call_{number:05d}.safetensors" for number in (0, 3, 5)]
