"""Draw scenes of hand-written digits: every attribute is drawn from a seeded generator, hence known.

The digits are those of the MNIST test set (LeCun and Cortes; CC BY-SA 3.0), which is read from a file and not
part of the project. They are split once: `PAINTED` are the objects of scenes, `JUDGED` train the judge,
`TESTED` measure it.
"""

import gzip
import math
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from tfmq.evaluation.adherence.scenes import COLOURS, PLACES, SLANTS, STROKES, Figure, Scene

SIZE = 64
# Which of the 10 000 digits are for what.
PAINTED, JUDGED, TESTED = slice(0, 6000), slice(6000, 9000), slice(9000, 10000)
# Side of a digit's square on the canvas, alone and beside another.
ALONE, BESIDE = (40, 46), (28, 32)
# Offset of the first of two figures from the middle of the canvas, as (x, y) in pixels.
OFFSETS = {"left of": (-15.0, 0.0), "right of": (15.0, 0.0), "above": (0.0, -15.5), "below": (0.0, 15.5)}
# An ink of two colours, that of the upper half of a figure and that of the lower, which no model has seen:
# an adapter learns it (lora.py). The autoencoder draws no colours but those it was trained on, and the
# encoder of captions knows no other words.
LATER = {"yellow blue": ("yellow", "blue")}
# One in so many combinations of digits, inks, ground and place is kept out of training.
HELD_OUT = 10


