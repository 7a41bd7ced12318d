from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tfmq.models.denoiser import Denoiser, Inputs, Timeless, first_tensor, joined, output_tensors


class Model(nn.Module):
    """A denoiser with a keyword condition and open keyword arguments."""

    def forward(self, x: Tensor, t: Tensor, prompt: Any = None, return_dict: bool = True, **rest: Any) -> Any:
        return {"sample": x + t[:, None]} if return_dict else (x + t[:, None],)


class Unnamed(nn.Module):
    """Arguments that nobody would recognise."""

    def forward(self, picture: Tensor, moment: Tensor) -> Tensor:
        return picture * moment


def test_stock_and_plain_argument_names_are_found(build: Any) -> None:
    assert [(d.sample, d.timestep) for d in (build(name)[0] for name in ("unet", "dit", "plain"))] == [
        ("sample", "timestep"),
        ("hidden_states", "timestep"),
        ("x", "t"),
    ]


def test_names_that_cannot_be_found_can_be_given() -> None:
    with pytest.raises(TypeError, match=r"Unnamed\.forward.*no sample argument"):
        Denoiser(Unnamed())
    with pytest.raises(TypeError, match="no timestep argument"):
        Denoiser(Unnamed(), sample="picture")
    denoiser = Denoiser(Unnamed(), sample="picture", timestep="moment")
    assert float(denoiser(Inputs(torch.tensor([3.0]), torch.tensor([2.0])))) == 6.0


def test_binding_a_call_names_everything_and_repeats_a_scalar_timestep() -> None:
    denoiser, x = Denoiser(Model()), torch.zeros(3, 2)
    inputs = denoiser.bind(
        (x, 7), {"prompt": torch.ones(3), "extra": {"a": 1}, "return_dict": False, "nothing": None}
    )
    assert inputs.sample is x and inputs.timestep.tolist() == [7, 7, 7]
    assert set(inputs.conditions) == {"prompt", "extra"}
    again = denoiser.bind(
        (), {denoiser.sample: x, denoiser.timestep: torch.tensor([1, 2, 3]), **inputs.conditions}
    )
    assert again.timestep.tolist() == [1, 2, 3] and again.conditions["extra"] == {"a": 1}


def test_a_bound_call_gives_the_models_output() -> None:
    denoiser, x = Denoiser(Model()), torch.randn(2, 3)
    t = torch.tensor([1.0, 2.0])
    assert torch.equal(denoiser(denoiser.bind((x, t), {})), x + t[:, None])


def test_rows_and_chunks_cut_batched_tensors_and_keep_the_rest() -> None:
    conditions = {
        "text": torch.arange(5),
        "nested": {"ids": [torch.arange(10).view(5, 2)]},
        "shared": torch.zeros(3),
        "scalar": torch.tensor(1),
        "n": 2,
    }
    inputs = Inputs(torch.arange(5.0)[:, None], torch.arange(5), conditions)
    chunks = list(inputs.chunks(2))
    assert [len(chunk) for chunk in chunks] == [2, 2, 1]
    assert chunks[1].timestep.tolist() == [2, 3] and chunks[1].conditions["text"].tolist() == [2, 3]
    assert chunks[2].conditions["nested"]["ids"][0].tolist() == [[8, 9]]
    assert (
        chunks[1].conditions["shared"].shape == (3,)
        and chunks[1].conditions["n"] == 2
        and chunks[1].conditions["scalar"] == 1
    )
    assert torch.equal(torch.cat([chunk.sample for chunk in chunks]), inputs.sample)


def test_resizing_repeats_the_first_sample_without_sharing_memory() -> None:
    inputs = Inputs(
        torch.tensor([[1.0], [2.0]]),
        torch.tensor([4, 5]),
        {"a": {"text": torch.tensor([7, 8])}, "flag": True},
    )
    grown = inputs.resized(3)
    assert grown.sample.tolist() == [[1.0]] * 3 and grown.timestep.tolist() == [4] * 3
    assert grown.conditions["a"]["text"].tolist() == [7] * 3 and grown.conditions["flag"] is True
    grown.sample[0] = 9
    assert grown.sample.tolist() == [[9.0], [1.0], [1.0]] and inputs.sample[0] == 1


def test_inputs_are_labelled_by_the_innermost_name() -> None:
    conditions = {
        "added": {"text": torch.zeros(1), "ids": (torch.ones(1),)},
        "mask": torch.zeros(1),
        "flag": True,
    }
    labelled = Denoiser(Model()).labelled(Inputs(torch.zeros(1), torch.zeros(1), conditions))
    assert sorted(name for name, _ in labelled) == ["ids", "mask", "sample", "text", "timestep"]


