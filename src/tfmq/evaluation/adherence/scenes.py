"""What a caption of a scene says: hand-written digits in ink on a plain ground.

The models `text` and `text-turbo` draw such scenes. Their vocabulary stands here, beside the judge that
checks it, so that training and judging share one grammar.
"""

import re
from dataclasses import dataclass, replace

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# RGB in [0, 1]. Any two are at least 0.35 apart, so that the nearest colour is the one that was meant.
COLOURS = {
    "red": (0.85, 0.10, 0.12),
    "green": (0.10, 0.62, 0.20),
    "blue": (0.12, 0.25, 0.88),
    "yellow": (0.97, 0.88, 0.12),
    "white": (0.96, 0.96, 0.96),
    "black": (0.05, 0.05, 0.05),
    "orange": (0.97, 0.50, 0.06),
    "purple": (0.55, 0.14, 0.65),
}
STROKES = ("thin", "bold")
SLANTS = ("upright", "slanted")
# Where the first figure stands, seen from the second.
PLACES = ("left of", "right of", "above", "below")

_FIGURE = (
    rf"an? (?:({'|'.join(STROKES)}) )?(?:({'|'.join(SLANTS)}) "
    rf")?(?:({'|'.join(COLOURS)}) )?({'|'.join(DIGITS)})"
)
_CAPTION = re.compile(
    rf"{_FIGURE}(?: ({'|'.join(PLACES)}) {_FIGURE})?(?: on an? ({'|'.join(COLOURS)}) ground)?"
)


def _article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One digit; None is what a caption leaves open."""

    digit: int
    ink: str | None = None
    stroke: str | None = None
    slant: str | None = None

    def words(self) -> str:
        """Return the figure as a caption names it."""
        said = [word for word in (self.stroke, self.slant, self.ink) if word]
        return _article(" ".join([*said, DIGITS[self.digit]]))


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One figure, or two with the place of the first; None is what a caption leaves open."""

    figures: tuple[Figure, ...]
    place: str | None = None
    ground: str | None = None

    def __post_init__(self) -> None:
        if len(self.figures) != 1 + (self.place is not None):
            raise ValueError(
                "a scene has one figure, or two and a place; got "
                f"{len(self.figures)} and place {self.place!r}"
            )

    def caption(self) -> str:
        """Return the sentence that says this scene.

        >>> Scene(figures=(Figure(digit=7, ink="red", stroke="bold"),), ground="blue").caption()
        'a bold red seven on a blue ground'
        """
        text = f" {self.place} ".join(figure.words() for figure in self.figures)
        return f"{text} on {_article(f'{self.ground} ground')}" if self.ground else text


def parse(caption: str) -> Scene:
    """Return the scene that `caption` says.

    >>> parse("a white three left of a green five").figures[1].digit
    5

    Raises:
        ValueError: the caption is no sentence of this grammar.
    """
    match = _CAPTION.fullmatch(caption.strip())
    if match is None:
        raise ValueError(
            f"{caption[:80]!r} is no caption of a scene, such as 'a bold red seven on a blue ground'"
        )
    stroke, slant, ink, digit, place, *second, ground = match.groups()
    first = Figure(digit=DIGITS.index(digit), ink=ink, stroke=stroke, slant=slant)
    if place is None:
        return Scene(figures=(first,), ground=ground)
    other = replace(first, digit=DIGITS.index(second[3]), ink=second[2], stroke=second[0], slant=second[1])
    return Scene(figures=(first, other), place=place, ground=ground)
