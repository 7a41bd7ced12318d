import pytest
from hypothesis import given
from hypothesis import strategies as st

from tfmq.evaluation.adherence.scenes import COLOURS, DIGITS, PLACES, SLANTS, STROKES, Figure, Scene, parse


def _open(names: tuple[str, ...]) -> st.SearchStrategy[str | None]:
    return st.none() | st.sampled_from(names)


FIGURES = st.builds(
    Figure,
    digit=st.integers(0, len(DIGITS) - 1),
    ink=_open(tuple(COLOURS)),
    stroke=_open(STROKES),
    slant=_open(SLANTS),
)
ALONE = st.builds(
    lambda figure, ground: Scene(figures=(figure,), ground=ground), FIGURES, _open(tuple(COLOURS))
)
PAIRS = st.builds(
    lambda figures, place, ground: Scene(figures=figures, place=place, ground=ground),
    st.tuples(FIGURES, FIGURES),
    st.sampled_from(PLACES),
    _open(tuple(COLOURS)),
)


@given(ALONE | PAIRS)
def test_a_caption_says_its_scene(scene: Scene) -> None:
    assert parse(scene.caption()) == scene


@pytest.mark.parametrize(
    "text",
    ["", "a red car", "a bold red seven on a blue", "a red bold seven", "a red seven left of", "x" * 10_000],
)
def test_other_text_is_refused_in_few_words(text: str) -> None:
    with pytest.raises(ValueError, match="no caption of a scene") as refused:
        parse(text)
    assert len(str(refused.value)) < 200


def test_a_pair_needs_a_place() -> None:
    figure = Figure(digit=1)
    with pytest.raises(ValueError, match="two and a place"):
        Scene(figures=(figure, figure))


def test_colours_are_far_apart() -> None:
    values = list(COLOURS.values())
    distances = [
        sum((a - b) ** 2 for a, b in zip(x, y, strict=True)) ** 0.5 for x in values for y in values if x != y
    ]
    assert min(distances) > 0.35
