import copy
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tfmq.quantizers.steps import StepContext


def index_at(steps: StepContext, *timesteps: float) -> list[int]:
    return steps.lookup(torch.tensor(timesteps))[0].tolist()


def test_bins_meet_at_the_midpoints() -> None:
    steps = StepContext(torch.tensor([10.0, 20.0, 40.0]))
    below, above = 1e-3, 1e-3
    assert index_at(steps, -5, 0, 10, 15 - below) == [0, 0, 0, 0]
    assert index_at(steps, 15 + above, 20, 30 - below) == [1, 1, 1]
    assert index_at(steps, 30 + above, 40, 999) == [2, 2, 2]


@given(
    st.sets(st.integers(0, 999), min_size=1, max_size=30),
    st.lists(st.integers(-10, 1100), min_size=1, max_size=20),
)
def test_the_bin_of_a_timestep_is_a_nearest_calibrated_one(calibrated: set[int], wanted: list[int]) -> None:
    steps = StepContext(torch.tensor(sorted(calibrated, reverse=True)))
    index, exact = steps.lookup(torch.tensor(wanted))
    distances = (steps.timesteps[None] - torch.tensor(wanted)[:, None]).abs()
    assert torch.equal(distances.gather(1, index[:, None])[:, 0], distances.amin(dim=1))
    assert exact.tolist() == [timestep in calibrated for timestep in wanted]


def test_timesteps_are_stored_ascending_and_with_the_state() -> None:
    steps = StepContext(torch.tensor([7, 1, 4]))
    assert steps.state_dict()["timesteps"].tolist() == [1.0, 4.0, 7.0]
    other = StepContext(torch.zeros(3))
    other.load_state_dict(steps.state_dict())
    assert index_at(other, 4.1) == [1]


def test_exactness_is_per_sample_and_forgives_half_precision() -> None:
    steps = StepContext(torch.tensor([1.0, 5.0]))
    with pytest.warns(UserWarning), steps.at(torch.tensor([1.0, 3.5, 5.0005])):
        assert steps.exact.tolist() == [True, False, True]
        assert not steps.all_exact
    with steps.at(torch.tensor([5, 1])):
        assert steps.all_exact


def test_a_schedule_of_one_step_serves_every_timestep() -> None:
    steps = StepContext(torch.tensor([500]))
    assert index_at(steps, 0, 500, 999) == [0, 0, 0]
    assert steps.lookup(torch.tensor([0, 500]))[1].tolist() == [False, True]


def test_an_empty_table_says_so() -> None:
    with pytest.raises(RuntimeError, match="not calibrated"):
        StepContext(torch.zeros(0)).lookup(torch.tensor([1]))


def test_reading_outside_of_a_call_is_an_error() -> None:
    steps = StepContext(torch.tensor([1.0]))
    for read in (lambda: steps.index, lambda: steps.exact):
        with pytest.raises(RuntimeError, match="outside of its denoiser"):
            read()
    with steps.at(torch.tensor(1.0)):
        assert steps.index.tolist() == [0]
    with pytest.raises(RuntimeError, match="outside of its denoiser"):
        _ = steps.index


def test_the_first_uncalibrated_timestep_is_named_in_the_only_warning() -> None:
    steps = StepContext(torch.tensor([1.0, 5.0, 9.0]))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for timestep in (
            torch.tensor([1.0]),
            torch.tensor([5.0, 6.5]),
            torch.tensor([3.0]),
            torch.tensor(2.0),
        ):
            with steps.at(timestep):
                pass
    assert [str(warning.message).partition(";")[0] for warning in caught] == [
        "timestep 6.5 was not calibrated"
    ]
    assert "3 calibrated steps" in str(caught[0].message)


def inside(steps: StepContext, timestep: Tensor) -> tuple[list[int], list[bool], bool]:
    with steps.at(timestep):
        return steps.index.tolist(), steps.exact.tolist(), steps.all_exact


def test_contexts_nest() -> None:
    steps = StepContext(torch.tensor([1.0, 5.0]))
    with steps.at(torch.tensor([1.0, 5.0])):
        assert inside(steps, torch.tensor([5.0])) == ([1], [True], True)
        assert (steps.index.tolist(), steps.exact.tolist(), steps.all_exact) == ([0, 1], [True, True], True)


def test_an_exception_restores_the_outer_step() -> None:
    steps = StepContext(torch.tensor([1.0, 5.0]))
    with steps.at(torch.tensor([1.0])):
        with pytest.raises(KeyError), steps.at(torch.tensor([5.0])):
            raise KeyError
        assert steps.index.tolist() == [0]


def test_a_warning_turned_into_an_error_leaves_no_step_behind() -> None:
    steps = StepContext(torch.tensor([1.0, 5.0]))
    with pytest.raises(UserWarning), steps.at(torch.tensor([3.5])):
        pass
    with pytest.raises(RuntimeError, match="outside of its denoiser"):
        _ = steps.index


def test_a_copy_has_a_step_of_its_own() -> None:
    steps = StepContext(torch.tensor([1.0, 5.0]))
    with steps.at(torch.tensor([5.0])):
        other = copy.deepcopy(steps)
        with other.at(torch.tensor([1.0])):
            assert (steps.index.tolist(), other.index.tolist()) == ([1], [0])


def test_bins_follow_timesteps_that_are_loaded_or_replaced() -> None:
    steps = StepContext(torch.tensor([10.0, 20.0, 40.0]))
    assert index_at(steps, 12, 40) == [0, 2]
    steps.load_state_dict({"timesteps": torch.tensor([0.0, 11.0, 13.0])})
    assert index_at(steps, 12.5, 1) == [2, 0]
    steps.replace(torch.tensor([1.0, 2.0, 12.4, 12.6]))
    assert index_at(steps, 12.45, 12.55) == [2, 3]
    steps.register_buffer("timesteps", torch.tensor([1.0, 12.45]))
    assert steps.lookup(torch.tensor([12.45]))[1].tolist() == [True]
