import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tfmq.numerics.affine import fake_quantize
from tfmq.numerics.grids import IntegerFormat
from tfmq.quantizers.activation import ActivationQuantizer
from tfmq.quantizers.steps import StepContext

FMT = IntegerFormat(4)
TIMESTEPS = torch.tensor([10.0, 20.0, 30.0])


def fitted(
    *, steps: StepContext | None, segments: tuple[int, ...] = (), axis: int = 1
) -> ActivationQuantizer:
    """A quantizer whose every row and segment has a grid of its own."""
    quantizer = ActivationQuantizer(FMT, steps=steps, segments=segments, axis=axis)
    number = torch.arange(quantizer.scale.numel()).reshape(quantizer.scale.shape)
    quantizer.fit(0.1 + 0.07 * number, (3 * number + 1) % FMT.levels)
    return quantizer


def row(quantizer: ActivationQuantizer, x: Tensor, index: int, segment: int = 0) -> Tensor:
    return fake_quantize(
        x, quantizer.scale[index, segment], quantizer.zero_point[index, segment].float(), FMT.levels
    )


@pytest.mark.parametrize("shape", [(3, 4), (3, 5, 4), (3, 4, 6, 6)])
def test_each_sample_uses_the_row_of_its_timestep(shape: tuple[int, ...]) -> None:
    steps = StepContext(TIMESTEPS)
    quantizer, x = fitted(steps=steps), torch.randn(shape)
    with steps.at(torch.tensor([30, 10, 30])):
        out = quantizer(x)
    for sample, index in enumerate((2, 0, 2)):
        assert torch.equal(out[sample], row(quantizer, x[sample], index))


@given(st.lists(st.sampled_from([10, 20, 30]), min_size=1, max_size=6), st.integers(0, 2**31))
def test_a_mixed_batch_equals_its_samples_one_by_one(timesteps: list[int], seed: int) -> None:
    steps = StepContext(TIMESTEPS)
    quantizer = fitted(steps=steps, segments=(3, 2))
    x = torch.randn(len(timesteps), 5, 2, generator=torch.Generator().manual_seed(seed))
    with steps.at(torch.tensor(timesteps)):
        together = quantizer(x)
    for sample, timestep in enumerate(timesteps):
        with steps.at(torch.tensor(timestep)):
            assert torch.equal(together[sample : sample + 1], quantizer(x[sample : sample + 1]))


def test_one_timestep_serves_the_whole_batch() -> None:
    steps = StepContext(TIMESTEPS)
    quantizer, x = fitted(steps=steps), torch.randn(4, 6)
    with steps.at(torch.tensor(20)):
        assert torch.equal(quantizer(x), row(quantizer, x, 1))


def test_heads_folded_into_the_batch_follow_their_sample() -> None:
    steps = StepContext(TIMESTEPS)
    quantizer, x = fitted(steps=steps), torch.randn(2, 3, 5, 4)
    with steps.at(torch.tensor([10, 30])):
        folded = quantizer(x.flatten(0, 1))
        assert torch.equal(folded.view_as(x), quantizer(x))
    assert torch.equal(folded[:3], row(quantizer, x[0], 0)) and torch.equal(
        folded[3:], row(quantizer, x[1], 2)
    )


@pytest.mark.parametrize("rows", [1, 3])
def test_a_batch_that_is_no_multiple_of_the_timesteps_is_refused(rows: int) -> None:
    steps = StepContext(TIMESTEPS)
    with steps.at(torch.tensor([10, 30])), pytest.raises(ValueError, match=rf"{rows} rows.* 2 timesteps"):
        fitted(steps=steps)(torch.randn(rows, 4))


