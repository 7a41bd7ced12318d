"""How fast linear layers of INT8 ConvRot files are, in the shapes of FLUX and SDXL: tfmq's `torch` and
`openvino` beside float32 and beside comfy-kitchen's own path on a CPU.

    pip install comfy-kitchen
    python benchmarks/comfy_layers.py --rounds 5

Weights are random, quantized and rotated by comfy-kitchen; each engine is given the same codes.
comfy-kitchen computes once, the others take turns, medians. Quantizing and rotating the input is included.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tfmq.backends.execution import execute
from tfmq.evaluation.cost.system import describe_machine, machine_in_words
from tfmq.nn.packed_layer import PackedLayer
from tfmq.nn.swap import attach_steps
from tfmq.numerics.errors import sqnr_db
from tfmq.numerics.grids import IntegerFormat
from tfmq.numerics.operations import Linear
from tfmq.quantizers.dynamic import DynamicQuantizer
from tfmq.quantizers.steps import StepContext

# Name, inputs, outputs and tokens, of images of 512 x 512 and 1024 x 1024 pixels.
SHAPES = (
    ("FLUX, q of an image", 3072, 3072, 1024),
    ("FLUX, feed-forward in", 3072, 12288, 1024),
    ("FLUX, feed-forward out", 12288, 3072, 1024),
    ("SDXL, q at the middle", 1280, 1280, 1024),
    ("SDXL, feed-forward in", 1280, 10240, 1024),
    ("SDXL, feed-forward out", 5120, 1280, 1024),
)
GROUP = 256
BITS = IntegerFormat(8, symmetric=True)


class Alone(nn.Module):
    """A layer that is called as a denoiser is."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        output: Tensor = self.layer(sample)
        return output


def packed(codes: Tensor, scale: Tensor, bias: Tensor) -> PackedLayer:
    """Return tfmq's layer with these codes, for inputs of which groups are rotated."""
    layer = PackedLayer(
        Linear(),
        BITS,
        tuple(codes.shape),
        bias=torch.float32,
        input_quantizer=DynamicQuantizer(BITS),
        rotated=GROUP,
    )
    layer.packed.copy_((codes.short() + 128).to(torch.uint8))
    layer.scale.copy_(scale.reshape(-1, 1))
    assert layer.bias is not None
    layer.bias.copy_(bias)
    return layer


def contestants(weight: Tensor, bias: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return what computes the layer, by name."""
    # Here, so that --help does without it.
    import comfy_kitchen.tensor as kitchen

    codes, params = kitchen.TensorWiseINT8Layout.quantize(
        weight, per_channel=True, convrot=True, convrot_groupsize=GROUP
    )
    theirs = kitchen.QuantizedTensor(codes, "TensorWiseINT8Layout", params)
    found: dict[str, Callable[[Tensor], Tensor]] = {
        "float32": lambda x: F.linear(x, weight, bias),
        "comfy-kitchen": lambda x: F.linear(x, theirs, bias),
    }
    for backend in ("torch", "openvino"):
        module = Alone(packed(codes, params.scale, bias))
        attach_steps(module, StepContext(torch.zeros(1)), timestep=None)
        execute(module, backend)
        found[backend] = lambda x, module=module: module(x, torch.zeros(1))  # type: ignore[misc]
    return found


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(machine_in_words(describe_machine(options.threads)))
    print("| layer | tokens | float32 ms | comfy-kitchen | torch | openvino |\n|---|---|---|---|---|---|")
    for name, columns, rows, tokens in SHAPES:
        x = torch.randn(1, tokens, columns)
        engines = contestants(torch.randn(rows, columns) / columns**0.5, torch.randn(rows))
        # Once: where torch has no integer product for this processor it takes minutes.
        slow, began = engines.pop("comfy-kitchen"), time.perf_counter()
        expected = slow(x)
        kitchen = time.perf_counter() - began
        assert all(sqnr_db(expected, engines[each](x)) > 40 for each in ("torch", "openvino"))
        times: dict[str, list[float]] = {engine: [] for engine in engines}
        for _ in range(options.rounds):
            for engine, call in engines.items():
                began = time.perf_counter()
                call(x)
                times[engine].append(time.perf_counter() - began)
        full, *others = (statistics.median(values) for values in times.values())
        ratios = " | ".join(f"{other / full:.2f}" for other in (kitchen, *others))
        print(f"| {name} | {tokens} | {1e3 * full:.0f} | {ratios} |", flush=True)


if __name__ == "__main__":
    main()
