import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tfmq.nn.temporal import CachedFeature, FeatureTable, SkippedLayer, without_tables
from tfmq.quantizers.steps import StepContext

TIMESTEPS = torch.tensor([10.0, 20.0, 30.0])


class Computed(nn.Module):
    """Stands for the layer behind a table: doubles its input, and says so when it must not run."""

    def __init__(self, *, allowed: bool = True) -> None:
        super().__init__()
        self.weight = torch.ones(4, 4)
        self.allowed = allowed

    def forward(self, x: Tensor) -> Tensor:
        assert self.allowed, "the block ran"
        return 2 * x


def table_of(feature: Tensor, table_format: str = "float16") -> FeatureTable:
    table = FeatureTable(*feature.shape, table_format)  # type: ignore[arg-type]
    table.fit(feature)
    return table


def cached(*, allowed: bool, use: tuple[int, ...] = (1, 1, 1)) -> tuple[CachedFeature, StepContext, Tensor]:
    steps = StepContext(TIMESTEPS)
    feature = torch.arange(12.0).reshape(3, 4) + 100
    layer = CachedFeature(Computed(allowed=allowed), table_of(feature), steps, everywhere=all(use))
    layer.use_table.copy_(torch.tensor(use))
    return layer, steps, feature


@given(st.integers(0, 2**31), st.sampled_from([1e-3, 1.0, 50.0]))
def test_integer_tables_err_by_half_a_step_of_their_own_timestep_at_most(seed: int, spread: float) -> None:
    feature = (
        torch.randn(5, 16, generator=torch.Generator().manual_seed(seed))
        * spread
        * torch.logspace(-2, 2, 5)[:, None]
    )
    table = table_of(feature, "int8")
    assert table.values.dtype == torch.uint8 and table.scale is not None
    error = (table(torch.arange(5)) - feature).abs()
    assert (error <= table.scale[:, None] * 0.5 + 1e-6 * feature.abs()).all()
    width = feature.amax(1).clamp(min=0) - feature.amin(1).clamp(max=0)
    torch.testing.assert_close(table.scale, width / 255)


def test_half_tables_round_to_half() -> None:
    feature = torch.randn(3, 8)
    assert torch.equal(table_of(feature)(torch.tensor([2, 0])), feature[[2, 0]].half().float())


@pytest.mark.parametrize(
    ("table_format", "names"), [("int8", {"values", "scale", "zero_point"}), ("float16", {"values"})]
)
def test_the_state_of_a_table_is_complete_from_birth(table_format: str, names: set[str]) -> None:
    feature = torch.randn(3, 8)
    table, born = table_of(feature, table_format), FeatureTable(3, 8, table_format)  # type: ignore[arg-type]
    assert set(born.state_dict()) == names
    born.load_state_dict(table.state_dict())
    assert torch.equal(born(torch.arange(3)), table(torch.arange(3)))


def test_an_unknown_table_format_is_refused_by_value() -> None:
    with pytest.raises(ValueError, match="'float8'"):
        FeatureTable(3, 8, "float8")  # type: ignore[arg-type]


def test_known_timesteps_come_from_the_table_without_the_block() -> None:
    layer, steps, feature = cached(allowed=False)
    with steps.at(torch.tensor([30, 10])):
        assert torch.equal(layer(torch.zeros(2, 4)), feature[[2, 0]])
    with steps.at(torch.tensor(20)):
        assert torch.equal(layer(torch.zeros(3, 4)), feature[[1, 1, 1]])


def test_unknown_timesteps_run_the_block() -> None:
    layer, steps, _ = cached(allowed=True)
    x = torch.randn(2, 4)
    with pytest.warns(UserWarning), steps.at(torch.tensor([11, 29])):
        assert torch.equal(layer(x), 2 * x)


def test_each_sample_of_a_mixed_batch_gets_its_own() -> None:
    layer, steps, feature = cached(allowed=True)
    x = torch.randn(3, 4)
    with pytest.warns(UserWarning), steps.at(torch.tensor([10, 12, 30])):
        out = layer(x)
    assert torch.equal(out, torch.stack([feature[0], 2 * x[1], feature[2]]))


def test_the_frames_of_a_sample_read_its_row() -> None:
    layer, steps, feature = cached(allowed=False)
    with steps.at(torch.tensor([30, 10])):
        assert torch.equal(layer(torch.ones(6, 4)), feature[[2, 2, 2, 0, 0, 0]])
    layer, steps, feature = cached(allowed=True, use=(1, 0, 1))
    with steps.at(torch.tensor([20, 30])):
        assert torch.equal(layer(torch.ones(4, 4)), torch.cat([torch.full((2, 4), 2.0), feature[[2, 2]]]))


def test_timesteps_that_kept_the_block_run_it() -> None:
    layer, steps, feature = cached(allowed=True, use=(1, 0, 1))
    x = torch.randn(3, 4)
    with steps.at(torch.tensor([10, 20, 30])):
        assert torch.equal(layer(x), torch.stack([feature[0], 2 * x[1], feature[2]]))
    with steps.at(torch.tensor(20)):
        assert torch.equal(layer(x), 2 * x)
    with steps.at(torch.tensor(10)):
        assert torch.equal(layer(x), feature[[0, 0, 0]])


def test_a_table_answers_in_the_dtype_of_the_input() -> None:
    layer, steps, _ = cached(allowed=True)
    with steps.at(torch.tensor(10)):
        assert layer(torch.zeros(1, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_a_skipped_layer_computes_for_unknown_timesteps_alone() -> None:
    steps = StepContext(TIMESTEPS)
    x = torch.randn(2, 4)
    with steps.at(torch.tensor([10, 30])):
        assert torch.equal(SkippedLayer(Computed(allowed=False), 6, steps)(x), torch.zeros(2, 6))
    with pytest.warns(UserWarning), steps.at(torch.tensor([10, 31])):
        assert torch.equal(SkippedLayer(Computed(), 4, steps)(x), 2 * x)


def test_without_tables_every_layer_computes_and_the_tables_return() -> None:
    layer, steps, feature = cached(allowed=True)
    model = nn.ModuleList([layer, SkippedLayer(Computed(), 4, steps), SkippedLayer(Computed(), 4, steps)])
    model[2].enabled = False
    x = torch.randn(1, 4)
    with steps.at(torch.tensor(10)):
        with without_tables(model):
            assert torch.equal(model[0](x), 2 * x) and torch.equal(model[1](x), 2 * x)
        with pytest.raises(KeyError), without_tables(model):
            raise KeyError
        assert torch.equal(model[0](x), feature[:1]) and torch.equal(model[1](x), torch.zeros(1, 4))
        assert torch.equal(model[2](x), 2 * x), "what was off before stays off"


def test_a_copied_table_reads_the_copied_context() -> None:
    layer, steps, feature = cached(allowed=False)
    model = nn.ModuleDict({"steps": steps, "layer": layer})
    other = copy.deepcopy(model)
    with other["steps"].at(torch.tensor(30)):
        assert torch.equal(other["layer"](torch.zeros(1, 4)), feature[2:])
