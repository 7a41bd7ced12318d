"""The judge of scenes of digits: colours, places, strokes and slants by formula, the digit by a small
classifier.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from tfmq.evaluation.adherence.classifier import DigitClassifier
from tfmq.evaluation.adherence.figures import Blob, crop, find_blobs, nearest_colour, shear, stroke_width
from tfmq.evaluation.adherence.judge import register_judge
from tfmq.evaluation.adherence.scenes import Figure, Scene, parse
from tfmq.storage.atomic import read_tensors

WEIGHTS = Path(__file__).parents[2] / "assets" / "judges" / "scenes.safetensors"
ATTRIBUTES = ("identity", "ink", "ground", "place", "stroke", "slant")
# Least slant of a figure that counts as slanted, and least stroke width of a bold one. training/judge.py
# prints how often scenes whose truth is known fall on the right side.
SLANTED, BOLD = 0.172, 0.161

Verdicts = dict[str, list[bool | None]]


@cache
def classifier() -> DigitClassifier:
    """Return the trained classifier."""
    module = DigitClassifier()
    module.load_state_dict({name: value.float() for name, value in read_tensors(WEIGHTS)[0].items()})
    return module.eval().requires_grad_(False)


def _ordered(blobs: list[Blob], place: str) -> list[Blob]:
    """Return two figures in the order in which `place` names them, or none where they stand otherwise to each
    other.
    """
    away = blobs[1].centre - blobs[0].centre
    axis = int(away.abs().argmax())
    if axis != ("left" not in place and "right" not in place):
        return []
    low_first = place in ("left of", "above")
    return blobs if (away[axis] > 0) == low_first else blobs[::-1]


class SceneJudge:
    """Reads scenes of one or two digits; see `Judge`.

    An attribute of two figures holds where it holds for both, each at its place. A place holds where the
    figures stand as said *and* what stands there fits better than the other way round, by digit and ink.
    """

    attributes = ATTRIBUTES

    def __init__(self, module: DigitClassifier | None = None) -> None:
        self._classifier = module or classifier()

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Mapping[str, list[bool | None]]:
        """Return a verdict for each attribute and picture; a prompt that is no caption of a scene is a
        `ValueError`.
        """
        verdicts: Verdicts = {name: [] for name in ATTRIBUTES}
        for image, prompt in zip(images.float(), prompts, strict=True):
            for name, verdict in self.read(image, parse(prompt)).items():
                verdicts[name].append(verdict)
        return verdicts

    def digits(self, blobs: Sequence[Blob]) -> list[int]:
        """Return the digit that each figure shows."""
        return (
            self._classifier(torch.stack([crop(blob.mask) for blob in blobs])).argmax(1).tolist()
            if blobs
            else []
        )

    def read(self, image: Tensor, scene: Scene) -> dict[str, bool | None]:
        """Return the verdicts on one image `[3, H, W]` in [0, 1]."""
        colour, blobs = find_blobs(image, len(scene.figures))
        found: dict[str, bool | None] = dict.fromkeys(ATTRIBUTES)
        found["ground"] = None if scene.ground is None else nearest_colour(colour) == scene.ground
        complete = len(blobs) == len(scene.figures)
        found["place"], shown = self._placed(scene, blobs)
        found["identity"] = complete and all(figure.digit == digit for figure, _, digit in shown)
        for name in ("ink", "stroke", "slant"):
            if any(getattr(figure, name) for figure in scene.figures):
                found[name] = complete and all(
                    _holds(name, figure, blob) is not False for figure, blob, _ in shown
                )
        return found

    def _placed(self, scene: Scene, blobs: list[Blob]) -> tuple[bool | None, list[tuple[Figure, Blob, int]]]:
        """Return whether the figures stand as said, None where nothing is said, and what is taken for each
        figure with the digit that it shows.
        """
        if scene.place is None:
            return None, list(zip(scene.figures, blobs, self.digits(blobs), strict=False))
        as_said = _ordered(blobs, scene.place) if len(blobs) > 1 else []
        ordered = as_said or blobs
        digits = self.digits(ordered)
        complete = len(blobs) == len(scene.figures)
        stands = complete and bool(as_said) and self._fits(scene, ordered, digits)
        if complete and not stands:
            ordered, digits = self._best_order(scene, ordered, digits)
        return stands, list(zip(scene.figures, ordered, digits, strict=False))

    @staticmethod
    def _score(scene: Scene, blobs: Sequence[Blob], digits: Sequence[int]) -> int:
        pairs = zip(scene.figures, blobs, digits, strict=True)
        return sum(
            (figure.digit == digit) + (figure.ink is not None and figure.ink == blob.ink)
            for figure, blob, digit in pairs
        )

    def _fits(self, scene: Scene, blobs: list[Blob], digits: list[int]) -> bool:
        return self._score(scene, blobs, digits) >= self._score(scene, blobs[::-1], digits[::-1])

    def _best_order(self, scene: Scene, blobs: list[Blob], digits: list[int]) -> tuple[list[Blob], list[int]]:
        """Return the figures in the order in which they fit the scene best: a wrong place is one error, not
        three.
        """
        return (blobs, digits) if self._fits(scene, blobs, digits) else (blobs[::-1], digits[::-1])


def _holds(name: str, figure: Figure, blob: Blob) -> bool | None:
    said = getattr(figure, name)
    if said is None:
        return None
    if name == "ink":
        return bool(blob.ink == said)
    if name == "stroke":
        return (stroke_width(blob.mask) > BOLD) == (said == "bold")
    return (shear(blob.mask) > SLANTED) == (said == "slanted")


@register_judge("scenes")
def scene_judge() -> SceneJudge:
    """Return the judge of the models `text`, `text-turbo` and `dit`."""
    return SceneJudge()
