"""Augmentation: repeatable, of bounded size, and only tempo moves the time axis."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from xded.augment import augment, stretch_time, warp_mels
from xded.config import AugmentConfig

NOTHING: dict[str, Any] = {"frequency_masks": 0, "time_masks": 0, "mel_warp": 0, "noise": 0, "tempo": 0}


def only(**fields: Any) -> AugmentConfig:
    return AugmentConfig(**{**NOTHING, **fields})


def ones(frames: int = 50, mels: int = 80) -> np.ndarray:
    return np.ones((frames, mels), np.float32)


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_nothing_switched_on_changes_nothing_and_copies() -> None:
    features = generator().normal(size=(30, 80)).astype(np.float32)
    out = augment(features, AugmentConfig(**NOTHING), generator())
    np.testing.assert_array_equal(out, features)
    out[:] = 0.0
    assert features.any()


def test_the_input_is_never_written_to() -> None:
    features = generator().normal(size=(30, 80)).astype(np.float32)
    before = features.copy()
    for seed in range(5):
        augment(features, AugmentConfig(tempo=0.2), generator(seed))
        augment(features, only(time_masks=2, time_mask_share=0.5), generator(seed))
    np.testing.assert_array_equal(features, before)


def test_same_generator_same_result_and_another_one_differs() -> None:
    features = generator().normal(size=(30, 80)).astype(np.float32)
    first = augment(features, AugmentConfig(), generator(1))
    np.testing.assert_array_equal(first, augment(features, AugmentConfig(), generator(1)))
    assert not np.array_equal(first, augment(features, AugmentConfig(), generator(2)))


@pytest.mark.parametrize("seed", range(20))
def test_defaults_keep_shape_and_type(seed: int) -> None:
    out = augment(ones(), AugmentConfig(), generator(seed))
    assert out.shape == (50, 80)
    assert out.dtype == np.float32
    assert np.isfinite(out).all()


def test_masks_are_bands_of_the_mean_no_wider_than_asked() -> None:
    widest_bands, widest_frames = 0, 0
    for seed in range(200):
        out = augment(ones(), only(frequency_masks=1, frequency_mask_width=7), generator(seed))
        bands = (out == 0).all(axis=0)
        assert ((out == 0).any(axis=0) == bands).all()  # a band is masked at every frame or at none
        assert np.diff(bands.astype(int)).clip(0).sum() + bands[0] <= 1  # in one piece
        widest_bands = max(widest_bands, int(bands.sum()))
        out = augment(ones(), only(time_masks=1, time_mask_share=0.2), generator(seed))
        frames = (out == 0).all(axis=1)
        assert ((out == 0).any(axis=1) == frames).all()
        widest_frames = max(widest_frames, int(frames.sum()))
    assert widest_bands == 7
    assert 8 <= widest_frames <= 10  # a fifth of 50


def test_masks_wider_than_the_features_do_not_fail() -> None:
    out = augment(ones(3, 8), only(frequency_masks=3, frequency_mask_width=20, time_masks=1), generator())
    assert out.shape == (3, 8)


def test_noise_has_the_standard_deviation_asked_for() -> None:
    out = augment(np.zeros((500, 80), np.float32), only(noise=0.3), generator())
    assert abs(out.std() - 0.3) < 0.01
    assert abs(out.mean()) < 0.01


def test_warping_the_mels_moves_a_peak_and_keeps_time() -> None:
    features = np.zeros((10, 80), np.float32)
    features[:, 40] = 1.0
    assert warp_mels(features, 0.1)[0].argmax() == 44
    assert warp_mels(features, -0.1)[0].argmax() == 36
    np.testing.assert_array_equal(warp_mels(features, 0.0), features)
    assert len(augment(features, only(mel_warp=0.2), generator())) == 10


def test_stretching_time_keeps_ends_and_interpolates() -> None:
    features = np.arange(21, dtype=np.float32)[:, None].repeat(8, axis=1)
    longer, shorter = stretch_time(features, 0.5), stretch_time(features, -0.5)
    assert (len(longer), len(shorter)) == (32, 10)
    assert (longer[0, 0], longer[-1, 0]) == (0.0, 20.0)
    np.testing.assert_allclose(np.diff(longer[:, 0]), 20 / 31, rtol=1e-4)
    assert len({len(augment(features, only(tempo=0.3), generator(seed))) for seed in range(10)}) > 1
