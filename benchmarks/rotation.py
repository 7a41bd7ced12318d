"""How long a rotation takes as a product with its matrix, and as sums and differences along axes of four.

    python benchmarks/rotation.py --rounds 30

One thread; eager torch, and OpenVINO where it is installed. Both forms take turns; medians.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from tfmq.evaluation.cost.system import describe_machine, machine_in_words
from tfmq.numerics.rotation import ORDER, rotate

# Tokens, channels, and channels of a group.
SHAPES = ((64, 256, 256), (256, 384, 64), (256, 1280, 256), (4096, 320, 64), (1024, 640, 64))


def fast(x: Tensor, size: int) -> Tensor:
    """Return what `rotate` returns, by a sum and a difference along each of `log4 size` axes."""
    axes = (size.bit_length() - 1) // 2
    grouped = x.unflatten(-1, (-1, *[ORDER] * axes))
    for axis in range(1, axes + 1):
        grouped = grouped.sum(dim=-axis, keepdim=True) / 2 - grouped.flip(-axis)
    return grouped.flatten(-axes - 1)


class Rotation(nn.Module):
    def __init__(self, form: Callable[[Tensor, int], Tensor], size: int) -> None:
        super().__init__()
        self.form, self.size = form, size

    def forward(self, x: Tensor) -> Tensor:
        return self.form(x, self.size)


def runners(x: Tensor, size: int) -> Iterator[tuple[str, str, Callable[[], object]]]:
    """Yield engine, form and a call of it."""
    for name, form in (("product", rotate), ("sums", fast)):
        module = Rotation(form, size)
        torch.testing.assert_close(module(x), rotate(x, size), rtol=1e-4, atol=1e-4)
        yield "torch", name, lambda module=module: module(x)  # type: ignore[misc]
        if find_spec("openvino"):
            import openvino

            model = openvino.convert_model(module, example_input=x)
            request = openvino.compile_model(
                model, "CPU", {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
            ).create_infer_request()
            yield "openvino", name, lambda request=request: request.infer([x.numpy()])  # type: ignore[misc]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    print(machine_in_words(describe_machine(1)))
    print("| tokens | channels | group | engine | product ms | of the sums |\n|---|---|---|---|---|---|")
    for tokens, channels, size in SHAPES:
        calls = list(runners(torch.randn(1, tokens, channels), size))
        times: dict[tuple[str, str], list[float]] = {(engine, name): [] for engine, name, _ in calls}
        for number in range(rounds + 2):
            for engine, name, call in calls:
                began = time.perf_counter()
                call()
                if number >= 2:
                    times[engine, name].append(1e3 * (time.perf_counter() - began))
        for engine in dict.fromkeys(engine for engine, _ in times):
            product, sums = (statistics.median(times[engine, name]) for name in ("product", "sums"))
            print(f"| {tokens} | {channels} | {size} | {engine} | {product:.2f} | {product / sums:.2f} |")


if __name__ == "__main__":
    main()
