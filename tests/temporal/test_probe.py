from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tfmq.models.denoiser import Denoiser, Inputs
from tfmq.temporal.probe import ProbeError, layer_outputs, probe


@pytest.mark.parametrize(
    "name", ["unet", "own_attention", "conditional", "class_conditional", "sdxl", "dit", "sd3", "plain"]
)
def test_the_traced_structure_of_every_model_holds_on_its_weights(
    build: Callable[..., Any], name: str
) -> None:
    denoiser, example = build(name)
    assert probe(denoiser, example, batch=4).features


class Tricky(nn.Module):
    """`embed(model, x, t)` gives what the temporal layer `proj` reads."""

    def __init__(self, embed: Callable[["Tricky", Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.embed = embed
        self.register_buffer("frequencies", torch.tensor([1.0, 0.3, 0.1, 0.03]))
        self.proj, self.exit = nn.Linear(4, 3), nn.Conv2d(3, 3, 1)

    def sinusoid(self, t: Tensor) -> Tensor:
        return torch.sin(t[:, None] * self.frequencies)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.exit(x + self.proj(self.embed(self, x, t))[:, :, None, None])


def written_in_place(model: Tricky, x: Tensor, t: Tensor) -> Tensor:
    embedding = torch.zeros(len(t), 4)
    embedding[:, 0::2] = torch.sin(t[:, None] * model.frequencies[:2])
    embedding[:, 1::2] = torch.cos(t[:, None] * model.frequencies[:2])
    return embedding


CASES: dict[str, tuple[Callable[[Tricky, Tensor, Tensor], Tensor], str]] = {
    "a number": (
        lambda m, x, t: (float(t[0]) * m.frequencies).sin().expand(len(t), -1),
        "proj changes with the timestep",
    ),
    "item": (lambda m, x, t: torch.full((len(t), 4), t[0].item() / 500), "proj changes with the timestep"),
    "writing in place": (written_in_place, "proj changes with the timestep"),
    "a statistic of the sample": (
        lambda m, x, t: m.sinusoid(t) * x.abs().sum().item(),
        "proj .* independent of the sample",
    ),
    "a branch on the timestep": (
        lambda m, x, t: m.sinusoid(t) * (3 if t.max() > 100 else 1),
        "proj does not give what the model computes",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_a_trace_cannot_see_is_refused_by_the_name_of_the_layer(case: str) -> None:
    embed, message = CASES[case]
    with pytest.raises(ProbeError, match=message):
        probe(Denoiser(Tricky(embed)), Inputs(torch.randn(1, 3, 4, 4), torch.tensor([5])), batch=4)


def test_the_same_model_with_a_tensor_timestep_passes() -> None:
    block = probe(
        Denoiser(Tricky(lambda m, x, t: m.sinusoid(t))),
        Inputs(torch.randn(1, 3, 4, 4), torch.tensor([5])),
        batch=4,
    )
    assert block.features == ("proj",)


def test_weights_that_are_not_numbers_are_no_false_structure() -> None:
    model = Tricky(lambda m, x, t: m.sinusoid(t)).requires_grad_(False)
    model.proj.weight[0, 0] = torch.nan
    assert probe(Denoiser(model), Inputs(torch.randn(1, 3, 4, 4), torch.tensor([5])), batch=4).features == (
        "proj",
    )


def test_probing_leaves_no_hooks() -> None:
    model = Tricky(lambda m, x, t: m.sinusoid(t))
    probe(Denoiser(model), Inputs(torch.randn(1, 3, 4, 4), torch.tensor([5])), batch=4)
    assert not any(child._forward_hooks or child._forward_pre_hooks for child in model.modules())


def test_layer_outputs_are_collected_while_the_context_is_open() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    x = torch.randn(1, 2)
    with layer_outputs(model, ["0"]) as outputs:
        model(torch.zeros(1, 2))
        model(x)
    model(torch.ones(1, 2))
    assert set(outputs) == {"0"} and torch.equal(outputs["0"], model[0](x)) and not outputs["0"].requires_grad
