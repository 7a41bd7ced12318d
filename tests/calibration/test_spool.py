import errno
import io
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tfmq.calibration.spool import Spool
from tfmq.storage.errors import StorageFullError

FORMS = {
    "vectors": lambda n: torch.randn(n),
    "plain": lambda n: torch.randn(n, 3, 4),
    "transposed": lambda n: torch.randn(n, 4, 3).transpose(1, 2),
    "channels_last": lambda n: torch.randn(n, 3, 4, 5).to(memory_format=torch.channels_last),
    "half": lambda n: torch.randn(n, 2).bfloat16(),
    "codes": lambda n: torch.randint(0, 255, (n, 2), dtype=torch.uint8),
}


@pytest.mark.parametrize("form", FORMS)
@given(sizes=st.lists(st.integers(2, 4), min_size=1, max_size=3), seed=st.integers(0, 99))
def test_rows_are_those_of_the_joined_batches_to_the_stride(form: str, sizes: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    batches = [FORMS[form](n) for n in sizes]
    joined = torch.cat(batches)
    for most in (None, 0):
        column = Spool(None, most).column(batches[0])
        for batch in batches:
            column.add(batch)
        assert column.shape == tuple(joined.shape)
        for index in (
            torch.arange(sum(sizes)),
            torch.randint(sum(sizes), (7,)),
            torch.tensor([1]),
            torch.tensor([], dtype=torch.int64),
        ):
            assert torch.equal(column[index], joined[index]) and column[index].dtype == joined.dtype
            assert column[index].stride() == joined[index].stride()
        for number, batch in enumerate(batches):
            assert torch.equal(column.batch(number), batch)


def test_what_is_read_is_no_part_of_what_is_held() -> None:
    column = Spool().column(torch.zeros(2, 3))
    column.add(torch.zeros(2, 3))
    column[torch.tensor([0, 1])].add_(1)
    assert column[torch.tensor([0, 1])].sum() == 0


def test_what_nobody_reads_any_more_is_not_held() -> None:
    spool = Spool()
    column = spool.column(torch.zeros(2, 3))
    column.add(part := torch.zeros(2, 3))
    gone = weakref.ref(part)
    del column, part
    assert gone() is None


def test_memory_is_used_first_and_then_left(tmp_path: Path) -> None:
    spool = Spool(tmp_path, 1000)
    one, other = spool.column(torch.zeros(1, 100)), spool.column(torch.zeros(1, 100))
    one.add(torch.zeros(1, 100))
    other.add(torch.ones(1, 100))
    assert one._parts and other._parts
    other.add(torch.ones(1, 100))
    assert not one._parts and not other._parts, "all go to files once they do not fit together"
    one.add(torch.full((1, 100), 2.0))
    assert one[torch.tensor([1, 0])][:, 0].tolist() == [2.0, 0.0]
    assert list(tmp_path.iterdir()) == [], "the files have no names to be left behind"


def test_a_system_that_moves_a_few_bytes_at_a_time_moves_all(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(io.BytesIO):
        def write(self, octets: Any) -> int:
            return super().write(octets[:5])

        def readinto(self, octets: Any) -> int:
            return super().readinto(octets[:3])

    monkeypatch.setattr(Spool, "file", lambda self: Slow())
    column = Spool(None, 0).column(torch.zeros(3, 4))
    values = torch.randn(3, 4)
    column.add(values)
    assert torch.equal(column[torch.tensor([2, 0, 1])], values[[2, 0, 1]])
    column._file.truncate(20)
    with pytest.raises(OSError, match="12 bytes too early"):
        column[torch.tensor([1])]


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def seek(self, *_: Any) -> None: ...

        def close(self) -> None: ...

        def write(self, _: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Spool, "file", lambda self: Full())
    column = Spool(tmp_path, 0).column(torch.zeros(2, 3))
    with pytest.raises(StorageFullError, match=rf"{tmp_path}.*24 bytes"):
        column.add(torch.zeros(2, 3))
