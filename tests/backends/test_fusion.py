"""Rewrites of a captured graph: what they must do, and what they must leave alone."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tfmq.backends.fusion import fused
from tfmq.kernels.operators.multiply import linear_codes
from tfmq.kernels.operators.quantize import quantize_codes


class Layer(nn.Module):
    """A quantizer and a product as a model has them, with something in front of, behind or between them."""

    def __init__(self, around: Any) -> None:
        super().__init__()
        self.around = around
        for name, scale in (("scale", 0.05), ("same", 0.05), ("other", 0.07)):
            self.register_buffer(name, torch.full((1, 1), scale))
        self.register_buffer("zero", torch.full((1, 1), 120, dtype=torch.uint8))
        self.register_buffer("index", torch.zeros(1, dtype=torch.int64))
        self.register_buffer("weight", torch.randint(-128, 128, (8, 8)).to(torch.int8))
        self.register_buffer("sums", self.weight.sum(dim=1, dtype=torch.int32)[:, None])
        self.register_buffer("factors", torch.rand(8, 1) / 50)

    def codes(self, x: Tensor, table: Tensor | None = None) -> Tensor:
        return quantize_codes(x, self.scale if table is None else table, self.zero, self.index, [], 256, [])

    def product(self, codes: Tensor) -> Tensor:
        grid = (self.scale, self.zero, self.index, [])
        return linear_codes(
            codes, *grid, self.weight, None, self.factors, self.sums, None, "", None, torch.float32
        )

    def forward(self, x: Tensor) -> Any:
        return self.around(self, x)


def normalised_then_mutated(layer: Layer, x: Tensor) -> tuple[Tensor, Tensor]:
    held = x.clone()
    normed = F.layer_norm(held, (8,))
    held.mul_(torch.linspace(0, 1, 8))
    return layer.codes(normed), held


def read_before_and_after(layer: Layer, x: Tensor) -> tuple[Tensor, Tensor]:
    held = x.clone()
    first = layer.codes(held)
    held.add_(1.0)
    return first, layer.codes(held)


def residual_of_two_readers(layer: Layer, x: Tensor) -> tuple[Tensor, Tensor]:
    y = layer.product(layer.codes(x))
    return y + x, y * 2


CASES: dict[str, tuple[Any, dict[str, int]]] = {
    "equal grids are one": (
        lambda m, x: (m.product(m.codes(x)), m.product(m.codes(x, m.same))),
        {"quantize_codes": 1},
    ),
    "other grids are not": (
        lambda m, x: (m.product(m.codes(x)), m.product(m.codes(x, m.other))),
        {"quantize_codes": 2},
    ),
    "a norm writes codes": (
        lambda m, x: m.codes(F.layer_norm(x, (8,))),
        {"layer_norm_codes": 1, "layer_norm": 0},
    ),
    "a norm with another reader stays": (
        lambda m, x: [n := F.layer_norm(x, (8,)), m.codes(n)],
        {"layer_norm_codes": 0, "layer_norm": 1},
    ),
    "modulation": (
        lambda m, x: m.codes(F.layer_norm(x, (8,)) * (1 + x[:, :1]) + x[:, 1:2]),
        {"layer_norm_codes": 1, "mul": 0},
    ),
    "an activation and a residual": (
        lambda m, x: F.gelu(m.product(m.codes(x)), approximate="tanh") + x,
        {"gelu": 0, "add": 0},
    ),
    "an activation behind a residual stays": (
        lambda m, x: F.silu(m.product(m.codes(x)) + x),
        {"silu": 1, "add": 0},
    ),
    "a residual that is broadcast stays": (lambda m, x: m.product(m.codes(x)) + x[:, :1], {"add": 1}),
    "twice itself stays": (lambda m, x: [y := m.product(m.codes(x)), y + y][1], {"add": 1}),
    "a product with two readers keeps its own output": (residual_of_two_readers, {"add": 1}),
    "what is written to after it was normalised": (normalised_then_mutated, {}),
    "what is written to between two readers": (read_before_and_after, {"quantize_codes": 2}),
}


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_a_rewrite_does_what_it_says_and_changes_no_bit(name: str) -> None:
    around, counts = CASES[name]
    module, x = Layer(around), torch.randn(2, 3, 8)
    expected = module(x)
    program = fused(torch.export.export(module, (x,), strict=False))
    kinds = [str(node.target).split(".")[1] for node in program.graph.nodes if node.op == "call_function"]
    assert {kind: kinds.count(kind) for kind in counts} == counts
    torch.testing.assert_close(program(x), expected, rtol=0, atol=0)
