import pytest

from tfmq.storage import CheckpointError, errors

CONCRETE = [getattr(errors, name) for name in errors.__all__ if name != "CheckpointError"]


def test_the_set_is_closed() -> None:
    assert sorted(CheckpointError.__subclasses__(), key=repr) == sorted(CONCRETE, key=repr)
    assert issubclass(CheckpointError, ValueError)


@pytest.mark.parametrize("error", CONCRETE)
def test_each_error_states_when_it_is_raised(error: type[CheckpointError]) -> None:
    assert error.__bases__ == (CheckpointError,)
    assert (error.__doc__ or "").startswith("Raised when ")
