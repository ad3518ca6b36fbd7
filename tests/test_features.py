"""Log-mel front end: NeMo's numbers, an independent computation, padding, global normalisation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from xded.config import FeatureConfig
from xded.features import LogMel, hertz_to_mel, mel_filterbank, mel_to_hertz, valid_mask


def noise(samples: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0.0, 0.1, samples).astype(np.float32)


def slow_log_mel(waveform: np.ndarray) -> np.ndarray:
    """The same definition, frame by frame in double precision with numpy's FFT: [T, 80]."""
    waveform = waveform.astype(np.float64)
    emphasised = np.append(waveform[0], waveform[1:] - 0.97 * waveform[:-1])
    padded = np.pad(emphasised, 256)
    window = np.zeros(512)
    window[56:456] = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 399)
    filters = slow_filters()
    rows = []
    for frame in range(len(waveform) // 160):
        spectrum = np.fft.rfft(padded[160 * frame : 160 * frame + 512] * window)
        rows.append(np.log(filters @ np.abs(spectrum) ** 2 + 2.0**-24))
    return np.array(rows)


def slow_filters() -> np.ndarray:
    """Slaney's triangles of unit area, one filter and one bin at a time: [80, 257]."""

    def hertz(mel: float) -> float:
        return 200.0 / 3.0 * mel if mel < 15 else 1000.0 * 6.4 ** ((mel - 15.0) / 27.0)

    top = 15.0 + 27.0 * np.log(8.0) / np.log(6.4)  # 8 kHz
    edges = [hertz(top * i / 81) for i in range(82)]
    filters = np.zeros((80, 257))
    for m in range(80):
        left, centre, right = edges[m : m + 3]
        for k in range(257):
            f = k * 8000.0 / 256
            if left < f <= centre:
                filters[m, k] = (f - left) / (centre - left)
            elif centre < f < right:
                filters[m, k] = (right - f) / (right - centre)
        filters[m] *= 2.0 / (right - left)
    return filters


def test_features_equal_nemo(shared: Path) -> None:
    recorded = np.load(shared / "data" / "nemo" / "nemo_parity.npz")
    waveforms, samples = torch.from_numpy(recorded["waveform"]), torch.from_numpy(recorded["waveform_len"])
    features, lengths = LogMel(FeatureConfig())(waveforms, samples)
    assert lengths.tolist() == recorded["features_len"].tolist()
    for row, frames in enumerate(lengths.tolist()):
        ours, theirs = features[row, :frames].numpy(), recorded["features"][row, :, :frames].T
        assert np.abs(ours - theirs).max() < 1e-4


def test_log_mel_equals_an_independent_computation() -> None:
    waveform = noise(8_000, seed=1)
    features, lengths = LogMel(FeatureConfig()).log_mel(torch.from_numpy(waveform)[None], torch.tensor([8_000]))
    expected = slow_log_mel(waveform)
    assert lengths.tolist() == [50] == [len(expected)]
    assert np.abs(features[0, :50].numpy() - expected).max() < 1e-4


def test_normalised_features_equal_an_independent_computation() -> None:
    waveform = noise(8_000, seed=2)
    features, _ = LogMel(FeatureConfig())(torch.from_numpy(waveform)[None], torch.tensor([8_000]))
    raw = slow_log_mel(waveform)
    expected = (raw - raw.mean(0)) / (raw.std(0, ddof=1) + 1e-5)
    assert np.abs(features[0, :50].numpy() - expected).max() < 1e-3


def test_filterbank_and_mel_scale() -> None:
    assert np.abs(mel_filterbank(16_000, 512, 80) - slow_filters()).max() < 1e-6
    hertz = np.array([0.0, 440.0, 1000.0, 4000.0, 8000.0])
    assert hertz_to_mel(np.array(1000.0)) == 15.0
    np.testing.assert_allclose(mel_to_hertz(hertz_to_mel(hertz)), hertz, rtol=1e-12)


@pytest.mark.parametrize("garbage", [0.0, 3.0])
def test_padding_changes_nothing(garbage: float) -> None:
    front_end = LogMel(FeatureConfig())
    lengths = (3_200, 7_999, 16_000)
    padded = torch.full((3, 16_000), garbage)
    alone = []
    for row, samples in enumerate(lengths):
        waveform = torch.from_numpy(noise(samples, seed=row))
        padded[row, :samples] = waveform
        alone.append(front_end(waveform[None], torch.tensor([samples]))[0][0])
    together, frames = front_end(padded, torch.tensor(lengths))
    assert frames.tolist() == [20, 49, 100]
    for row, count in enumerate(frames.tolist()):
        assert (together[row, :count] - alone[row][:count]).abs().max() < 1e-5
        assert not together[row, count:].any()  # zero outside the recording


def test_loudness_is_normalised_away() -> None:
    waveform = torch.from_numpy(noise(16_000, seed=3))[None]
    front_end, samples = LogMel(FeatureConfig()), torch.tensor([16_000])
    difference = front_end(waveform, samples)[0] - front_end(0.5 * waveform, samples)[0]
    assert difference.abs().mean() < 0.01  # not zero: the floor of the logarithm stays where it is


def test_a_recording_of_one_frame_and_silence_are_finite() -> None:
    front_end = LogMel(FeatureConfig())
    features, lengths = front_end(torch.zeros(2, 800), torch.tensor([200, 800]))
    assert lengths.tolist() == [1, 5]
    assert torch.isfinite(features).all()


def test_global_normalisation_is_that_of_all_frames_together() -> None:
    waveforms = [noise(samples, seed) * gain for samples, seed, gain in ((8_000, 4, 1.0), (3_200, 5, 0.1))]
    front_end = LogMel(FeatureConfig(normalisation="global"))
    front_end.fit(waveforms)
    frames = np.concatenate([slow_log_mel(waveform) for waveform in waveforms])
    np.testing.assert_allclose(front_end.mean.numpy(), frames.mean(0), atol=1e-4)
    np.testing.assert_allclose(front_end.std.numpy(), frames.std(0), atol=1e-4)
    features, lengths = front_end(torch.from_numpy(waveforms[1])[None], torch.tensor([3_200]))
    expected = (slow_log_mel(waveforms[1]) - frames.mean(0)) / frames.std(0)
    assert np.abs(features[0, : int(lengths[0])].numpy() - expected).max() < 1e-3


def test_only_global_statistics_travel_with_the_weights() -> None:
    assert LogMel(FeatureConfig()).state_dict() == {}
    assert set(LogMel(FeatureConfig(normalisation="global")).state_dict()) == {"mean", "std"}


def test_hop_and_window_follow_the_config() -> None:
    front_end = LogMel(FeatureConfig(sample_rate=8_000, hop_s=0.0125, mels=40, n_fft=256))
    features, lengths = front_end(torch.zeros(1, 8_000), torch.tensor([8_000]))
    assert (front_end.hop_samples, front_end.window_samples) == (100, 200)
    assert (lengths.item(), features.shape[2]) == (80, 40)


def test_valid_mask() -> None:
    assert valid_mask(torch.tensor([0, 2]), 3).tolist() == [[False, False, False], [True, True, False]]
