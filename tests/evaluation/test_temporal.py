"""The disturbance of a finished quantized model."""

from collections.abc import Callable

import pytest
import torch

from tfmq.evaluation.temporal import temporal_disturbance
from tfmq.models.sampler import LoopSampler
from tfmq.nn.temporal import CachedFeature, without_tables
from tfmq.numerics.errors import relative_error
from tfmq.temporal.block import TemporalBlock

Pair = Callable[..., tuple[LoopSampler, LoopSampler]]


def test_cached_features_are_those_of_the_tables(pair: Pair) -> None:
    reference, quantized = pair()
    module = quantized.denoiser.module
    found = temporal_disturbance(reference, module)
    full = TemporalBlock(reference.denoiser, reference.example())(module.tfmq_steps.timesteps)
    assert set(found.relative_error) == set(full) and len(full) > 4
    for name, feature in full.items():
        cached = module.get_submodule(name)
        assert isinstance(cached, CachedFeature)
        expected = relative_error(feature, cached.table(torch.arange(len(feature))))
        torch.testing.assert_close(found.relative_error[name], expected)
    assert 0 < found.max_relative_error < 0.05


def test_block_disturbs_more_than_the_table(pair: Pair) -> None:
    reference, quantized = pair()
    module = quantized.denoiser.module
    through_table = temporal_disturbance(reference, module).mean_relative_error
    with without_tables(module):
        through_block = temporal_disturbance(reference, module).mean_relative_error
    assert through_block > 5 * through_table


def test_features_of_a_class_conditional_model_are_measured(pair: Pair) -> None:
    reference, quantized = pair("dit")
    found = temporal_disturbance(reference, quantized.denoiser.module)
    block = TemporalBlock(reference.denoiser, reference.example())
    assert not block.cacheable
    assert set(found.relative_error) == set(block.features) and found.max_relative_error > 0


def test_refuses_a_model_in_full_precision(pair: Pair) -> None:
    reference, _ = pair()
    with pytest.raises(ValueError, match="not quantized"):
        temporal_disturbance(reference, reference.denoiser.module)


def test_refuses_a_quantized_reference(pair: Pair) -> None:
    _, quantized = pair()
    with pytest.raises(ValueError, match="quantized itself"):
        temporal_disturbance(quantized, quantized.denoiser.module)


def test_refuses_another_architecture(pair: Pair, sampler: Callable[..., LoopSampler]) -> None:
    _, quantized = pair()
    with pytest.raises(ValueError, match="lacks"):
        temporal_disturbance(sampler("plain"), quantized.denoiser.module)
    wider = sampler()
    wider.denoiser.module = type(wider.denoiser.module).from_config(
        {**wider.denoiser.module.config, "block_out_channels": (8, 24)}
    )
    with pytest.raises(ValueError, match="width 24"):
        temporal_disturbance(wider, quantized.denoiser.module)
