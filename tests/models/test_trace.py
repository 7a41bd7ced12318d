from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tfmq.models.denoiser import Denoiser, Inputs
from tfmq.models.program import Trace
from tfmq.models.trace import trace

T, SAMPLE = "timestep", "sample"
RESNETS = ["down_blocks.0.resnets.0", "down_blocks.1.resnets.0", "mid_block.resnets.0", "mid_block.resnets.1"]
RESNETS += [f"up_blocks.{block}.resnets.{number}" for block in (0, 1) for number in (0, 1)]
PROJECTIONS = [f"{name}.time_emb_proj" for name in RESNETS]
EMBEDDING = ["time_embedding.linear_1", "time_embedding.linear_2"]
ATTENTIONS = [
    "down_blocks.1.attentions.0",
    "mid_block.attentions.0",
    "up_blocks.0.attentions.0",
    "up_blocks.0.attentions.1",
]
CROSS = [f"{name}.transformer_blocks.0.{kind}" for name in ATTENTIONS for kind in ("attn1", "attn2")]
DIT_EMBEDDERS = [
    f"transformer_blocks.{block}.norm1.emb.timestep_embedder.linear_{number}"
    for block in (0, 1)
    for number in (1, 2)
]
SD3_TEXT = ["transformer_blocks.0.norm1.linear", "transformer_blocks.0.norm1_context.linear"]
SD3_TEXT += [
    "transformer_blocks.1.norm1.linear",
    "transformer_blocks.1.norm1_context.linear",
    "norm_out.linear",
]
SD3_EMBEDDER = [f"time_text_embed.timestep_embedder.linear_{number}" for number in (1, 2)]


def depending(names: list[str], *sources: str) -> dict[str, frozenset[str]]:
    return {name: frozenset({T, *sources}) for name in names}


# What each model's source says: which layers see the timestep and not the sample, what else they see, and
# which of them meet other data.
TEMPORAL: dict[str, dict[str, frozenset[str]]] = {
    "unet": depending([*EMBEDDING, *PROJECTIONS]),
    "own_attention": depending([*EMBEDDING, *PROJECTIONS]),
    "conditional": depending([*EMBEDDING, *PROJECTIONS]),
    "class_conditional": depending(EMBEDDING) | depending(PROJECTIONS, "class_labels"),
    "sdxl": depending(EMBEDDING) | depending(PROJECTIONS, "text_embeds", "time_ids"),
    "dit": depending(DIT_EMBEDDERS)
    | depending(
        ["transformer_blocks.0.norm1.linear", "transformer_blocks.1.norm1.linear", "proj_out_1"],
        "class_labels",
    ),
    "sd3": depending(SD3_EMBEDDER) | depending(SD3_TEXT, "pooled_projections"),
    "plain": depending(["embed", "stages.0.shift", "stages.1.shift"]),
}
FEATURES: dict[str, list[str]] = {
    "unet": PROJECTIONS,
    "own_attention": PROJECTIONS,
    "conditional": PROJECTIONS,
    "class_conditional": PROJECTIONS,
    # The sum with the added embedding is not finite: the last value that is, is h(t).
    "sdxl": ["time_embedding.linear_2", *PROJECTIONS],
    "dit": ["transformer_blocks.0.norm1.linear", "transformer_blocks.1.norm1.linear", "proj_out_1"],
    "sd3": ["time_text_embed.timestep_embedder.linear_2", *SD3_TEXT],
    "plain": ["stages.0.shift", "stages.1.shift"],
}
PRODUCTS: dict[str, dict[str, int]] = {
    "unet": dict.fromkeys(ATTENTIONS, 2),
    "own_attention": dict.fromkeys(ATTENTIONS, 2),
    "conditional": dict.fromkeys(CROSS, 2),
    "class_conditional": dict.fromkeys(CROSS, 2),
    "sdxl": dict.fromkeys(CROSS, 2),
    "dit": {"transformer_blocks.0.attn1": 2, "transformer_blocks.1.attn1": 2},
    "sd3": {"transformer_blocks.0.attn": 2, "transformer_blocks.1.attn": 2},
    "plain": {"": 2},
}
# (width of what comes up, width of the skip) at each residual block of the up path, down to the output of
# `conv_in`.
SKIPS = {
    "up_blocks.0.resnets.0": (16, 16),
    "up_blocks.0.resnets.1": (16, 8),
    "up_blocks.1.resnets.0": (16, 8),
    "up_blocks.1.resnets.1": (8, 8),
}
UNET_SEGMENTS = {
    f"{name}.{layer}": widths for name, widths in SKIPS.items() for layer in ("conv1", "conv_shortcut")
}
SEGMENTS = dict.fromkeys(
    ["unet", "own_attention", "conditional", "class_conditional", "sdxl"], UNET_SEGMENTS
) | {"plain": {"exit": (8, 8)}}
MODELS = list(TEMPORAL)


