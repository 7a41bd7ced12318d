"""What integers bring on this processor, by the bits of weights: linear layers and convolutions in floating
point, with weights of four and of eight bits.

    python benchmarks/halves.py

Where the processor has no VNNI, weights of eight bits are computed in halves (tfmq.kernels.halves). Times of
the torch backend's kernel as multiples of float32's, the three interleaved, medians of `--rounds`; quantizing
the input is included.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from tfmq.evaluation.cost.system import describe_machine
from tfmq.kernels.halves import saturates
from tfmq.kernels.kernel import IntegerWeight, Rows
from tfmq.kernels.onednn import OnednnKernel
from tfmq.nn.operation import operation_of

# Name, layer and size of its input: shapes of Stable Diffusion 1.5's UNet and of a small DiT.
LAYERS: tuple[tuple[str, Callable[[], nn.Module], tuple[int, ...]], ...] = (
    ("linear 320 to 320, 4096 tokens", lambda: nn.Linear(320, 320), (1, 4096, 320)),
    ("linear 320 to 1280, 4096 tokens", lambda: nn.Linear(320, 1280), (1, 4096, 320)),
    ("linear 384 to 1536, 64 tokens", lambda: nn.Linear(384, 1536), (1, 64, 384)),
    ("convolution 320, 64x64", lambda: nn.Conv2d(320, 320, 3, padding=1), (1, 320, 64, 64)),
    ("convolution 640, 32x32", lambda: nn.Conv2d(640, 640, 3, padding=1), (1, 640, 32, 32)),
    ("convolution 64, 32x32", lambda: nn.Conv2d(64, 64, 3, padding=1), (1, 64, 32, 32)),
)


def kernel(layer: nn.Module, bits: int) -> OnednnKernel:
    """Return the kernel of a layer with random weights of these bits."""
    operation, reach = operation_of(layer), 2 ** (bits - 1)
    assert operation is not None
    shape = operation.rows(layer.get_parameter("weight")).shape
    values = torch.randint(-reach, reach, shape).to(torch.int16)
    return OnednnKernel(IntegerWeight(operation, values, torch.rand(shape[0], 1), torch.zeros(shape[0])))


@torch.inference_mode()
def main() -> None:
    """Print a line for each layer."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(describe_machine(options.threads))
    print(f"weights of eight bits: {'in halves' if saturates() else 'whole'}")
    print("| layer | float32 ms | W4A8 | W8A8 |\n|---|---|---|---|")
    for name, make, size in LAYERS:
        layer, x = make(), torch.randn(size)
        if x.ndim == 4:
            x, layer = x.to(memory_format=torch.channels_last), layer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        rows = Rows(torch.full((1, 1), 0.03), torch.full((1, 1), 128, dtype=torch.uint8), 256)
        quantized = [partial(kernel(layer, bits), x, rows) for bits in (4, 8)]
        times = medians([partial(layer, x), *quantized], options.rounds)
        print(f"| {name} | {1e3 * times[0]:.2f} | {times[1] / times[0]:.2f} | {times[2] / times[0]:.2f} |")


def medians(ways: Sequence[Callable[[], Tensor]], rounds: int) -> list[float]:
    """Return the median seconds of each way, interleaved, after one call of each."""
    seconds: list[list[float]] = [[] for _ in ways]
    for turn in range(rounds + 1):
        for way, own in zip(ways, seconds, strict=True):
            began = time.perf_counter()
            way()
            if turn:
                own.append(time.perf_counter() - began)
    return [statistics.median(own) for own in seconds]


if __name__ == "__main__":
    main()
