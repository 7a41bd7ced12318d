"""How near a step comes to what the machine can do: operations of a step, and the rate of matrix products in
float32 and in int8.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from tfmq.kernels.onednn import available
from tfmq.models.denoiser import Denoiser, Inputs
from tfmq.stopwatch import call_seconds

# Rows and columns of the matrices that are multiplied.
SIDE = 1536
# Number of timed products. The fastest one counts.
REPEATS = 12


@dataclass(frozen=True)
class Ceilings:
    """Operations a second (a multiplication and its addition are two) of one large matrix product by torch's
    own kernels, the best of some.
    """

    fp32: float
    int8: float | None


@torch.no_grad()
def operations(denoiser: Denoiser, call: Inputs) -> int:
    """Return the multiplications and additions of one call: those of products and convolutions, counted by
    torch.
    """
    with FlopCounterMode(display=False) as counter:
        denoiser(call)
    return int(counter.get_total_flops())


def _rate(product: Callable[[], object], side: int) -> float:
    return 2 * side**3 / min(call_seconds(product) for _ in range(REPEATS))


@torch.no_grad()
def ceilings(side: int = SIDE) -> Ceilings:
    """Measure products of `side x side` matrices; the int8 one takes u8 by s8 and writes float32, as
    quantized layers do.
    """
    left, right = torch.rand(side, side), torch.rand(side, side)
    full = _rate(lambda: left @ right, side)
    if not available():
        return Ceilings(full, None)
    codes, weight = (255 * left).to(torch.uint8), (127 * right).to(torch.int8)
    packed = torch.ops.onednn.qlinear_prepack(weight, None)
    scale, zero = torch.ones(side), torch.zeros(side, dtype=torch.int32)

    def product() -> torch.Tensor:
        output: torch.Tensor = torch.ops.onednn.qlinear_pointwise(
            codes, 1.0, 0, packed, scale, zero, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return output

    return Ceilings(full, _rate(product, side))
