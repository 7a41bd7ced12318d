"""Planted outliers leave the output as it is, and are there."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

diffusers = pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def planted(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("benchmarks/planted.py")


def text_unet() -> nn.Module:
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=4,
    ).eval()


def dit() -> nn.Module:
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
    ).eval()
    # adaLN-Zero starts at zero, where nothing would show.
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * 0.1
    return model


def run(model: nn.Module, tokens: Tensor | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(2, 4, 8, 8, generator=generator)
    timestep = torch.tensor([10, 700])
    kind: dict[str, Any] = (
        {"class_labels": torch.tensor([1, 7])} if tokens is None else {"encoder_hidden_states": tokens}
    )
    with torch.no_grad():
        return model(sample, timestep=timestep, **kind).sample


def largest(model: nn.Module, name: str, call: Any) -> float:
    """Return the ratio of the largest input channel to the median one, of the worst layer whose name ends
    with `name`.
    """
    seen: list[float] = []

    def note(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        peaks = args[0].flatten(0, -2).abs().amax(0)
        seen.append(float(peaks.max() / peaks.median()))

    hooks = [
        module.register_forward_pre_hook(note) for key, module in model.named_modules() if key.endswith(name)
    ]
    call()
    for hook in hooks:
        hook.remove()
    return max(seen)


@pytest.mark.parametrize(
    ("plant", "layer"),
    [("norm_outliers", "attn1.to_q"), ("value_outliers", "attn1.to_out.0"), ("score_outliers", None)],
)
def test_a_unet_with_outliers_is_the_same_to_the_bit(
    planted: ModuleType, plant: str, layer: str | None
) -> None:
    torch.manual_seed(0)
    model = text_unet()
    tokens = torch.randn(2, 5, 12)
    other = getattr(planted, plant)(model)
    assert torch.equal(run(model, tokens), run(other, tokens))
    if layer:
        before, after = (largest(m, layer, lambda m=m: run(m, tokens)) for m in (model, other))
        assert after > 8 * before
    else:
        names = [name for name in model.state_dict() if name.endswith("to_q.weight")]
        assert all(
            (other.state_dict()[n].abs().max() > 8 * model.state_dict()[n].abs().max()).item() for n in names
        )


@pytest.mark.parametrize("plant", ["norm_outliers", "value_outliers", "score_outliers"])
def test_a_dit_with_outliers_is_the_same(planted: ModuleType, plant: str) -> None:
    torch.manual_seed(0)
    model = dit()
    other = getattr(planted, plant)(model)
    assert not torch.equal(
        model.state_dict()["transformer_blocks.0.attn1.to_q.weight"],
        other.state_dict()["transformer_blocks.0.attn1.to_q.weight"],
    ) or (plant == "value_outliers")
    if plant == "norm_outliers":
        # adaLN's bias is rounded: at 64 times one, to about 4e-6 of it.
        torch.testing.assert_close(run(model), run(other), rtol=1e-4, atol=1e-4)
        assert largest(other, "attn1.to_q", lambda: run(other)) > 8 * largest(
            model, "attn1.to_q", lambda: run(model)
        )
    else:
        assert torch.equal(run(model), run(other))


def test_a_first_token_fifty_times_larger_changes_nothing(planted: ModuleType) -> None:
    torch.manual_seed(0)
    model = text_unet()
    tokens = torch.randn(2, 5, 12)
    other, widened = planted.first_token_outlier(model)
    given = widened(tokens)
    assert given[:, 0].abs().max() == planted.FIRST_TOKEN > 8 * given[:, 1:].abs().max()
    torch.testing.assert_close(run(model, tokens), run(other, given), rtol=1e-6, atol=1e-6)


def test_a_model_without_blocks_is_refused(planted: ModuleType) -> None:
    with pytest.raises(ValueError, match="no transformer blocks"):
        planted.norm_outliers(nn.Linear(2, 2))
