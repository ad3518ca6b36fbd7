"""Log-mel front end with NeMo's arithmetic: what the Conformer hears.

Follows `FilterbankFeatures` of NeMo 3.0 (pre-emphasis, centred STFT, Slaney mel bands, natural log with
a floor of 2^-24, mean and unbiased standard deviation per mel over the valid frames).
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn

from xded.config import FeatureConfig

LOG_FLOOR = 2.0**-24
STD_FLOOR = 1e-5


def hertz_to_mel(hertz: np.ndarray) -> np.ndarray:
    """Slaney's mel scale (Auditory Toolbox, 1998): linear below 1 kHz, logarithmic above."""
    linear = hertz * 3.0 / 200.0
    logarithmic = 15.0 + np.log(np.maximum(hertz, 1.0) / 1000.0) / (np.log(6.4) / 27.0)
    return np.where(hertz < 1000.0, linear, logarithmic)


def mel_to_hertz(mel: np.ndarray) -> np.ndarray:
    """Inverse of `hertz_to_mel`."""
    return np.where(mel < 15.0, mel * 200.0 / 3.0, 1000.0 * np.exp((mel - 15.0) * np.log(6.4) / 27.0))


def mel_filterbank(sample_rate: int, n_fft: int, mels: int) -> np.ndarray:
    """Triangular mel filters of unit area (Slaney): [mels, n_fft // 2 + 1], float32."""
    bins_hz = np.linspace(0.0, sample_rate / 2, n_fft // 2 + 1)
    edges_hz = mel_to_hertz(np.linspace(0.0, hertz_to_mel(np.array(sample_rate / 2)), mels + 2))
    widths_hz = np.diff(edges_hz)
    slopes = edges_hz[:, None] - bins_hz[None, :]
    rising = -slopes[:-2] / widths_hz[:-1, None]
    falling = slopes[2:] / widths_hz[1:, None]
    filters = np.maximum(0.0, np.minimum(rising, falling))
    return (filters * (2.0 / (edges_hz[2:] - edges_hz[:-2]))[:, None]).astype(np.float32)


def valid_mask(lengths: Tensor, frames: int) -> Tensor:
    """True where a frame (or token) belongs to the recording: lengths [B] -> [B, frames]."""
    return torch.arange(frames, device=lengths.device)[None, :] < lengths[:, None]


class LogMel(nn.Module):
    """Waveforms to normalised log-mel features.

    With `normalisation: global` the mean and standard deviation are buffers that `fit` computes from
    training recordings; the caller says whose (the leakage guard checks it).
    """

    is_waveform = False
    window: Tensor
    filterbank: Tensor
    mean: Tensor
    std: Tensor

    def __init__(self, config: FeatureConfig) -> None:
        super().__init__()
        self.config = config
        self.sample_rate, self.width = config.sample_rate, config.mels
        self.hop_samples = round(config.hop_s * config.sample_rate)
        self.window_samples = round(config.window_s * config.sample_rate)
        self.register_buffer("window", torch.hann_window(self.window_samples, periodic=False), persistent=False)
        filters = mel_filterbank(config.sample_rate, config.n_fft, config.mels)
        self.register_buffer("filterbank", torch.from_numpy(filters), persistent=False)
        if config.normalisation == "global":
            self.register_buffer("mean", torch.zeros(config.mels))
            self.register_buffer("std", torch.ones(config.mels))

    def frames(self, samples: Tensor) -> Tensor:
        """Valid frames of recordings of `samples` [B] samples."""
        return torch.div(samples, self.hop_samples, rounding_mode="floor")

    @torch.no_grad()
    def log_mel(self, waveforms: Tensor, samples: Tensor) -> tuple[Tensor, Tensor]:
        """Unnormalised features: [B, N] and [B] -> [B, T, mels] (padding frames undefined) and frames [B]."""
        waveforms = waveforms * valid_mask(samples, waveforms.shape[1])
        if self.config.preemphasis:
            emphasised = waveforms[:, 1:] - self.config.preemphasis * waveforms[:, :-1]
            waveforms = torch.cat([waveforms[:, :1], emphasised], dim=1)
            waveforms = waveforms * valid_mask(samples, waveforms.shape[1])
        spectrum = torch.stft(
            waveforms,
            n_fft=self.config.n_fft,
            hop_length=self.hop_samples,
            win_length=self.window_samples,
            window=self.window,
            center=True,
            pad_mode="constant",
            return_complex=True,
        )
        power = spectrum.real.square() + spectrum.imag.square()  # [B, F, T]
        features = torch.log(torch.matmul(self.filterbank, power) + LOG_FLOOR)
        return features.transpose(1, 2).contiguous(), self.frames(samples)

    @torch.no_grad()
    def forward(self, waveforms: Tensor, samples: Tensor) -> tuple[Tensor, Tensor]:
        """Features of a batch.

        Args:
            waveforms: [B, N], padded.
            samples: [B], valid samples of each.

        Returns:
            Features [B, T, mels], zero outside the recording, and the valid frames of each [B].
        """
        features, lengths = self.log_mel(waveforms, samples)
        mask = valid_mask(lengths, features.shape[1])[:, :, None]
        if self.config.normalisation == "global":
            return (features - self.mean) / self.std * mask, lengths
        count = lengths.clamp(min=2)[:, None, None]
        mean = (features * mask).sum(dim=1, keepdim=True) / count
        variance = ((features - mean) * mask).square().sum(dim=1, keepdim=True) / (count - 1)
        return (features - mean) / (variance.sqrt() + STD_FLOOR) * mask, lengths

    @torch.no_grad()
    def fit(self, waveforms: Iterable[np.ndarray]) -> None:
        """Sets the global mean and standard deviation from training recordings (float32 [N] each)."""
        count, total = 0, torch.zeros(self.config.mels, dtype=torch.double)
        squares = torch.zeros_like(total)
        for waveform in waveforms:
            samples = torch.tensor([len(waveform)])
            features, lengths = self.log_mel(torch.from_numpy(waveform)[None], samples)
            valid = features[0, : int(lengths[0])].double()
            count, total, squares = count + len(valid), total + valid.sum(0), squares + valid.square().sum(0)
        mean = total / count
        self.mean.copy_(mean)
        self.std.copy_((squares / count - mean.square()).clamp(min=STD_FLOOR).sqrt())
