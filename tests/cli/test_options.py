"""Options that several verbs share."""

import pytest

from tfmq.cli.options import check_cluster, with_addresses


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], []),
        (["sample", "DIR"], ["sample", "DIR"]),
        (["sample", "--cluster"], ["sample", "--cluster", "local"]),
        (["sample", "--cluster", "DIR"], ["sample", "--cluster", "local", "DIR"]),
        (["--cluster", "--json"], ["--cluster", "local", "--json"]),
        (["--cluster", "10.0.0.5:6379", "DIR"], ["--cluster", "10.0.0.5:6379", "DIR"]),
        (["--cluster", "head-node:6379"], ["--cluster", "head-node:6379"]),
        (["--cluster", "auto"], ["--cluster", "auto"]),
        (["--cluster=x:1", "DIR"], ["--cluster=x:1", "DIR"]),
    ],
)
def test_a_cluster_without_an_address_is_local(given: list[str], expected: list[str]) -> None:
    assert with_addresses(given) == expected


def test_where_work_is_done() -> None:
    assert check_cluster(None, None, 1, device="cuda") is None
    here = check_cluster("local", 3, 2, device=None)
    assert here is not None and (here.address, here.workers, here.threads, here.gpus) == (None, 3, 2, 0)
    there = check_cluster("head:6379", None, 1, device="cuda:1")
    assert there is not None and (there.address, there.gpus) == ("head:6379", 1)
    with pytest.warns(UserWarning, match="no effect without --cluster"):
        assert check_cluster(None, 2, 1, device=None) is None
