"""Find the figures of a scene in its pixels: ground, blobs of ink, and each blob's mask, colour, stroke and
slant, by formula.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tfmq.evaluation.adherence.scenes import COLOURS

# Side in pixels of what the digit classifier looks at, and of the digit in it.
CROP, DIGIT = 28, 22
# Distance of a pixel from the ground, in RGB of [0, 1], above which it is ink. Inks are at least 0.35 from
# any ground, less their jitter.
INK = 0.15
# Two figures have their centres at least so far apart, relative to the picture's side.
APART = 0.3


@dataclass(frozen=True)
class Blob:
    """One figure: its mask `[H, W]` in [0, 1], its centre (x, y) relative to the picture's side, and its mean
    colour `[3]` in [0, 1].
    """

    mask: Tensor
    centre: Tensor
    colour: Tensor

    @property
    def ink(self) -> str:
        """Name of the nearest colour."""
        return nearest_colour(self.colour)


def nearest_colour(colour: Tensor) -> str:
    """Return the name of the colour of the palette that is nearest to `colour` `[3]` in [0, 1]."""
    palette = torch.tensor(list(COLOURS.values()))
    return tuple(COLOURS)[int((palette - colour).square().sum(1).argmin())]


def ground(image: Tensor) -> Tensor:
    """Return the ground `[3, H, W]` of an image `[3, H, W]` in [0, 1]: the plane through its border, by least
    squares.

    The ground is a colour with a slight gradient. Figures may touch the border, so the fit is repeated
    without the worst quarter.
    """
    _, height, width = image.shape
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    plane = torch.stack([torch.ones_like(x), x, y], -1)
    border = torch.zeros(height, width, dtype=torch.bool)
    border[[0, 1, -2, -1]] = True
    border[:, [0, 1, -2, -1]] = True
    places, colours = plane[border], image[:, border].T
    fit = torch.linalg.lstsq(places, colours).solution
    error = (places @ fit - colours).square().sum(1)
    kept = error <= error.quantile(0.75)
    fit = torch.linalg.lstsq(places[kept], colours[kept]).solution
    return (plane @ fit).permute(2, 0, 1)


def _two_means(places: Tensor, weights: Tensor) -> Tensor:
    """Return which of two clusters each of `places` `[N, 2]` belongs to, by Lloyd's iteration from the ends
    of the main axis.
    """
    mean = (places * weights[:, None]).sum(0) / weights.sum()
    spread = (places - mean) * weights[:, None].sqrt()
    axis = torch.linalg.svd(spread, full_matrices=False).Vh[0]
    side = (places - mean) @ axis > 0
    for _ in range(10):
        if side.all() or not side.any():
            return side
        centres = [
            (places[part] * weights[part, None]).sum(0) / weights[part].sum() for part in (side, ~side)
        ]
        side = (places - centres[0]).square().sum(1) < (places - centres[1]).square().sum(1)
    return side


def find_blobs(image: Tensor, count: int) -> tuple[Tensor, list[Blob]]:
    """Return the colour of the ground `[3]` and up to `count` (1 or 2) figures of an image `[3, H, W]` in [0,
    1].

    Fewer come back where there is nothing, or nothing apart.
    """
    back = ground(image)
    difference = (image - back).norm(dim=0)
    inked = difference > INK
    colour = back.mean((1, 2))
    if not inked.any():
        return colour, []
    y, x = inked.nonzero(as_tuple=True)
    size = torch.tensor([image.shape[2], image.shape[1]])
    places = torch.stack([x, y], 1) / size
    if count == 1:
        return colour, [_blob(image, back, inked, places)]
    side = _two_means(places.double(), difference[inked].double())
    if side.all() or not side.any():
        return colour, [_blob(image, back, inked, places)]
    blobs = []
    for part in (side, ~side):
        own = torch.zeros_like(inked)
        own[y[part], x[part]] = True
        blobs.append(_blob(image, back, own, places[part]))
    if (blobs[0].centre - blobs[1].centre).abs().max() < APART:
        return colour, [_blob(image, back, inked, places)]
    return colour, blobs


def _blob(image: Tensor, back: Tensor, inked: Tensor, places: Tensor) -> Blob:
    """Return the figure of the pixels `inked` `[H, W]`; its mask is how far each pixel is from the ground
    towards the ink.
    """
    difference = (image - back).norm(dim=0)
    core = inked & (difference >= difference[inked].quantile(0.5))
    colour = image[:, core].mean(1)
    towards = (colour - back[:, core].mean(1))[:, None, None]
    mask = ((image - back) * towards).sum(0) / towards.square().sum().clamp(min=1e-6)
    near = F.max_pool2d(inked[None].float(), 5, stride=1, padding=2)[0]
    return Blob(mask=mask.clamp(0, 1) * near, centre=places.mean(0), colour=colour)


def crop(mask: Tensor) -> Tensor:
    """Return a mask `[H, W]` cut to its ink and scaled into `[1, 28, 28]`, the longer side 22 pixels, in the
    middle.
    """
    y, x = (mask > 0.5).nonzero(as_tuple=True)
    if not len(y):
        return torch.zeros(1, CROP, CROP)
    cut = mask[y.min() : y.max() + 1, x.min() : x.max() + 1]
    scale = DIGIT / max(cut.shape)
    size = [max(1, round(length * scale)) for length in cut.shape]
    small = F.interpolate(cut[None, None], size=size, mode="bilinear", antialias=True, align_corners=False)[0]
    left, top = (CROP - size[1]) // 2, (CROP - size[0]) // 2
    return F.pad(small, [left, CROP - size[1] - left, top, CROP - size[0] - top])


def shear(mask: Tensor) -> float:
    """Return the slant of a mask `[H, W]`: its moment xy over its moment yy, positive where the top leans to
    the right.
    """
    height, width = mask.shape
    y, x = torch.arange(height, dtype=mask.dtype)[:, None], torch.arange(width, dtype=mask.dtype)
    total = mask.sum().clamp(min=1e-6)
    dx, dy = x - (mask * x).sum() / total, y - (mask * y).sum() / total
    return float(-(mask * dx * dy).sum() / (mask * dy**2).sum().clamp(min=1e-6))


def stroke_width(mask: Tensor) -> float:
    """Return the width of a figure's stroke relative to the figure's longer side: twice its area over its
    outline.
    """
    y, x = (mask > 0.5).nonzero(as_tuple=True)
    if not len(y):
        return 0.0
    # The outline of a soft mask is the total variation of the mask.
    padded = F.pad(mask[None, None], [1, 1, 1, 1])[0, 0]
    dx, dy = padded[1:, 1:] - padded[1:, :-1], padded[1:, 1:] - padded[:-1, 1:]
    outline = (dx.square() + dy.square()).sqrt().sum()
    side = max(int(y.max() - y.min()), int(x.max() - x.min())) + 1
    return float(2 * mask.sum() / outline.clamp(min=1e-6) / side)