def read_digits(directory: Path) -> tuple[Tensor, Tensor]:
    """Return images `[N, 1, 28, 28]` in [0, 1] and labels `[N]` of the gzipped IDX files `t10k-*` in
    `directory`.
    """
    images = gzip.decompress((directory / "t10k-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((directory / "t10k-labels-idx1-ubyte.gz").read_bytes())
    if images[:4] != b"\x00\x00\x08\x03" or labels[:4] != b"\x00\x00\x08\x01":
        raise SystemExit(f"{directory} holds no IDX files of images and labels")
    pixels = (
        torch.from_numpy(np.frombuffer(images, np.uint8, offset=16).reshape(-1, 1, 28, 28).astype(np.float32))
        / 255
    )
    return deskewed(pixels), torch.from_numpy(np.frombuffer(labels, np.uint8, offset=8).astype(np.int64))


def deskewed(digits: Tensor) -> Tensor:
    """Shear digits `[N, 1, H, W]` in [0, 1] about their centre until the moments of second order say that
    they stand upright.
    """
    size = digits.shape[-1]
    axis = (torch.arange(size) + 0.5) / size * 2 - 1
    mass = digits[:, 0] / digits.sum((1, 2, 3))[:, None, None]
    x, y = (mass * axis).sum((1, 2)), (mass * axis[:, None]).sum((1, 2))
    dx, dy = axis - x[:, None], axis - y[:, None]
    shear = torch.einsum("nhw,nh,nw->n", mass, dy, dx) / torch.einsum("nhw,nh->n", mass, dy**2)
    zero, one = torch.zeros_like(x), torch.ones_like(x)
    # Centred, too: the sampling grid moves to the centre of mass.
    affine = torch.stack([torch.stack([one, shear, x], 1), torch.stack([zero, one, y], 1)], 1)
    return F.grid_sample(
        digits, F.affine_grid(affine, list(digits.shape), align_corners=False), align_corners=False
    )


def _pick(names: tuple[str, ...], generator: Generator) -> str:
    return names[int(torch.randint(len(names), (1,), generator=generator))]


def _figure(label: int, ink: str, generator: Generator) -> Figure:
    return Figure(digit=label, ink=ink, stroke=_pick(STROKES, generator), slant=_pick(SLANTS, generator))


def held_out(scene: Scene) -> bool:
    """Whether this combination of digits, inks, place and ground is kept out of training."""
    text = (
        " ".join(f"{figure.digit} {figure.ink}" for figure in scene.figures)
        + f" {scene.place} {scene.ground}"
    )
    return zlib.crc32(text.encode()) % HELD_OUT == 0


def draw_scene(labels: tuple[int, int], generator: Generator, *, pairs: float = 0.4) -> Scene:
    """Return a scene of the first of two digits, or with probability `pairs` of both; every attribute is set.

    Inks differ from the ground. Two figures may share an ink.
    """
    colours = tuple(COLOURS)
    ground = _pick(colours, generator)
    inks = tuple(name for name in colours if name != ground)
    first = _figure(labels[0], _pick(inks, generator), generator)
    if torch.rand(1, generator=generator) >= pairs:
        return Scene(figures=(first,), ground=ground)
    second = _figure(labels[1], _pick(inks, generator), generator)
    return Scene(figures=(first, second), place=_pick(PLACES, generator), ground=ground)


def said(scene: Scene, generator: Generator, *, silence: float = 0.5) -> Scene:
    """Return `scene` without some of what a caption need not say: stroke and slant with probability
    `silence`, the ground with half of it.
    """

    def hushed(figure: Figure) -> Figure:
        stroke, slant = (torch.rand(2, generator=generator) < silence).tolist()
        return replace(
            figure, stroke=None if stroke else figure.stroke, slant=None if slant else figure.slant
        )

    figures = tuple(hushed(figure) for figure in scene.figures)
    ground = None if torch.rand(1, generator=generator) < silence / 2 else scene.ground
    return replace(scene, figures=figures, ground=ground)


def _stroked(digits: Tensor, bold: Tensor) -> Tensor:
    """Return masks `[N, 1, 112, 112]` of digits `[N, 1, 28, 28]` with a thin or bold stroke, edges a pixel
    soft.
    """
    large = F.interpolate(digits, scale_factor=4, mode="bicubic", align_corners=False).clamp(0, 1)
    wide = F.max_pool2d(large, 7, stride=1, padding=3)
    thin = -F.max_pool2d(-large, 3, stride=1, padding=1)
    chosen = torch.where(bold[:, None, None, None], wide, thin)
    return ((chosen - 0.45) * 6 + 0.5).clamp(0, 1)


def _placed(masks: Tensor, centre: Tensor, side: Tensor, slant: Tensor, turn: Tensor) -> Tensor:
    """Return masks `[N, 1, H, W]` on the canvas: sheared by `slant`, turned by `turn` radians, `side` pixels
    large, about `centre` `[N, 2]`.
    """
    scale = SIZE / side
    shift = (centre / SIZE * 2 - 1) * scale[:, None]
    cos, sin = turn.cos() * scale, turn.sin() * scale
    # From the canvas back to the digit: undo the shift, the scale, the turn and the shear (upper half to the
    # right).
    rows = torch.stack([cos + slant * -sin, sin + slant * cos, -sin, cos], 1).reshape(-1, 2, 2)
    unit = rows / scale[:, None, None]
    affine = torch.cat([rows, -(unit @ shift[:, :, None])], 2)
    grid = F.affine_grid(affine, [len(masks), 1, 2 * SIZE, 2 * SIZE], align_corners=False)
    return F.avg_pool2d(F.grid_sample(masks, grid, align_corners=False), 2)


def _uniform(generator: Generator, low: float, high: float, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=generator) * (high - low) + low


def _ink(names: list[str], generator: Generator, jitter: float) -> Tensor:
    """Return colours `[N, 3]` near those of `names`."""
    colours = torch.tensor([COLOURS[name] for name in names])
    return (colours + jitter * _uniform(generator, -0.04, 0.04, *colours.shape)).clamp(0, 1)


def typical(digits: Tensor, labels: Tensor, count: int) -> Tensor:
    """Return the indices of the `count` digits of each label that are nearest to the mean of their label,
    ascending.
    """
    kept = []
    for label in labels.unique().tolist():
        rows = (labels == label).nonzero().flatten()
        distance = (digits[rows] - digits[rows].mean(0)).square().flatten(1).sum(1)
        kept.append(rows[distance.argsort()[:count]])
    return torch.cat(kept).sort().values


def paint(scenes: list[Scene], digits: Tensor, generator: Generator, *, jitter: float = 1.0) -> Tensor:
    """Paint scenes whose figures are the digits `[N, 2, 28, 28]` (the second unused where a scene has one).

    What a caption never says, such as the exact place, size, turn and tint, varies by `jitter`, relative to
    the most that the judge knows.

    Returns:
        Images `[N, 3, 64, 64]` in [0, 1].
    """
    count = len(scenes)
    base = _ink([scene.ground or "" for scene in scenes], generator, jitter)
    angle = _uniform(generator, 0, 2 * math.pi, count, 1, 1)
    axis = jitter * torch.linspace(-0.06, 0.06, SIZE)
    canvas = (base[:, :, None, None] + (axis[:, None] * angle.sin() + axis * angle.cos())[:, None]).clamp(
        0, 1
    )
    for slot in range(2):
        rows = [row for row, scene in enumerate(scenes) if len(scene.figures) > slot]
        if rows:
            figures = [scenes[row].figures[slot] for row in rows]
            canvas[rows] = _over(
                canvas[rows],
                [scenes[row] for row in rows],
                figures,
                digits[rows, slot : slot + 1],
                slot,
                generator,
                jitter,
            )
    return canvas


def _over(
    canvas: Tensor,
    scenes: list[Scene],
    figures: list[Figure],
    digits: Tensor,
    slot: int,
    generator: Generator,
    jitter: float,
) -> Tensor:
    """Return `canvas` with one figure painted over each of its images."""
    count, middle = len(figures), SIZE / 2
    pair = torch.tensor([len(scene.figures) == 2 for scene in scenes])
    sizes = [
        sum(bounds) / 2 + jitter * _uniform(generator, -0.5, 0.5, count) * (bounds[1] - bounds[0])
        for bounds in (BESIDE, ALONE)
    ]
    side = torch.where(pair, *sizes)
    offset = torch.tensor([OFFSETS.get(scene.place or "", (0.0, 0.0)) for scene in scenes]) * (
        1 if slot == 0 else -1
    )
    centre = (
        middle
        + offset
        + _uniform(generator, -1, 1, count, 2) * torch.where(pair, 1.5 * jitter, 5.0 * jitter)[:, None]
    )
    slant = torch.tensor(
        [0.5 if figure.slant == "slanted" else 0.0 for figure in figures]
    ) + jitter * _uniform(generator, -0.06, 0.06, count)
    turn = jitter * _uniform(generator, -0.06, 0.06, count)
    masks = _stroked(digits, torch.tensor([figure.stroke == "bold" for figure in figures]))
    alpha = _placed(masks, centre, side, slant, turn)
    named = [figure.ink or "" for figure in figures]
    upper, lower = ([LATER.get(name, (name, name))[half] for name in named] for half in (0, 1))
    ink = _ink(upper, generator, jitter)[:, :, None, None].expand_as(canvas)
    if upper != lower:
        below = torch.arange(SIZE) >= centre[:, 1:]
        ink = torch.where(below[:, None, :, None], _ink(lower, generator, jitter)[:, :, None, None], ink)
    return canvas.lerp(ink, alpha)


def scene_batch(
    digits: Tensor,
    labels: Tensor,
    count: int,
    generator: Generator,
    *,
    pairs: float = 0.4,
    held: bool = False,
    jitter: float = 1.0,
) -> tuple[list[Scene], Tensor]:
    """Return `count` scenes with their images `[count, 3, 64, 64]`, from combinations that training sees, or
    `held` out of it.

    `digits` `[M, 1, 28, 28]` and `labels` `[M]` are what figures are chosen from.
    """
    scenes: list[Scene] = []
    chosen: list[Tensor] = []
    while len(scenes) < count:
        index = torch.randint(len(digits), (2,), generator=generator)
        first, second = labels[index].tolist()
        scene = draw_scene((first, second), generator, pairs=pairs)
        if held_out(scene) == held:
            scenes.append(scene)
            chosen.append(index)
    return scenes, paint(scenes, digits[torch.stack(chosen)][:, :, 0], generator, jitter=jitter)