def check(name: str, found: Trace) -> None:
    assert {layer.name: layer.depends_on for layer in found.temporal} == TEMPORAL[name]
    assert list(found.features) == FEATURES[name]
    assert {layer.name for layer in found.temporal if layer.cacheable} == {
        key for key, sources in TEMPORAL[name].items() if sources == {T}
    }
    assert dict(found.products) == PRODUCTS[name]
    assert {layer.name: layer.segments for layer in found.layers if layer.segments} == SEGMENTS.get(name, {})
    # Behind the norm of a residual block a concatenation is no longer the tensor that was concatenated; its
    # shortcut and the plain model read that.
    assert {layer.name for layer in found.layers if layer.direct} == {
        key for key in SEGMENTS.get(name, {}) if not key.endswith("conv1")
    }


@pytest.mark.parametrize("name", MODELS)
def test_structure_of_every_model(build: Callable[..., Any], name: str) -> None:
    check(name, trace(*build(name)))


@pytest.mark.parametrize("name", MODELS)
def test_structure_needs_no_weights(build: Callable[..., Any], name: str) -> None:
    with torch.device("meta"):
        denoiser, example = build(name)
    if name == "dit":
        # Its positions are no part of the state and are made on the CPU.
        denoiser.module.to("meta")
    assert example.sample.is_meta
    check(name, trace(denoiser, example))


def test_layers_come_in_execution_order(build: Callable[..., Any]) -> None:
    found = [layer.name for layer in trace(*build("plain")).layers]
    assert found == [
        "embed",
        "entry",
        "stages.0.shift",
        "stages.0.block",
        "stages.1.shift",
        "stages.1.block",
        "exit",
    ]


def test_every_weighted_layer_is_traced_with_what_it_depends_on(build: Callable[..., Any]) -> None:
    denoiser, example = build("conditional")
    found = trace(denoiser, example)
    weighted = {
        name for name, module in denoiser.module.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)
    }
    assert {layer.name for layer in found.layers} == weighted
    assert found.layer("conv_in").depends_on == {SAMPLE}
    assert found.layer("down_blocks.0.resnets.0.conv2").depends_on == {SAMPLE, T}
    assert found.layer("mid_block.attentions.0.transformer_blocks.0.attn2.to_k").depends_on == {
        "encoder_hidden_states"
    }
    assert found.layer("conv_out").depends_on == {SAMPLE, T, "encoder_hidden_states"}


@pytest.mark.parametrize("name", ["unet", "dit"])
def test_layers_that_still_hold_zeros_are_found(build: Callable[..., Any], name: str) -> None:
    denoiser, example = build(name)
    for feature in FEATURES[name]:
        layer = denoiser.module.get_submodule(feature)
        layer.weight.zero_()
        layer.bias.zero_()
    check(name, trace(denoiser, example))


def test_tracing_leaves_the_model_as_it_was(build: Callable[..., Any]) -> None:
    denoiser, example = build("unet")
    before = denoiser(example)
    trace(denoiser, example)
    assert torch.equal(denoiser(example), before)
    assert not any(child._forward_hooks or child._forward_pre_hooks for child in denoiser.module.modules())