@pytest.mark.parametrize(("axis", "shape"), [(1, (2, 6, 3, 3)), (-1, (2, 3, 6)), (1, (2, 6))])
def test_segments_are_quantized_as_if_split(axis: int, shape: tuple[int, ...]) -> None:
    steps = StepContext(TIMESTEPS)
    quantizer, x = fitted(steps=steps, segments=(4, 2), axis=axis), torch.randn(shape)
    with steps.at(torch.tensor([20, 30])):
        out = quantizer(x)
    for sample, index in enumerate((1, 2)):
        parts = x[sample : sample + 1].split((4, 2), dim=axis)
        expected = torch.cat(
            [row(quantizer, part, index, segment) for segment, part in enumerate(parts)], dim=axis
        )
        assert torch.equal(out[sample : sample + 1], expected)


def test_segments_that_do_not_add_up_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected 6 channels on axis 1, got an input of shape \(2, 5, 3\)"):
        fitted(steps=None, segments=(4, 2))(torch.randn(2, 5, 3))


def test_a_static_quantizer_needs_no_step_and_has_one_row() -> None:
    quantizer, x = fitted(steps=None), torch.randn(4, 6)
    assert not quantizer.per_step and quantizer.scale.shape == (1, 1)
    assert torch.equal(quantizer(x), row(quantizer, x, 0))


def test_a_table_of_one_row_makes_a_static_quantizer() -> None:
    quantizer, x = ActivationQuantizer(FMT, steps=StepContext(TIMESTEPS), segments=(4, 2)), torch.randn(4, 6)
    quantizer.fit(torch.tensor([[0.5, 0.25]]), torch.tensor([[7.0, 3.0]]))
    assert not quantizer.per_step and quantizer.describe()["per_step"] is False
    assert {name: tuple(value.shape) for name, value in quantizer.state_dict().items()} == {
        "scale": (1, 2),
        "zero_point": (1, 2),
    }
    expected = torch.cat(
        [row(quantizer, part, 0, segment) for segment, part in enumerate(x.split((4, 2), dim=1))], dim=1
    )
    assert torch.equal(quantizer(x), expected)


def test_a_step_quantizer_outside_of_a_call_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="outside of its denoiser"):
        fitted(steps=StepContext(TIMESTEPS))(torch.randn(1, 2))


def test_the_state_has_the_tables_alone_from_birth() -> None:
    quantizer = ActivationQuantizer(IntegerFormat(8), steps=StepContext(TIMESTEPS), segments=(4, 2))
    state = quantizer.state_dict()
    assert {name: (tuple(value.shape), value.dtype) for name, value in state.items()} == {
        "scale": ((3, 2), torch.float32),
        "zero_point": ((3, 2), torch.uint8),
    }
    quantizer.fit(torch.full((3, 2), 0.5), torch.full((3, 2), 255.0))
    other = ActivationQuantizer(IntegerFormat(8), steps=StepContext(TIMESTEPS), segments=(4, 2))
    other.load_state_dict(quantizer.state_dict())
    assert (other.zero_point == 255).all() and (other.scale == 0.5).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_input_keeps_its_dtype(dtype: torch.dtype) -> None:
    steps = StepContext(TIMESTEPS)
    with steps.at(torch.tensor([10, 20])):
        assert fitted(steps=steps)(torch.randn(2, 4).to(dtype)).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_grid_for_zeros_keeps_half_precision_zeros(dtype: torch.dtype) -> None:
    quantizer = ActivationQuantizer(IntegerFormat(8))
    quantizer.fit(torch.full((1, 1), 1e-8), torch.zeros(1, 1))
    assert (quantizer(torch.zeros(2, 3, dtype=dtype)) == 0).all()


def test_a_copied_model_shares_one_context_of_its_own() -> None:
    model = nn.ModuleDict({"steps": StepContext(TIMESTEPS)})
    model["first"], model["second"] = fitted(steps=model["steps"]), fitted(steps=model["steps"])
    other = copy.deepcopy(model)
    x = torch.randn(1, 4)
    with other["steps"].at(torch.tensor([30])):
        assert torch.equal(other["second"](x), row(model["second"], x, 2))
        with pytest.raises(RuntimeError, match="outside of its denoiser"):
            model["first"](x)
