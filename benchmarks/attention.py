"""How long attention on grids takes a block of queries at a time, and with all of its scores in memory.

    python benchmarks/attention.py --rounds 7

One thread; eager torch, 8 bits for all four operands, in floating point as calibration and the backend
`simulated` compute. Both forms take turns; medians.
"""

import argparse
import statistics
import time
from unittest import mock

import torch

from tfmq.evaluation.cost.system import describe_machine, machine_in_words
from tfmq.nn import products
from tfmq.nn.products import ProductQuantizers
from tfmq.numerics.attention import Attention
from tfmq.numerics.grids import IntegerFormat
from tfmq.quantizers.activation import ActivationQuantizer

# Heads, queries and keys, channels of a head: Stable Diffusion 1.5 at 512 and at 768 pixels, XL at 1024.
SHAPES = ((8, 4096, 40), (8, 9216, 40), (10, 4096, 64))


def grid(step: float, zero_point: int) -> ActivationQuantizer:
    quantizer = ActivationQuantizer(IntegerFormat(8))
    quantizer.fit(torch.full((1, 1), step), torch.full((1, 1), float(zero_point)))
    return quantizer


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    print(machine_in_words(describe_machine(1)))
    print("| heads | queries | channels | whole s | blocks, of whole | same bits |")
    print("|---" * 6 + "|")
    for heads, queries, channels in SHAPES:
        call = Attention.of(*(torch.randn(1, heads, queries, channels) for _ in range(3)))
        # Probabilities of so many keys are small.
        owner = ProductQuantizers([grid(0.03, 128), grid(0.01 / 255, 0)], [grid(0.03, 128), grid(0.03, 128)])
        times: dict[int, list[float]] = {call.scores: [], 0: []}
        found = {}
        for number in range(rounds + 1):
            for whole, taken in times.items():
                with mock.patch.object(products, "WHOLE", whole):
                    began = time.perf_counter()
                    found[whole] = owner.attend(0, call)
                if number:
                    taken.append(time.perf_counter() - began)
        whole_s, blocks_s = (statistics.median(taken) for taken in times.values())
        same = "yes" if torch.equal(*found.values()) else "no"
        print(f"| {heads} | {queries} | {channels} | {whole_s:.2f} | {blocks_s / whole_s:.2f} | {same} |")


if __name__ == "__main__":
    main()
