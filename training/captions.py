"""Teach a text encoder to read captions before any picture is drawn, as CLIP knows language before Stable
Diffusion begins.

From its last hidden state a linear layer has to tell every attribute of the scene. An encoder that learns
from the denoiser's loss alone takes tens of thousands of steps to bind a colour to its figure: most steps of
denoising can be taken without the caption.
"""

import torch
import torch.nn.functional as F
from scenes import draw_scene, said
from torch import Generator, Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from tfmq.evaluation.adherence.scenes import COLOURS, DIGITS, PLACES, SLANTS, STROKES, Figure, Scene

# The answers to each question; the first means that the caption does not say, or that there is no such
# figure.
FIGURE = {"digit": DIGITS, "ink": tuple(COLOURS), "stroke": STROKES, "slant": SLANTS}
SCENE = {"place": ("beside", "stacked"), "ground": tuple(COLOURS)}
# The first of two figures may stand on either side; the denoiser needs to know what stands where.
SWAPPED = ("right of", "below")


def _said(figure: Figure | None) -> list[int]:
    if figure is None:
        return [0] * len(FIGURE)
    values = [DIGITS[figure.digit], figure.ink, figure.stroke, figure.slant]
    return [
        names.index(value) + 1 if value else 0 for names, value in zip(FIGURE.values(), values, strict=True)
    ]


def answers(scene: Scene) -> list[int]:
    """Return the answer to every question: of the left or upper figure, of the other, how they stand, the
    ground.
    """
    figures = [*scene.figures, None][:2]
    if scene.place in SWAPPED:
        figures.reverse()
    place = 0 if scene.place is None else 1 + PLACES.index(scene.place) // 2
    return [
        *_said(figures[0]),
        *_said(figures[1]),
        place,
        tuple(COLOURS).index(scene.ground) + 1 if scene.ground else 0,
    ]


def _batch(tokenizer: CLIPTokenizer, size: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Return the tokens `[B, L]` of captions, and the answers `[B, Q]` to every question about them."""
    labels = torch.randint(len(DIGITS), (size, 2), generator=generator).tolist()
    scenes = [said(draw_scene((first, second), generator), generator) for first, second in labels]
    tokens = tokenizer(
        [scene.caption() for scene in scenes], padding="max_length", truncation=True, return_tensors="pt"
    ).input_ids
    return tokens, torch.tensor([answers(scene) for scene in scenes])


def learn_to_read(
    encoder: CLIPTextModel, tokenizer: CLIPTokenizer, *, seed: int, steps: int = 600, batch_size: int = 128
) -> float:
    """Train `encoder` in place; return the share of questions about new captions that it answers rightly at
    the caption's end.
    """
    sizes = [1 + len(names) for names in (*FIGURE.values(), *FIGURE.values(), *SCENE.values())]
    heads = nn.ModuleList(nn.Linear(encoder.config.hidden_size, size) for size in sizes)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *heads.parameters()], lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    generator = Generator().manual_seed(seed)
    for _ in range(steps):
        tokens, targets = _batch(tokenizer, batch_size, generator)
        loss = _loss(encoder, heads, tokens, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    tokens, targets = _batch(tokenizer, 1024, generator)
    with torch.no_grad():
        states = encoder(tokens).last_hidden_state[:, -1]
    return float(
        torch.stack([head(states).argmax(1) == targets[:, i] for i, head in enumerate(heads)]).float().mean()
    )


def _loss(encoder: CLIPTextModel, heads: nn.ModuleList, tokens: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross entropy of every answer at the end of the caption and at every padding behind
    it.
    """
    ended = (tokens == encoder.config.eos_token_id).nonzero(as_tuple=True)
    states, asked = encoder(tokens).last_hidden_state[ended], targets[ended[0]]
    return torch.stack([F.cross_entropy(head(states), asked[:, i]) for i, head in enumerate(heads)]).mean()
