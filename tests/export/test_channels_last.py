"""Rewritten OpenVINO models compute what they did, without the nodes that were to go."""

import warnings
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

ov = pytest.importorskip("openvino")

from tfmq.export.channels_last import rewrite  # noqa: E402
from tfmq.export.quiet import quiet_tools  # noqa: E402


class Norms(nn.Module):
    """Group normalisations of an input each as the model that is converted: groups, channels, and whether
    there are weights.
    """

    def __init__(self, *sizes: tuple[int, int, bool]) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(*size, affine=affine) for *size, affine in sizes)
        for parameter in self.norms.parameters():
            nn.init.normal_(parameter)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(norm(x) * 1.0 for norm, x in zip(self.norms, inputs, strict=True))


def converted(module: nn.Module, *inputs: Tensor) -> Any:
    with quiet_tools(), warnings.catch_warnings():
        # torch's check of a normalisation's shape is a branch, which does not go into the graph.
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        model = ov.convert_model(torch.jit.trace(module.eval(), inputs))
    model.reshape({index: [-1, *tensor.shape[1:]] for index, tensor in enumerate(inputs)})
    return model


def kinds(model: Any) -> Counter[str]:
    return Counter(node.get_type_name() for node in model.get_ops())


def computed(model: Any, *inputs: Tensor) -> list[Tensor]:
    compiled = ov.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return [
        torch.from_numpy(value.copy()) for value in compiled([tensor.numpy() for tensor in inputs]).values()
    ]


CASES = 4


@settings(max_examples=2)
@given(st.data())
def test_a_group_normalisation_is_torchs(data: st.DataObject) -> None:
    """Several at once, since a model takes long to be compiled."""
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    sizes, inputs = [], []
    for _ in range(CASES):
        groups, each = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5))
        shape = (
            data.draw(st.integers(1, 3)),
            groups * each,
            data.draw(st.integers(2, 7)),
            data.draw(st.integers(1, 9)),
        )
        offset, spread = data.draw(st.sampled_from([(0.0, 1.0), (10.0, 1.0), (-0.1, 1e-2), (0.0, 1e3)]))
        sizes.append((groups, groups * each, data.draw(st.booleans())))
        inputs.append(torch.randn(shape) * spread + offset)
    module = Norms(*sizes)
    model = converted(module, *inputs)
    rewrite(model)
    assert not kinds(model)["GroupNormalization"] and kinds(model)["ReduceMean"] == 2 * CASES
    found, wide = computed(model, *inputs), [x.double() for x in inputs]
    for norm, x, y, exact in zip(module.norms, wide, found, module.double()(*wide), strict=True):
        parts = x.reshape(x.shape[0], norm.num_groups, -1)
        deviation = (
            (parts.var(dim=-1, correction=0) + norm.eps)
            .sqrt()
            .repeat_interleave(norm.num_channels // norm.num_groups, dim=1)[..., None, None]
        )
        ratio = 1 + (x.mean(dim=(2, 3), keepdim=True) / deviation).square().amax()
        gain = 1.0 if norm.weight is None else norm.weight.detach().abs()[:, None, None]
        # What the docstring states, of the terms that are added.
        bound = 1e-6 * ratio * (2 * x.abs().amax() * gain / deviation + exact.abs() + 1)
        assert bool(((y - exact).abs() <= bound).all())


def test_a_group_normalisation_of_tokens_stays() -> None:
    model = converted(Norms((2, 4, True)), torch.randn(2, 4, 6))
    before = kinds(model)
    rewrite(model)
    assert kinds(model) == before and before["GroupNormalization"] == 1


class Split(nn.Module):
    """Splits a concatenation at `widths` and squares one part."""

    def __init__(self, widths: tuple[int, ...], axis: int = 1) -> None:
        super().__init__()
        self.widths, self.axis = widths, axis

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        whole = torch.cat([a, b], dim=1)
        first, *_, last = whole.split(self.widths, dim=self.axis)
        return whole.sum(dim=(2, 3)) + first.square().sum(), last.exp()


@pytest.mark.parametrize(
    ("widths", "axis", "left"),
    [((3, 5), 1, 0), ((5, 3), 1, 1), ((3, 2, 3), 1, 1), ((3, 5), 2, 1), ((3, 5), -3, 0)],
)
def test_a_concatenation_is_split_where_it_was_not_joined_alone(
    widths: tuple[int, ...], axis: int, left: int
) -> None:
    module, a, b = Split(widths, axis), torch.randn(2, 3, 8, 4), torch.randn(2, 5, 8, 4)
    model = converted(module, a, b)
    rewrite(model)
    assert kinds(model)["VariadicSplit"] == left
    for through, expected in zip(computed(model, a, b), module(a, b), strict=True):
        torch.testing.assert_close(through, expected)


class Tables(nn.Module):
    """Look-ups in tables of several shapes and types, at two indices."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scalars", torch.rand(7))
        self.register_buffer("rows", torch.rand(7, 3))
        self.register_buffer("codes", torch.randint(0, 255, (7, 2, 2), dtype=torch.uint8))
        self.register_buffer("short", torch.rand(4, 3))

    def forward(self, index: Tensor, other: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        wide = self.scalars[index][:, None] * self.rows[index] + x
        return wide, self.codes[index].float(), self.short[other] + self.rows[other], x[:, index]


def test_tables_that_are_read_at_one_index_are_read_at_once() -> None:
    module = Tables()
    index, other, x = torch.tensor([1, 6, 0]), torch.tensor([3, 1, 2]), torch.randn(3, 7)[:, :3].contiguous()
    inputs = index.clamp(max=2), other, x
    model = converted(module, *inputs)
    before = kinds(model)["Gather"]
    rewrite(model)
    # The two float tables at `index` become one; the codes, and the tables at `other` of different lengths,
    # keep their own.
    assert kinds(model)["Gather"] == before - 1
    for through, expected in zip(computed(model, *inputs), module(*inputs), strict=True):
        torch.testing.assert_close(through, expected)
    assert np.isfinite(computed(model, *inputs)[0].numpy()).all()