class Small(nn.Module):
    """Layers to wire up as a test likes; `run(model, x, emb)` is the forward pass after the embedding `[B,
    4]` of the timestep.
    """

    def __init__(self, run: Callable[["Small", Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.run = run
        self.linear, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
        self.wide, self.conv = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 4, 1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.norm, self.rows, self.tokens = nn.GroupNorm(2, 8), nn.Conv1d(8, 4, 1), nn.Linear(8, 4)

    def forward(self, x: Tensor, t: Tensor, y: Any = None, tokens: Any = None) -> Tensor:
        emb = torch.sin(t[:, None] * torch.tensor([1.0, 0.5, 0.2, 0.1]))
        extra = [value for value in (y, tokens) if value is not None]
        return self.run(self, x, emb, *extra)


def small(run: Callable[..., Tensor], **conditions: Tensor) -> Trace:
    return trace(Denoiser(Small(run)), Inputs(torch.randn(1, 4, 6, 6), torch.tensor([5]), conditions))


def add(x: Tensor, feature: Tensor) -> Tensor:
    return x + feature[:, :, None, None]


def test_a_statistic_of_the_sample_ends_temporality() -> None:
    found = small(lambda m, x, emb: add(x, m.other(m.linear(emb) + x.mean())))
    assert [layer.name for layer in found.temporal] == ["linear"] and found.features == ("linear",)


def test_a_class_of_unknown_meaning_is_not_a_finite_set() -> None:
    found = small(lambda m, x, emb, y: add(x, m.other(m.linear(emb) + y)), y=torch.randn(1, 4))
    assert {layer.name: layer.depends_on for layer in found.temporal} == {"linear": {T}, "other": {T, "y"}}
    assert found.features == ("linear", "other") and [
        layer.name for layer in found.temporal if layer.cacheable
    ] == ["linear"]


def test_meeting_a_prompts_tokens_ends_temporality() -> None:
    found = small(
        lambda m, x, emb, tokens: add(x, m.other(m.linear(emb)[:, None] + tokens).mean(1)),
        tokens=torch.randn(1, 3, 4),
    )
    assert [layer.name for layer in found.temporal] == ["linear"] and found.features == ("linear",)


SHARED: list[Callable[..., Tensor]] = [
    lambda m, x, emb: m.linear(add(x, m.linear(emb)).mean((2, 3)))[:, :, None, None] + x,
    lambda m, x, emb: add(add(x, m.linear(x.mean((2, 3)))), m.linear(emb)),
]


@pytest.mark.parametrize("run", SHARED, ids=["timestep first", "sample first"])
def test_a_layer_called_for_the_timestep_and_for_the_sample_is_not_temporal(
    run: Callable[..., Tensor],
) -> None:
    found = small(run)
    assert found.temporal == () and found.features == () and found.layer("linear").depends_on == {T, SAMPLE}


def test_a_feature_is_found_through_the_operations_after_its_layer() -> None:
    found = small(
        lambda m, x, emb: x * (1 + F.silu(m.linear(emb)).chunk(2, dim=1)[0].repeat(1, 2)[:, :, None, None])
    )
    assert found.features == ("linear",)


def cat(x: Tensor, *, dim: int = 1) -> Tensor:
    return torch.cat([x[:, :3], x, x[:, :1]], dim=dim)


SEGMENT_CASES: dict[str, tuple[Callable[..., Tensor], dict[str, tuple[int, ...]]]] = {
    "read at once": (lambda m, x, emb: m.wide(cat(x)), {"wide": (3, 4, 1)}),
    "a negative axis": (lambda m, x, emb: m.wide(cat(x, dim=-3)), {"wide": (3, 4, 1)}),
    "through norm and activation": (lambda m, x, emb: m.wide(F.silu(m.norm(cat(x)))), {"wide": (3, 4, 1)}),
    "through a resize": (
        lambda m, x, emb: m.wide(F.interpolate(cat(x), scale_factor=2.0)),
        {"wide": (3, 4, 1)},
    ),
    "by a convolution over rows": (lambda m, x, emb: m.rows(cat(x.flatten(2))), {"rows": (3, 4, 1)}),
    "not beyond the layer that reads it": (lambda m, x, emb: m.conv(m.wide(cat(x))), {"wide": (3, 4, 1)}),
    "not along rows": (lambda m, x, emb: m.conv(torch.cat([x, x], dim=2)), {}),
    "not of samples": (lambda m, x, emb: m.conv(torch.cat([x, x], dim=0)), {}),
    "not of what does not see the sample": (
        lambda m, x, emb: m.wide(torch.cat([x, m.linear(emb)[:, :, None, None].expand_as(x)], dim=1)),
        {},
    ),
    "not by a linear layer over other channels": (lambda m, x, emb: m.tokens(cat(x.flatten(2)[..., :8])), {}),
    "not by groups, whose weights see no whole source": (lambda m, x, emb: m.grouped(cat(x)), {}),
}


@pytest.mark.parametrize("case", SEGMENT_CASES)
def test_channel_concatenations(case: str) -> None:
    run, expected = SEGMENT_CASES[case]
    assert {layer.name: layer.segments for layer in small(run).layers if layer.segments} == expected


def test_a_layer_reads_a_concatenation_itself_through_what_computes_nothing() -> None:
    def direct(run: Callable[..., Tensor]) -> set[str]:
        return {layer.name for layer in small(run).layers if layer.direct}

    assert direct(lambda m, x, emb: m.wide(cat(x).clone(memory_format=torch.channels_last))) == {"wide"}
    assert direct(
        lambda m, x, emb: m.wide(F.interpolate(cat(x.flatten(2).view_as(x)), scale_factor=2.0))
    ) == {"wide"}
    assert (
        direct(lambda m, x, emb: m.wide(cat(x) * 2))
        == direct(lambda m, x, emb: m.wide(m.norm(cat(x))))
        == set()
    )
    assert direct(lambda m, x, emb: m.conv(x)) == set(), "there is nothing to split"


def test_a_linear_layer_reads_a_concatenation_of_its_last_axis() -> None:
    def run(m: Small, x: Tensor, emb: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        return m.tokens(torch.cat([tokens, tokens], dim=-1))

    assert {layer.name: layer.segments for layer in small(run).layers if layer.segments} == {"tokens": (4, 4)}


def test_products_belong_to_the_module_whose_forward_calls_them() -> None:
    class Inner(nn.Module):
        """One fused attention is two products."""

        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, x, x)

    def run(m: Small, x: Tensor, emb: Tensor) -> Tensor:
        return m.inner(torch.bmm(x.flatten(2), x.flatten(2).transpose(1, 2)) @ x.flatten(2))

    model = Small(run)
    model.inner = Inner()
    found = trace(Denoiser(model), Inputs(torch.randn(1, 4, 6, 6), torch.tensor([5])))
    assert dict(found.products) == {"": 2, "inner": 2}


def test_a_learned_table_of_timesteps_is_followed() -> None:
    class Table(Small):
        """The embedding is looked up."""

        def __init__(self) -> None:
            super().__init__(lambda m, x, emb: add(x, m.other(emb)))
            self.table = nn.Embedding(500, 4)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:  # type: ignore[override]
            return self.run(self, x, self.table(t))

    found = trace(Denoiser(Table()), Inputs(torch.randn(1, 4, 6, 6), torch.tensor([5])))
    assert [layer.name for layer in found.temporal] == ["other"] and found.features == ("other",)


def test_a_model_that_reads_values_is_traced_on_real_tensors() -> None:
    found = small(lambda m, x, emb: add(x, m.linear(emb)) if x.abs().sum().item() > 0 else x)
    assert found.features == ("linear",)
