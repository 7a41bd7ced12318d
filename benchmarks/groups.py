"""What groups of a weight's inputs cost an engine: one linear layer with a scale a row, with groups whose
steps are multiples of it, and with groups that have scales of their own and take a product each.

    python benchmarks/groups.py --backends openvino,torch --inputs static,dynamic

Prints milliseconds a layer of a stack of them and the ratio to a scale a row. The variants take turns, on the
same inputs. `partial` is what a kernel without the multiples has to do: its groups are segments of the input
too, whose integer sums are scaled and added.
"""

import argparse
import copy

import torch
from torch import Tensor, nn

from tfmq.backends.execution import execute
from tfmq.evaluation.cost.system import foreign_seconds
from tfmq.evaluation.cost.timing import interleaved, timed
from tfmq.nn.plan import Plan, activation_sites, pack_all, packed_layers, prepare
from tfmq.nn.scheme import ActivationScheme, LayerScheme, Tokens, WeightScheme
from tfmq.numerics.grids import IntegerFormat
from tfmq.quantizers.steps import StepContext

LAYERS = 8
SECONDS = 0.3


class Stack(nn.Module):
    """Linear layers, one after the other."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(LAYERS))

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """Return the output of the last layer; each is normalised, so that all read the same range."""
        for layer in self.layers:
            sample = nn.functional.layer_norm(layer(sample), sample.shape[-1:])
        return sample


def quantized(module: nn.Module, tokens: Tokens, *, group: int, pieces: int) -> nn.Module:
    """Return a packed copy of W4A8 with groups of the weight, and its input in so many pieces."""
    width = module.layers[0].in_features
    segments = (width // pieces,) * pieces if pieces else ()
    scheme = LayerScheme(
        weight=WeightScheme(grid=IntegerFormat(4), ranges="min_max", segments=segments, group=group),
        input=ActivationScheme(grid=IntegerFormat(8), ranges="min_max", segments=segments, tokens=tokens),
    )
    made = copy.deepcopy(module)
    plan = Plan({f"layers.{number}": scheme for number in range(LAYERS)}, {})
    prepare(made, plan, StepContext(torch.zeros(1)), timestep="timestep")
    for site in activation_sites(made).values():
        site.fit(torch.full_like(site.scale, 8 / 255), torch.full_like(site.scale, 128.0))
    pack_all(made)
    assert all(layer.group == group for layer in packed_layers(made).values())
    return made.eval()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--groups", default="128,64,32", help="sizes of groups")
    parser.add_argument("--backends", default="openvino,torch")
    parser.add_argument("--inputs", default="static,dynamic")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.manual_seed(0)
    stock = Stack(options.width).requires_grad_(False)
    x, timestep = torch.randn(1, options.tokens, options.width), torch.zeros(1)
    sizes = [int(size) for size in options.groups.split(",")]
    shapes = {"row": (0, 0)}
    shapes |= {f"group {size}": (size, 0) for size in sizes}
    shapes |= {f"partial {size}": (0, options.width // size) for size in sizes[:1]}
    print(f"{options.width} x {options.width}, {options.tokens} tokens, {torch.get_num_threads()} threads")
    for backend in options.backends.split(","):
        for tokens in options.inputs.split(","):
            models = {
                name: quantized(stock, tokens, group=group, pieces=pieces)
                for name, (group, pieces) in shapes.items()
            }
            for model in models.values():
                execute(model, backend)
                model(x, timestep)
            found = interleaved(
                {
                    name: lambda model=model: timed(
                        lambda: model(x, timestep), seconds=SECONDS, busy=foreign_seconds
                    )
                    for name, model in models.items()
                },
                rounds=options.rounds,
                advance=lambda amount=1: None,
            )
            for name, timing in found.items():
                ms = 1e3 * timing.seconds / LAYERS
                ratio = timing.seconds / found["row"].seconds
                note = "" if timing.clean else " (others used the machine)"
                print(f"{backend:9} {tokens:8} {name:12} {ms:8.3f} ms {ratio:6.2f}x{note}", flush=True)


if __name__ == "__main__":
    with torch.no_grad():
        main()
