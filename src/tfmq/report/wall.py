"""Pairs of images small enough to travel inside a page."""

import base64
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from tfmq.errors import require
from tfmq.evaluation.sampling import Images
from tfmq.storage.errors import ForeignFileError

# Forms that are tried in turn until the images fit: largest width in pixels, format and options of Pillow.
# The first keeps every pixel.
FORMS: tuple[tuple[int | None, str, dict[str, Any]], ...] = (
    (None, "PNG", {"optimize": True}),
    (512, "WEBP", {"quality": 85}),
    (256, "WEBP", {"quality": 80}),
    (192, "WEBP", {"quality": 65}),
    (128, "WEBP", {"quality": 50}),
    (64, "WEBP", {"quality": 40}),
)


@dataclass(frozen=True)
class Wall:
    """Images of both models as data URIs, pair by pair, and in which form they are."""

    pairs: tuple[tuple[str, str], ...]
    form: str


def read_pairs(path: Path) -> tuple[Images, Images]:
    """Return the images of full precision and of the quantized model, uint8 `[N, H, W, 3]` both.

    Raises:
        ForeignFileError: the file holds something else.
    """
    try:
        with path.open("rb") as stream, np.load(stream) as stored:
            reference, quantized = stored["reference"], stored["quantized"]
    except (ValueError, OSError, EOFError, KeyError, BadZipFile) as error:
        raise ForeignFileError(
            f"{path} holds no pairs of images ({error}); run tfmq evaluate again"
        ) from error
    if (
        reference.shape != quantized.shape
        or reference.ndim != 4
        or reference.shape[-1] != 3
        or reference.dtype != np.uint8
    ):
        raise ForeignFileError(
            f"{path} holds {reference.dtype} {reference.shape} and "
            f"{quantized.shape}; pairs are uint8 [N, H, W, 3]"
        )
    return reference, quantized


def _encoded(images: Images, width: int | None, kind: str, options: dict[str, Any]) -> Iterator[str]:
    pil = require("PIL.Image", extra="report")
    for array in images:
        image = pil.fromarray(array)
        if width is not None and image.width > width:
            image = image.resize((width, round(image.height * width / image.width)), pil.Resampling.LANCZOS)
        buffer = io.BytesIO()
        image.save(buffer, format=kind, **options)
        yield f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def build_wall(path: Path, *, budget: int) -> Wall:
    """Return the pairs in the best form whose data URIs take at most `budget` bytes together; the last form
    is taken whatever it takes.

    Raises:
        ForeignFileError: see `read_pairs`.
        MissingExtraError: Pillow is not installed.
    """
    reference, quantized = read_pairs(path)
    for width, kind, options in FORMS:
        left, right = (tuple(_encoded(images, width, kind, options)) for images in (reference, quantized))
        if sum(map(len, (*left, *right))) <= budget:
            break
    shown = reference.shape[2] if width is None else min(width, reference.shape[2])
    quality = "every pixel" if kind == "PNG" else f"WebP, quality {options['quality']}"
    return Wall(
        tuple(zip(left, right, strict=True)), f"{shown} of {reference.shape[2]} pixels wide, {quality}"
    )
