import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tfmq.temporal.selection import select_tables

# Planted regimes: the block is better at the first two steps of `a`, far worse at the last step of `b`.
BLOCK = {"a": torch.tensor([0.1, 0.1, 0.4]), "b": torch.tensor([0.2, 0.2, 0.9])}
TABLE = {"a": torch.tensor([0.3, 0.3, 0.3]), "b": torch.tensor([0.3, 0.1, 0.1])}


def chosen(
    scope: str, block: dict[str, torch.Tensor] = BLOCK, table: dict[str, torch.Tensor] = TABLE
) -> dict[str, list[bool]]:
    return {name: use.tolist() for name, use in select_tables(block, table, scope=scope).items()}  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("scope", "expected"),
    [
        ("key", {"a": [False, False, True], "b": [False, True, True]}),
        ("feature", {"a": [False] * 3, "b": [True] * 3}),
        ("step", {"a": [False, False, True], "b": [False, False, True]}),
        ("global", {"a": [True] * 3, "b": [True] * 3}),
    ],
)
def test_each_scope_chooses_over_what_it_covers(scope: str, expected: dict[str, list[bool]]) -> None:
    assert chosen(scope) == expected


@pytest.mark.parametrize("scope", ["key", "feature", "step", "global"])
def test_ties_go_to_the_table(scope: str) -> None:
    assert chosen(scope, BLOCK, BLOCK) == {"a": [True] * 3, "b": [True] * 3}


def test_squared_errors_are_averaged() -> None:
    # The means are equal, the mean squares are not.
    block, table = {"a": torch.tensor([0.0, 0.4])}, {"a": torch.tensor([0.2, 0.2])}
    assert chosen("feature", block, table) == {"a": [True, True]}
    assert chosen("feature", table, block) == {"a": [False, False]}


def test_a_model_without_cacheable_features_has_nothing_to_choose() -> None:
    assert select_tables({}, {}) == {}


ERRORS = st.lists(st.lists(st.floats(0, 1, width=32), min_size=3, max_size=3), min_size=1, max_size=4)


@given(ERRORS, st.integers(0, 2**31))
def test_what_is_selected_is_never_worse_than_both(errors: list[list[float]], seed: int) -> None:
    block = {str(i): torch.tensor(row) for i, row in enumerate(errors)}
    table = {name: torch.rand(3, generator=torch.Generator().manual_seed(seed)) for name in block}
    picked = select_tables(block, table)
    for name in block:
        assert torch.equal(
            torch.where(picked[name], table[name], block[name]), torch.minimum(block[name], table[name])
        )
    for scope, axes in (("feature", 1), ("step", 0), ("global", (0, 1))):
        use = torch.stack(list(select_tables(block, table, scope=scope).values()))  # type: ignore[arg-type]
        b, t = torch.stack(list(block.values())).square(), torch.stack(list(table.values())).square()
        assert (
            torch.where(use, t, b).mean(dim=axes) <= torch.minimum(b.mean(dim=axes), t.mean(dim=axes)) + 1e-6
        ).all()
