"""PSNR and SSIM against their formulas."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from skimage.metrics import peak_signal_noise_ratio

from tfmq.evaluation.paired import PSNR_CAP, paired_fidelity, psnr, ssim
from tfmq.evaluation.sampling import Images


def images(seed: int, *, count: int = 3, side: int = 9, channels: int = 3) -> Images:
    return np.random.default_rng(seed).integers(0, 256, (count, side, side + 2, channels), dtype=np.uint8)


def ssim_by_formula(a: Images, b: Images, window: int = 7) -> float:
    """Return equation 13 of Wang et al. (2004), with sample covariance, averaged over whole windows and
    channels.
    """
    values = []
    for channel in range(a.shape[-1]):
        x, y = (
            np.lib.stride_tricks.sliding_window_view(v[..., channel].astype(float), (window, window))
            for v in (a, b)
        )
        mean_x, mean_y = x.mean((-1, -2)), y.mean((-1, -2))
        weight = window**2 / (window**2 - 1)
        var_x, var_y = weight * x.var((-1, -2)), weight * y.var((-1, -2))
        cov = weight * ((x * y).mean((-1, -2)) - mean_x * mean_y)
        c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
        values.append(
            (
                (2 * mean_x * mean_y + c1)
                * (2 * cov + c2)
                / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
            ).mean()
        )
    return float(np.mean(values))


@given(st.integers(0, 2**31), st.sampled_from([1, 3]))
def test_psnr_is_that_of_skimage(seed: int, channels: int) -> None:
    a, b = images(seed, channels=channels), images(seed + 1, channels=channels)
    expected = [peak_signal_noise_ratio(x, y, data_range=255) for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(psnr(a, b), expected)


def test_psnr_of_one_level_everywhere() -> None:
    a = images(0) // 2
    np.testing.assert_allclose(psnr(a, a + 1), 20 * np.log10(255))


def test_identical_images_are_capped_and_ordered() -> None:
    a = images(0, side=64)
    b = a.copy()
    b[1, 0, 0, 0] ^= 1
    values = psnr(a, b)
    assert values[0] == values[2] == PSNR_CAP
    assert 80 < values[1] < PSNR_CAP


@pytest.mark.parametrize("channels", [1, 3])
def test_ssim_is_the_formula(channels: int) -> None:
    a, b = images(0, channels=channels), images(1, channels=channels)
    b = ((a.astype(int) + b) // 2).astype(np.uint8)
    np.testing.assert_allclose(
        ssim(a, b), [ssim_by_formula(x, y) for x, y in zip(a, b, strict=True)], rtol=1e-9
    )


def test_ssim_of_tiny_images_uses_a_window_that_fits() -> None:
    a, b = images(0, side=4), images(1, side=4)
    np.testing.assert_allclose(
        ssim(a, b), [ssim_by_formula(x, y, window=3) for x, y in zip(a, b, strict=True)], rtol=1e-9
    )
    with pytest.raises(ValueError, match="3 x 3"):
        ssim(images(0, side=2), images(1, side=2))


def test_summary_is_over_images() -> None:
    a = images(0)
    b = a.copy()
    b[2] = 255 - b[2]
    result = paired_fidelity(a, b)
    assert result.min_psnr_db == result.psnr_db[2] < 20
    assert result.mean_psnr_db == pytest.approx((2 * PSNR_CAP + result.psnr_db[2]) / 3)
    assert result.mean_ssim == pytest.approx(result.ssim.mean())
    np.testing.assert_allclose(result.ssim[:2], 1)


def test_refuses_what_is_no_pair() -> None:
    a = images(0)
    with pytest.raises(ValueError, match="one shape"):
        paired_fidelity(a, a[:2])
    with pytest.raises(ValueError, match="one shape"):
        paired_fidelity(a[:0], a[:0])
    with pytest.raises(ValueError, match="uint8"):
        paired_fidelity(a, a.astype(np.float32))  # type: ignore[arg-type]
