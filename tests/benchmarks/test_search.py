"""The search for a recipe: which moves stay, and that a trial is made once."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tfmq.progress import silent

pytest.importorskip("diffusers")
SCRIPTS = Path(__file__).resolve().parents[2] / "benchmarks"
SCRIPT_NAMES = {
    *("search", "contestants", "leaderboard_page", "methods", "names", "reference", "scoring", "loading"),
}
IMAGES = 8


@pytest.fixture
def search(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import scoring
    import search

    monkeypatch.setattr(scoring, "DRAWING", ("simulated",))
    yield search
    for name in SCRIPT_NAMES - before:
        sys.modules.pop(name, None)


class Known:
    """Trials whose outcome is known: each move adds to the PSNR of every image and to the bytes, some of them
    nothing beside another.
    """

    def __init__(self, search: ModuleType) -> None:
        self.make = search.Trial
        self.asked: list[tuple[tuple[str, ...], int]] = []

    def of(self, moves: Sequence[str], *, seed: int = 0, noise: int = 0) -> Any:
        self.asked.append((tuple(moves), seed))
        gains = {"groups": 1.0, "rotation": 0.5, "floats": -0.3, "branch": 2.0, "peaks": 0.4}
        gain = sum(gains[move] for move in moves)
        if {"groups", "peaks"} <= set(moves):
            gain -= gains["peaks"]
        spread = [30 + number + gain + 0.05 * (-1) ** number * len(moves) for number in range(IMAGES)]
        return self.make(spread, 1500 if "branch" in moves else 1000 + 10 * len(moves), 1.0)


def test_moves_stay_that_gain_on_top_of_the_others_and_cost_little(search: ModuleType) -> None:
    trials = Known(search)
    moves = ["floats", "peaks", "rotation", "groups", "branch"]
    kept, seen = search.found_moves(trials, moves, growth=1.1, deadline=float("inf"))
    assert kept == ["groups", "rotation"]
    # The branch gains most and is too large; floats lose, so that nothing is tried on top of them.
    assert [trial["moves"] for trial in seen[len(moves) :]] == [
        ["groups", "rotation"],
        ["groups", "rotation", "peaks"],
    ]
    assert seen[0]["gain_db"] == pytest.approx(-0.3) and seen[0]["bytes"] == 1.01
    judged = search.held_out(trials, kept)
    assert judged["gain_db"] == pytest.approx(1.5) and judged["images"] == 3 * IMAGES
    assert {seed for _, seed in trials.asked[-6:]} == {1, 2, 3}


def test_no_trial_starts_when_the_time_is_up(search: ModuleType) -> None:
    trials = Known(search)
    assert search.found_moves(trials, ["groups"], growth=1.1, deadline=float("-inf")) == ([], [])
    assert trials.asked == [((), 0)]


def test_a_trial_is_made_once_and_by_its_settings(
    search: ModuleType, tmp_path: Path, mine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import contestants

    running = contestants.Running(steps=2, samples=2)
    model = contestants.Contestant(name="mine", running=running, function=mine)

    def trials(num_images: int = 3) -> Any:
        return search.Trials(
            model, "w4a8", num_images=num_images, directory=tmp_path / "out", progress=silent
        )

    (tmp_path / "out").mkdir()
    plain, grouped = (trials().of(moves) for moves in ((), ("groups", "every-step")))
    assert len(plain.psnr_db) == 3 and plain.psnr_db != trials().of((), seed=1, noise=5).psnr_db
    assert plain.bytes > 0 and grouped.cpu_seconds > 0
    monkeypatch.setattr(contestants.Contestant, "quantize", lambda *_, **__: pytest.fail("made again"))
    assert trials().of(()) == plain
    with pytest.raises(SystemExit, match="other settings"):
        trials(2).of(())
    assert not [path for path in (tmp_path / "out").iterdir() if path.is_dir() and path.name != "references"]


@pytest.mark.parametrize("bits", ["w4a8", "w4a4"])
def test_every_move_changes_a_recipe_that_any_other_may_have_changed(search: ModuleType, bits: str) -> None:
    import tfmq

    base = recipe = tfmq.scheme(bits)
    for name, move in search.MOVES.items():
        assert move(base) != base, name
        recipe = move(recipe)
    assert recipe.weights.group == 128 and recipe.weights.rank == 16 and recipe.rescaling.rotation == 256
    assert recipe.tuning.iterations and recipe.calibration.interval == 1
    assert search.possible(bits, list(search.MOVES)) == list(search.MOVES)


def test_a_move_without_room_is_left_out_by_its_reason(
    search: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert search.possible("w8a8", ["groups", "rotation"]) == ["rotation"]
    assert "groups is left out: weights.group needs a grid of small integers" in capsys.readouterr().err