def test_conditions_are_replaced_by_the_name_that_labels_them() -> None:
    denoiser = Denoiser(Model())
    inputs = Inputs(
        torch.zeros(1),
        torch.zeros(1),
        {"added": {"text": torch.zeros(1), "size": (2, 3)}, "mask": torch.zeros(1), "flag": True},
    )
    changed = denoiser.with_conditions(
        inputs, {"text": torch.ones(1), "flag": torch.ones(1), "unknown": torch.ones(1)}
    )
    assert changed.conditions == {
        "added": {"text": torch.ones(1), "size": (2, 3)},
        "mask": torch.zeros(1),
        "flag": True,
    }
    assert inputs.conditions["added"]["text"] == 0 and changed.sample is inputs.sample


@pytest.mark.parametrize(
    "wrap", [lambda x: x, lambda x: (x, None), lambda x: {"sample": x}, lambda x: OrderedDict(sample=x)]
)
def test_the_output_is_the_first_tensor_of_what_is_returned(wrap: Any) -> None:
    x = torch.ones(2)
    assert first_tensor(wrap(x)) is x


def test_the_output_of_a_diffusers_model_is_found_in_its_output_object(build: Any) -> None:
    denoiser, inputs = build("unet")
    assert torch.equal(denoiser(inputs), denoiser.module(inputs.sample, inputs.timestep).sample)


def test_an_output_without_a_tensor_is_refused_by_type() -> None:
    with pytest.raises(TypeError, match="NoneType"):
        first_tensor(None)


def test_every_tensor_of_an_output_is_found() -> None:
    x, y = torch.ones(2), torch.zeros(2)
    assert [id(found) for found in output_tensors((x, None, [y]))] == [id(x), id(y)]
    assert output_tensors(x) == (x,)


def test_tokens_of_frames_follow_their_video() -> None:
    video, tokens = torch.randn(3, 4, 2, 8, 8), torch.randn(6, 5, 8)
    inputs = Inputs(video, torch.zeros(3), {"encoder_hidden_states": tokens, "image_ids": torch.randn(6, 3)})
    part = inputs.rows(1, 3)
    assert torch.equal(part.conditions["encoder_hidden_states"], tokens[2:]) and part.conditions[
        "image_ids"
    ].shape == (6, 3)
    copies = inputs.resized(2)
    assert (
        torch.equal(copies.conditions["encoder_hidden_states"], torch.cat([tokens[:2], tokens[:2]]))
        and len(copies) == 2
    )
    assert torch.equal(copies.sample, video[:1].expand(2, -1, -1, -1, -1))


class Decoder(nn.Module):
    """Takes a latent, and no timestep."""

    def forward(self, latent: Tensor, scale: Any = None, return_dict: bool = True) -> Tensor:
        return latent if scale is None else latent * scale


def test_a_network_without_a_timestep_stands_at_one_and_the_same() -> None:
    network, x = Timeless(Decoder()), torch.randn(3, 2)
    inputs = network.bind((x,), {"scale": torch.full((3, 1), 2.0), "return_dict": False})
    assert torch.equal(inputs.timestep, torch.zeros(3)) and {*inputs.conditions} == {"scale"}
    assert {*network.arguments(inputs)} == {"latent", "scale"}
    assert torch.equal(network(inputs.rows(1, 2)), 2 * x[1:2])


def test_a_network_needs_an_argument() -> None:
    class Nothing(nn.Module):
        def forward(self) -> None: ...

    with pytest.raises(TypeError, match="has no argument"):
        Timeless(Nothing())


def test_calls_with_equal_conditions_are_joined() -> None:
    """Rows of their own go together; what all rows share has to be the same."""
    shared = torch.arange(6.0).reshape(3, 2)

    def part(timestep: int, *, rows: int = 2, table: Tensor = shared, flag: bool = True) -> Inputs:
        prompt = torch.randn(rows, 4, 5)
        conditions = {"prompt": prompt, "more": {"table": table, "flag": flag}}
        return Inputs(torch.randn(rows, 1, 8, 8), torch.full((rows,), timestep), conditions)

    parts = [part(1), part(2, rows=1), part(3, table=shared + 1), part(4, flag=False), part(5)]
    found = joined(parts)
    assert [one.timestep.tolist() for one in found] == [[1, 1, 2, 5, 5], [3, 3], [4, 4]]
    expected = torch.cat([parts[number].conditions["prompt"] for number in (0, 1, 4)])
    assert torch.equal(found[0].conditions["prompt"], expected)
    assert torch.equal(found[0].conditions["more"]["table"], shared) and found[1] is parts[2]
    assert [len(joined([part(1), Inputs(one, torch.ones(2), {})])) for one in torch.randn(1, 2, 1, 8, 8)] == [
        2
    ]


def test_frames_of_a_video_stay_with_their_sample() -> None:
    parts = [
        Inputs(torch.randn(1, 2, 3, 4, 4), torch.tensor([k]), {"prompt": torch.randn(3, 5, 6)})
        for k in (0, 1)
    ]
    (found,) = joined(parts)
    assert found.sample.shape[0] == 2
    assert torch.equal(found.rows(1, 2).conditions["prompt"], parts[1].conditions["prompt"])
