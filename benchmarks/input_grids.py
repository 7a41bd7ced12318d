"""What other grids of inputs and of attention could bring: errors of outputs in full-precision calls, each
operand on its grid alone.

    python benchmarks/input_grids.py dit text text-turbo --bits 4

Every layer of eight channels and more is looked at in calls spread over the trajectories of a few images.
Its input gets one grid, one for each token (linear layers), or one for each of `--groups` groups of channels:
neighbours, or those that k-means finds alike in their extremes (DGQ, Ryu et al., 2025, section 3.2). Grids
are of the least error in that call (`search`), those of tokens of their extremes.

The map after a softmax gets evenly spaced codes (`uniform`), powers of two (`log2`; DGQ; TCAQ-DM, Huang et
al., 2025, section 3.3), or two values to each doubling, as many as eight bits have room for (`half steps`),
on the scale of least error. `first apart` keeps the first column in full precision, as DGQ does where the
first token of a prompt takes most of a row.

Rows are means over layers of the error in dB below the output (higher is better), each layer's mean energy
over the calls.
"""

import argparse
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import log10
from typing import Any

import torch
from short import opened
from torch import Tensor, nn
from torch.nn import functional

from tfmq.calibration.trajectory import recorded_calls
from tfmq.evaluation.sampling import draw
from tfmq.integrations.diffusers.quiet import quiet
from tfmq.models.denoiser import Inputs
from tfmq.nn.operation import operation_of
from tfmq.numerics.grids import Grid, IntegerFormat, Table
from tfmq.numerics.ranges import min_max, search

STEPS, SEED, IMAGES, CALLS = 20, 4321, 4, 5
GUIDANCE = {"text": 3.0, "dit": 2.0}
FEWEST = 8
Energies = dict[str, dict[str, list[float]]]


def on_grid(rows: Tensor, fmt: Grid, *, exact: bool = False) -> Tensor:
    """Return rows `[n, m]` on a grid each, of their extremes or searched."""
    scale, zero = (min_max if exact else search)(rows, fmt)
    return fmt.snap_(rows / scale[:, None], zero[:, None]) * scale[:, None]


def clusters(low: Tensor, high: Tensor, count: int) -> list[Tensor]:
    """Return the channels of each of at most `count` clusters of alike extremes `[C]`, by k-means from evenly
    spaced quantiles of the width.
    """
    points = torch.stack([low, high], dim=1)
    places = torch.linspace(0, len(points) - 1, 2 * count + 1)[1::2].round().long()
    centres = points[(high - low).argsort()[places]]
    for _ in range(50):
        nearest = torch.cdist(points, centres).argmin(dim=1)
        moved = [
            points[nearest == k].mean(dim=0) if bool((nearest == k).any()) else centres[k]
            for k in range(count)
        ]
        if torch.equal(found := torch.stack(moved), centres):
            break
        centres = found
    return [channels for k in range(count) if len(channels := (nearest == k).nonzero()[:, 0])]


def inputs(x: Tensor, axis: int, *, bits: int, groups: int) -> Iterator[tuple[str, Tensor]]:
    """Yield an input on each kind of grid."""
    fmt, channels = IntegerFormat(bits), x.movedim(axis, 0)
    rows = channels.flatten(1)
    yield "one grid", on_grid(rows.reshape(1, -1), fmt).reshape(channels.shape).movedim(0, axis)
    if axis == -1:
        yield "each token", on_grid(x.reshape(-1, x.shape[-1]), fmt, exact=True).reshape(x.shape)
    neighbours = list(torch.arange(len(rows)).tensor_split(groups))
    for name, parts in (
        (f"{groups} neighbours", neighbours),
        (f"{groups} clusters", clusters(rows.amin(dim=1), rows.amax(dim=1), groups)),
    ):
        found = torch.empty_like(rows)
        for part in parts:
            found[part] = on_grid(rows[part].reshape(1, -1), fmt).reshape(len(part), -1)
        yield name, found.reshape(channels.shape).movedim(0, axis)


