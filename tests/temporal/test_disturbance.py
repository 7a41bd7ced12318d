import numpy as np
import pytest
import torch

from tfmq.temporal.disturbance import disturbance

TIMESTEPS = torch.tensor([1.0, 11.0, 21.0, 31.0])


def features(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"a": torch.randn(4, 6, generator=generator), "b": torch.randn(4, 3, generator=generator)}


def test_the_same_features_are_not_disturbed() -> None:
    found = disturbance(TIMESTEPS, features(), features())
    assert found.mismatches == 0 and found.max_relative_error == 0 and found.mean_relative_error == 0
    torch.testing.assert_close(found.cosine["a"], torch.ones(4))
    assert found.nearest["b"].tolist() == [0, 1, 2, 3]


def test_swapped_timesteps_are_exactly_the_mismatches() -> None:
    quantized = features()
    quantized["a"] = quantized["a"][[0, 2, 1, 3]]
    found = disturbance(TIMESTEPS, features(), quantized)
    assert found.nearest["a"].tolist() == [0, 2, 1, 3] and found.nearest["b"].tolist() == [0, 1, 2, 3]
    assert found.mismatches == 2


def test_small_noise_is_no_mismatch_and_is_measured() -> None:
    quantized = {name: value * 1.01 for name, value in features().items()}
    found = disturbance(TIMESTEPS, features(), quantized)
    assert found.mismatches == 0
    assert found.max_relative_error == pytest.approx(
        0.01, rel=1e-3
    ) and found.mean_relative_error == pytest.approx(0.01, rel=1e-3)


def test_equal_features_of_two_timesteps_are_no_mismatch() -> None:
    reference = features()
    reference["a"][2] = reference["a"][0]
    assert (
        disturbance(
            TIMESTEPS, reference, {name: value.clone() for name, value in reference.items()}
        ).mismatches
        == 0
    )


def test_measures_agree_with_numpy() -> None:
    reference, quantized = features(), features(1)
    found = disturbance(TIMESTEPS, reference, quantized)
    r, q = reference["a"].double().numpy(), quantized["a"].double().numpy()
    np.testing.assert_allclose(
        found.relative_error["a"], np.linalg.norm(r - q, axis=1) / np.linalg.norm(r, axis=1), rtol=1e-5
    )
    np.testing.assert_array_equal(
        found.nearest["a"], np.linalg.norm(q[:, None] - r[None], axis=2).argmin(axis=1)
    )
    everything = torch.cat(list(found.relative_error.values()))
    assert found.max_relative_error == float(everything.max()) and found.mean_relative_error == pytest.approx(
        float(everything.mean())
    )


def test_no_feature_is_no_disturbance() -> None:
    found = disturbance(TIMESTEPS, {}, {})
    assert (found.mismatches, found.max_relative_error, found.mean_relative_error) == (0, 0.0, 0.0)
