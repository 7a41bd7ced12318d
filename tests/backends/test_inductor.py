"""Rewrites for torch's compiler: each leaves what a graph computes as it is, and takes nothing that it does
not know.
"""

from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code
from torch.fx import GraphModule

from tfmq.backends.inductor import rewrite, stored, teach_stored
from tfmq.export.quiet import quiet_tools

BINS = torch.tensor([2, 0])


class Block(nn.Module):
    """A residual with look-ups of each dtype, a normalisation of a concatenation, and a constant made from a
    table.
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.rand(3, 1) + 0.5)
        self.register_buffer("wide", torch.randn(3, 2, 4))
        self.register_buffer("codes", torch.randint(0, 255, (3, 4)).to(torch.uint8))
        self.inner = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.GroupNorm(4, 8)
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)

    def forward(self, bins: Tensor, x: Tensor) -> Tensor:
        y = (self.inner(x) * self.scale[bins][..., None, None] + x) / 2
        y = y * self.wide[bins][:, 1, :, None, None] - self.codes[bins].float()[..., None, None] / 255
        return F.silu(self.norm(torch.cat([y, x * self.scale.reciprocal()[bins][..., None, None]], dim=1)))


def captured(module: nn.Module, *inputs: Tensor) -> tuple[GraphModule, Tensor]:
    """The program of a module, and what it computes before anything is rewritten."""
    program = torch.export.export(module, inputs).module()
    assert isinstance(program, GraphModule)
    return program, program(*inputs)


def counts(program: GraphModule) -> Counter[str]:
    return Counter(
        str(node.target).split(".")[1]
        for node in program.graph.nodes
        if node.op == "call_function" and "." in str(node.target)
    )


@torch.no_grad()
def test_a_rewritten_program_computes_the_same() -> None:
    inputs = BINS, torch.randn(2, 4, 6, 5)
    program, expected = captured(Block(), *inputs)
    rewrite(program)
    torch.testing.assert_close(program(*inputs), expected, rtol=1e-5, atol=1e-5)
    found = counts(program)
    assert found["group_norm"] == 0
    assert found["index"] == 2, "one look-up for float32, one for uint8"


@torch.no_grad()
@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_a_spread_normalisation_is_near_that_of_float64(offset: float) -> None:
    norm, x = nn.GroupNorm(4, 16, eps=1e-6), torch.randn(2, 16, 7, 9) + offset
    nn.init.normal_(norm.weight)
    program, _ = captured(norm, x)
    rewrite(program)
    exact = F.group_norm(x.double(), 4, norm.weight.double(), norm.bias.double(), 1e-6)
    # A few roundings, of 6e-8 each, of squares that are as many times the variance as the mean is deviations,
    # squared.
    tolerance = 1e-5 + 4 * 6e-8 * offset**2
    torch.testing.assert_close(program(x).double(), exact, rtol=tolerance, atol=tolerance)


@torch.no_grad()
@pytest.mark.parametrize(
    ("module", "x", "kept"),
    [
        (nn.GroupNorm(2, 4), torch.randn(2, 4, 6), "group_norm"),
        (nn.GroupNorm(2, 4, affine=False), torch.randn(2, 4, 3, 3), "group_norm"),
        (nn.GroupNorm(2, 4).bfloat16(), torch.randn(2, 4, 3, 3).bfloat16(), "group_norm"),
    ],
)
def test_other_normalisations_stay(module: nn.Module, x: Tensor, kept: str) -> None:
    program, expected = captured(module, x)
    rewrite(program)
    assert counts(program)[kept] == 1 and torch.equal(program(x), expected)


class Mutated(nn.Module):
    """A part of a concatenation is a view of what changes afterwards; a table is read at an index that is no
    input.
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.randn(3, 4))

    def forward(self, bins: Tensor, x: Tensor) -> Tensor:
        held = x * 2
        view = held.view(held.shape)
        held.add_(1.0)
        return torch.cat([view, held], dim=1) * self.table[bins + 0].repeat(1, 2)[..., None, None]


@torch.no_grad()
def test_views_and_computed_indices_stay() -> None:
    inputs = BINS, torch.randn(2, 4, 3, 3)
    program, expected = captured(Mutated(), *inputs)
    rewrite(program)
    assert torch.equal(program(*inputs), expected) and counts(program)["index"] == 1


@torch.no_grad()
def test_the_compiler_writes_what_is_stored_into_memory_itself_channels_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def between(x: Tensor) -> Tensor:
        return torch.cat([stored(x * 2 + 1), x], dim=1).flatten(2) @ x.flatten(2).mT

    x = torch.randn(2, 4, 3, 5)
    # The compiler's cache knows a program by its operators, not by what becomes of them.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    with quiet_tools():
        teach_stored()
        made, (code,) = run_and_get_code(torch.compile(between), x)
    torch.testing.assert_close(made, torch.cat([x * 2 + 1, x], dim=1).flatten(2) @ x.flatten(2).mT)
    assert "ops.tfmq.stored" not in code
    # The strides of a tensor in between, whose layout nobody outside asks for.
    assert "(60, 1, 20, 4)" in code