def maps(probabilities: Tensor, *, bits: int) -> Iterator[tuple[str, Tensor]]:
    """Yield a map after the softmax on each kind of grid."""
    half_steps = [0, 1, 2, 3, *(base << e for e in range(1, 7) for base in (2, 3))][: 2**bits]
    grids: dict[str, Grid] = {
        "uniform": IntegerFormat(bits),
        "log2": Table("log2", (0, *(2**k for k in range(min(2**bits - 1, 7))))),
        "half steps": Table("half steps", tuple(value for value in half_steps if value <= 127)),
    }
    whole = probabilities.reshape(1, -1)
    rest = probabilities[..., 1:]
    for name, grid in grids.items():
        yield name, on_grid(whole, grid).reshape(probabilities.shape)
        apart = on_grid(rest.reshape(1, -1), grid).reshape(rest.shape)
        yield f"{name}, first apart", torch.cat([probabilities[..., :1], apart], dim=-1)


@contextmanager
def layers_watched(module: nn.Module, energies: Energies, *, bits: int, groups: int) -> Iterator[None]:
    """Add up the errors of the outputs of layers."""

    def watch(name: str, layer: Any, operation: Any) -> Any:
        def see(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            x = args[0].detach()
            if x.shape[operation.channel_axis] < FEWEST:
                return
            whole = float(operation.multiply(x, layer.weight, None).square().sum())
            for kind, found in inputs(x, operation.channel_axis, bits=bits, groups=groups):
                error = operation.multiply(found - x, layer.weight, None)
                energies[kind][name].append(float(error.square().sum()) / whole)

        return layer.register_forward_hook(see)

    handles = []
    for name, layer in module.named_modules():
        if (operation := operation_of(layer)) is not None:
            handles.append(watch(name, layer, operation))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def attention_watched(energies: Energies, *, bits: int) -> Iterator[None]:
    """Add up the errors of the outputs of attention."""
    stock = functional.scaled_dot_product_attention

    def see(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        output = stock(query, key, value, *args, **kwargs)
        scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
        kind = "self" if query.shape == key.shape else "cross"
        for name, found in maps(scores.softmax(dim=-1), bits=bits):
            error = float((found @ value - output).square().sum() / output.square().sum())
            energies[f"{kind}-attention, {name}"][f"{tuple(query.shape)}"].append(error)
        return output

    functional.scaled_dot_product_attention = see  # type: ignore[assignment]
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = stock


def table(model: str, *, bits: int, groups: int) -> Iterator[str]:
    """Yield the rows of a model."""
    sampler, calls = opened(model, GUIDANCE), []
    with recorded_calls(sampler.denoiser, calls.append):
        draw(sampler, IMAGES, steps=STEPS if model != "text-turbo" else 4, seed=SEED)
    chosen: list[Inputs] = calls[:: max(1, len(calls) // CALLS)]
    energies: Mapping[str, Mapping[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    module = sampler.denoiser.module
    with (
        torch.no_grad(),
        layers_watched(module, energies, bits=bits, groups=groups),  # type: ignore[arg-type]
        attention_watched(energies, bits=bits),  # type: ignore[arg-type]
    ):
        for call in chosen:
            sampler.denoiser(call)
    for kind, found in energies.items():
        errors = [-10 * log10(max(sum(values) / len(values), 1e-12)) for values in found.values()]
        yield f"| {model} | {kind} | {sum(errors) / len(errors):.2f} | {min(errors):.2f} | {len(errors)} |"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--groups", type=int, default=4)
    options = parser.parse_args()
    print("| model | grids | mean, dB | worst | layers |\n|---|---|---|---|---|")
    with quiet():
        for model in options.models:
            for line in table(model, bits=options.bits, groups=options.groups):
                print(line, flush=True)


if __name__ == "__main__":
    main()
