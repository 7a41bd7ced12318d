"""Compile what real launches of every operator come to, without a GPU.

The driver is a stand-in that names an architecture; kernels are specialised to their arguments and compiled,
and not run. For a process whose kernels are not interpreted.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from tfmq.kernels.gpu import multiply, norms, quantize
from tfmq.kernels.gpu.tiles import Tile

TILE = Tile(16, 32, 64, 4, 2)


class StandIn:
    """What a launch asks of a driver before it compiles."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compiled_only(self: Any, grid: Any) -> Callable[..., Any]:
    """Stand for `kernel[grid]`."""
    return lambda *arguments, **options: self.warmup(*arguments, grid=grid, **options)


def grid(segments: tuple[int, ...] = ()) -> tuple[Any, ...]:
    groups = max(1, len(segments))
    return (
        torch.rand(3, groups),
        torch.zeros(3, groups, dtype=torch.uint8),
        torch.zeros(1, dtype=torch.int64),
        segments,
    )


def codes(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int8)


def weight(*shape: int, groups: int = 1, nibbles: bool = False) -> tuple[Any, ...]:
    rows = shape[0]
    zero = torch.zeros(rows, groups, dtype=torch.int8) if nibbles else None
    return (
        codes(*shape).view(torch.uint8 if nibbles else torch.int8),
        zero,
        torch.rand(rows, groups),
        torch.zeros(rows, groups, dtype=torch.int32),
        None,
    )


def launches() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield launches with as many sizes of one as there can be, and some with none."""
    for rows, channels, columns in ((1, 64, 32), (1, 1, 1), (7, 64, 32)):
        given, one = codes(rows, channels), weight(columns, channels)
        yield (
            f"linear {rows} {channels}",
            lambda g=given, w=one: multiply.linear_codes(
                g, *grid(), *w, "silu", None, torch.bfloat16, tile=TILE
            ),
        )
    split = weight(32, 33, groups=2, nibbles=True)
    yield (
        "linear split",
        lambda: multiply.linear_codes(
            codes(1, 64), *grid((63, 1)), *split, "", None, torch.float32, tile=TILE
        ),
    )
    only = (split[0], split[1], split[2], None)
    yield (
        "weight-only",
        lambda: multiply.linear_weight_only(
            torch.zeros(1, 64, dtype=torch.bfloat16), (63, 1), *only, tile=TILE
        ),
    )
    for shape, window, stride in (((1, 1, 1, 1), 1, 2), ((1, 3, 3, 32), 3, 1), ((2, 8, 8, 32), 3, 2)):
        given, one = codes(*shape), weight(16, window, window, shape[-1])
        end = ((stride, stride), (1, 1), "", None, torch.float16)
        yield (
            f"convolution {shape}",
            lambda g=given, w=one, e=end: multiply.convolution_codes(g, *grid(), *w, *e, tile=TILE),
        )
    for shape in ((1, 1, 1, 1), (1, 16, 16, 1), (2, 8, 8, 32)):
        x, ones, tokens = torch.rand(shape), torch.ones(shape[-1]), torch.rand(1, 1, shape[-1])
        for padding in ((), (1, 1, 1, 1)):
            yield (
                f"quantize {shape} {padding}",
                lambda x=x, p=padding: quantize.quantize_codes(x, *grid(), 256, p),
            )
            yield (
                f"group norm {shape} {padding}",
                lambda x=x, w=ones, p=padding: norms.group_norm_codes(
                    x, 1, w, w, 1e-5, "silu", *grid(), 256, p
                ),
            )
        yield (
            f"layer norm {shape}",
            lambda x=tokens, w=ones: norms.layer_norm_codes(x, w, w, 1e-5, w[None], w[None], *grid(), 256),
        )
        yield f"tokens {shape}", lambda x=tokens: quantize.quantize_tokens(x)


def failures(capability: int) -> dict[str, str]:
    """Return what the launches say that fail, by name. Nothing can be launched in this process any more."""
    driver.set_active(StandIn(capability))
    JITFunction.__getitem__ = compiled_only
    failed = {}
    for name, launch in launches():
        try:
            launch()
        except Exception as error:  # Whatever the compiler raises is the result.
            failed[name] = f"{type(error).__name__}: {str(error)[-400:]}"
    return failed
