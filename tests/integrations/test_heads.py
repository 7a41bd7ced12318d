"""One number of heads at all widths: the class by itself, and as a component that diffusers opens."""

import itertools
import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor
from torch import nn

import tfmq
from tfmq.integrations.diffusers.architecture import stock_class
from tfmq.integrations.diffusers.components import CLASSES
from tfmq.integrations.diffusers.saved import load_component

pytestmark = pytest.mark.filterwarnings("default")
SIZE: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "down_block_types": ("AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D"),
}
X, TIMESTEPS = torch.linspace(-2, 2, 2 * 3 * 64).sin().reshape(2, 3, 8, 8), torch.tensor([3, 700])


def pairs(model: nn.Module) -> set[tuple[int, int]]:
    """Return widths and numbers of heads."""
    return {
        (module.to_q.out_features, module.heads)
        for module in model.modules()
        if isinstance(module, Attention)
    }


def test_every_attention_has_the_heads_and_both_of_diffusers_ways_to_attend_agree() -> None:
    torch.manual_seed(0)
    model = tfmq.UNet2DHeadsModel(**SIZE, num_attention_heads=4).eval()
    assert pairs(model) == {(8, 4), (16, 4)}
    assert pairs(diffusers.UNet2DModel(**SIZE, attention_head_dim=4)) == {(8, 2), (16, 4)}
    with torch.no_grad():
        fused = model(X, TIMESTEPS).sample
        for module in model.modules():
            if isinstance(module, Attention):
                module.set_processor(AttnProcessor())
        torch.testing.assert_close(model(X, TIMESTEPS).sample, fused, atol=1e-5, rtol=1e-5)


def test_one_head_is_the_stock_model() -> None:
    torch.manual_seed(0)
    model, stock = (
        tfmq.UNet2DHeadsModel(**SIZE, num_attention_heads=1).eval(),
        diffusers.UNet2DModel(**SIZE, attention_head_dim=None).eval(),
    )
    stock.load_state_dict(model.state_dict())
    other = tfmq.UNet2DHeadsModel(**SIZE, num_attention_heads=2).eval()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        expected = stock(X, TIMESTEPS).sample
        assert torch.equal(model(X, TIMESTEPS).sample, expected) and not torch.allclose(
            other(X, TIMESTEPS).sample, expected, atol=1e-5
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_attention_heads": 3}, "num_attention_heads: 3 does not divide 8, the width of "),
        ({"attention_head_dim": 4}, "must be None, not 4"),
    ],
)
def test_heads_that_cannot_be_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tfmq.UNet2DHeadsModel(**{**SIZE, "num_attention_heads": 2, **change})


def test_the_configuration_says_it_and_nothing_of_it_is_ignored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tfmq.UNet2DHeadsModel(**SIZE, num_attention_heads=4)
    assert stock_class(model) is tfmq.UNet2DHeadsModel and model.config.num_attention_heads == 4
    assert model.config.keys() - {"num_attention_heads"} == diffusers.UNet2DModel(**SIZE).config.keys()
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert (written["_class_name"], written["num_attention_heads"], written["attention_head_dim"]) == (
        "UNet2DHeadsModel",
        4,
        None,
    )
    loaded = load_component(tmp_path, "UNet2DHeadsModel")
    again = tfmq.UNet2DHeadsModel.from_config(loaded.config)
    assert pairs(loaded) == pairs(again) == {(8, 4), (16, 4)} and not [
        record for record in caplog.records if "ignored" in record.message
    ]


# Whichever is imported first, and with the pipeline's own class.
OPENINGS = {
    "tfmq first": "import tfmq, diffusers; kind = diffusers.DiffusionPipeline",
    "tfmq last": "import diffusers; kind = diffusers.DDPMPipeline; import tfmq",
}
OPEN = """
import os
pipeline = kind.from_pretrained(os.path.join(folder, "made"))
assert type(pipeline.unet) is tfmq.UNet2DHeadsModel and pipeline.unet.mid_block.attentions[0].heads == 4
pipeline.save_pretrained(os.path.join(folder, order))
"""


def test_a_fresh_process_opens_and_saves_a_pipeline_with_it(elsewhere: Any, tmp_path: Path) -> None:
    model = tfmq.UNet2DHeadsModel(**SIZE, num_attention_heads=4)
    diffusers.DDPMPipeline(model, diffusers.DDPMScheduler()).save_pretrained(tmp_path / "made")
    assert json.loads((tmp_path / "made" / "model_index.json").read_text())["unet"] == [
        "tfmq",
        "UNet2DHeadsModel",
    ]
    elsewhere([f"order = {order!r}; {imports}\n{OPEN}" for order, imports in OPENINGS.items()], tmp_path)
    for order, name in itertools.product(OPENINGS, ("model_index.json", "unet/config.json")):
        made, again = (json.loads((tmp_path / folder / name).read_text()) for folder in ("made", order))
        assert {key: value for key, value in again.items() if key != "_name_or_path"} == made, order


@pytest.mark.parametrize("name", CLASSES)
def test_tfmq_has_every_component_that_diffusers_was_told_of(name: str) -> None:
    assert issubclass(getattr(tfmq, name), diffusers.ModelMixin) and name not in tfmq.__all__


def test_the_hub_listing_knows_the_library() -> None:
    from diffusers.pipelines.pipeline_loading_utils import _get_custom_components_and_folders

    index = {
        "_class_name": "DDPMPipeline",
        "unet": ["tfmq", "UNet2DHeadsModel"],
        "scheduler": ["diffusers", "DDPMScheduler"],
    }
    assert _get_custom_components_and_folders("me/model", index, ["unet/config.json"]) == (
        {},
        ["unet", "scheduler"],
    )
