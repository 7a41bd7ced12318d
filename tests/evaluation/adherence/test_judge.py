"""Scenes drawn here by lines and ellipses, so that their truth is known and nothing of the judge's own data
is needed.
"""

import itertools
import math

import pytest
import torch
from torch import Tensor

from tfmq.evaluation.adherence.figures import find_blobs, shear, stroke_width
from tfmq.evaluation.adherence.judge import JUDGES, register_judge
from tfmq.evaluation.adherence.scene_judge import SceneJudge
from tfmq.evaluation.adherence.scenes import COLOURS

SIZE = 64
# Corners of a digit's strokes in a square from (0, 0) to (1, 1), y down.
STROKES = {
    1: [(0.5, 0.0), (0.5, 1.0)],
    7: [(0.1, 0.05), (0.9, 0.05), (0.35, 1.0)],
    0: [
        (0.5 + 0.36 * math.cos(a), 0.5 + 0.5 * math.sin(a)) for a in [2 * math.pi * k / 32 for k in range(33)]
    ],
}


def mask(
    digit: int,
    *,
    centre: tuple[float, float] = (32, 32),
    side: float = 40,
    width: float = 5,
    lean: float = 0.0,
) -> Tensor:
    """Return `[H, W]` in [0, 1]: the strokes of a digit, `width` pixels wide, leaning to the right by
    `lean`.
    """
    y, x = torch.meshgrid(torch.arange(SIZE) + 0.5, torch.arange(SIZE) + 0.5, indexing="ij")
    corners = [
        (centre[0] + (px - 0.5) * side + lean * (0.5 - py) * side, centre[1] + (py - 0.5) * side)
        for px, py in STROKES[digit]
    ]
    distance = torch.full((SIZE, SIZE), 1e9)
    for (ax, ay), (bx, by) in itertools.pairwise(corners):
        dx, dy = bx - ax, by - ay
        along = (((x - ax) * dx + (y - ay) * dy) / (dx * dx + dy * dy)).clamp(0, 1)
        distance = torch.minimum(distance, ((x - ax - along * dx) ** 2 + (y - ay - along * dy) ** 2).sqrt())
    return (width / 2 + 0.5 - distance).clamp(0, 1)


def scene(ground: str, *figures: tuple[Tensor, str]) -> Tensor:
    """Return an image `[3, H, W]` of masks in ink on a ground with a slight gradient."""
    ramp = torch.linspace(-0.05, 0.05, SIZE)
    image = (torch.tensor(COLOURS[ground])[:, None, None] + ramp).expand(3, SIZE, SIZE).clamp(0, 1)
    for alpha, ink in figures:
        image = image.lerp(torch.tensor(COLOURS[ink])[:, None, None].expand_as(image), alpha)
    return image


def verdict(image: Tensor, prompt: str) -> dict[str, bool | None]:
    return {name: values[0] for name, values in SceneJudge()(image[None], [prompt]).items()}


@pytest.mark.parametrize("digit", sorted(STROKES))
@pytest.mark.parametrize(
    ("ink", "ground"),
    [("red", "blue"), ("white", "black"), ("orange", "red"), ("black", "purple"), ("yellow", "white")],
)
def test_one_figure_is_read(digit: int, ink: str, ground: str) -> None:
    names = {0: "zero", 1: "one", 7: "seven"}
    article = "an" if ink[0] == "o" else "a"
    image = scene(ground, (mask(digit), ink))
    found = verdict(image, f"{article} {ink} {names[digit]} on a {ground} ground")
    assert found == {
        "identity": True,
        "ink": True,
        "ground": True,
        "place": None,
        "stroke": None,
        "slant": None,
    }
    wrong = verdict(image, f"a green {names[7 if digit != 7 else 1]} on an orange ground")
    assert (wrong["identity"], wrong["ink"], wrong["ground"]) == (False, False, False)


LEFT, RIGHT, TOP, BOTTOM = (17, 32), (47, 32), (32, 16.5), (32, 47.5)
PAIRS = {"left of": (LEFT, RIGHT), "right of": (RIGHT, LEFT), "above": (TOP, BOTTOM), "below": (BOTTOM, TOP)}


@pytest.mark.parametrize("place", sorted(PAIRS))
def test_two_figures_are_read_at_their_places(place: str) -> None:
    first, second = PAIRS[place]
    image = scene(
        "white",
        (mask(7, centre=first, side=28, width=4), "red"),
        (mask(0, centre=second, side=28, width=4), "blue"),
    )
    found = verdict(image, f"a red seven {place} a blue zero on a white ground")
    assert (found["identity"], found["ink"], found["place"]) == (True, True, True)
    for other in PAIRS.keys() - {place}:
        assert verdict(image, f"a red seven {other} a blue zero")["place"] is False


def test_a_wrong_place_is_one_error() -> None:
    image = scene(
        "white",
        (mask(7, centre=LEFT, side=28, width=4), "red"),
        (mask(0, centre=RIGHT, side=28, width=4), "blue"),
    )
    found = verdict(image, "a red seven right of a blue zero")
    assert (found["identity"], found["ink"], found["place"]) == (True, True, False)


def test_a_weak_ink_is_found_beside_a_strong_one() -> None:
    image = scene(
        "red",
        (mask(7, centre=LEFT, side=28, width=4), "orange"),
        (mask(1, centre=RIGHT, side=28, width=4), "white"),
    )
    assert verdict(image, "an orange seven left of a white one on a red ground")["ink"] is True


def test_an_empty_picture_has_no_figures() -> None:
    image = scene("green")
    assert find_blobs(image, 2)[1] == []
    found = verdict(image, "a bold slanted red seven on a green ground")
    assert found == {
        "identity": False,
        "ink": False,
        "ground": True,
        "place": None,
        "stroke": False,
        "slant": False,
    }


def test_slant_and_stroke_are_measured() -> None:
    straight, leaning = mask(1), mask(1, lean=0.5)
    assert abs(shear(straight)) < 0.01
    assert shear(leaning) == pytest.approx(0.5, abs=0.05)
    # A bar of length 40 with round ends: area over outline is near half its width.
    assert stroke_width(mask(1, width=4)) * 45 == pytest.approx(4, rel=0.2)
    assert verdict(scene("black", (leaning, "white")), "a slanted white one")["slant"] is True
    assert verdict(scene("black", (straight, "white")), "a slanted white one")["slant"] is False
    assert verdict(scene("black", (mask(0, width=9), "white")), "a bold white zero")["stroke"] is True
    assert verdict(scene("black", (mask(0, width=2), "white")), "a bold white zero")["stroke"] is False


def test_a_prompt_that_is_no_caption_is_refused() -> None:
    with pytest.raises(ValueError, match="no caption of a scene"):
        verdict(scene("green"), "a photograph of a cat")


def test_judges_are_registered_once() -> None:
    assert "scenes" in JUDGES
    with pytest.raises(ValueError, match="registered already"):
        register_judge("scenes")(SceneJudge)
