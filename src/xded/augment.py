"""Augmentation of log-mel features: SpecAugment masks, mel warps, noise, and (without CTC targets) tempo.

They are drawn anew whenever a recording is served, on top of a version of its audio (`augment_audio`).
"""

from __future__ import annotations

import numpy as np

from xded.config import AugmentConfig


def warp_mels(features: np.ndarray, stretch: float) -> np.ndarray:
    """Stretches the mel axis by 1 + stretch, as another vocal-tract length would (VTLP, Jaitly & Hinton 2013)."""
    mels = features.shape[1]
    source = np.clip(np.arange(mels) / (1.0 + stretch), 0, mels - 1)
    low = source.astype(int)
    high = np.minimum(low + 1, mels - 1)
    share = (source - low).astype(np.float32)
    return features[:, low] * (1.0 - share) + features[:, high] * share


def stretch_time(features: np.ndarray, stretch: float) -> np.ndarray:
    """Stretches the time axis by 1 + stretch (linear interpolation between frames)."""
    frames = len(features)
    source = np.linspace(0, frames - 1, max(4, round(frames * (1.0 + stretch))))
    low = source.astype(int)
    high = np.minimum(low + 1, frames - 1)
    share = (source - low).astype(np.float32)[:, None]
    return features[low] * (1.0 - share) + features[high] * share


def augment(features: np.ndarray, config: AugmentConfig, random: np.random.Generator) -> np.ndarray:
    """One augmented copy of normalised features [T, mels]; masks fill with 0, the mean (Park et al. 2019)."""
    if config.tempo:
        features = stretch_time(features, random.uniform(-config.tempo, config.tempo))
    if config.mel_warp:
        features = warp_mels(features, random.uniform(-config.mel_warp, config.mel_warp))
    frames, mels = features.shape
    if config.noise:
        features = features + random.normal(0.0, config.noise, features.shape).astype(np.float32)
    else:
        features = features.copy()
    for _ in range(config.frequency_masks):
        width = int(random.integers(0, config.frequency_mask_width + 1))
        start = int(random.integers(0, max(1, mels - width)))
        features[:, start : start + width] = 0.0
    for _ in range(config.time_masks):
        width = int(random.uniform(0.0, config.time_mask_share) * frames)
        start = int(random.integers(0, max(1, frames - width)))
        features[start : start + width] = 0.0
    return features.astype(np.float32, copy=False)
