"""Versions of a recording's audio: other speed and pitch, noise, reverberation, simulated dysarthria.

To change audio costs more than to change features, so that a recording gets a few versions (`augment.views`), each made
once and kept as its features are. Version 0 is the recording as it is. A version is a function of (seed, recording,
number): every change draws from a generator of its own, so that to switch one on or off leaves the others as they were.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import scipy.fft
import scipy.signal
import soxr
import torch
from torch import Tensor

from xded.audio import MAX_DURATION_S
from xded.config import AugmentConfig
from xded.corpus.dysarthria import shortest_share, simulate
from xded.corpus.severity import make_profile
from xded.corpus.vocoder import HOP_S, seeded

CHANGES = ("speed", "pitch", "noise_db", "reverberation_s", "dysarthria")  # keys of `AugmentConfig` that change audio
NOISE_SPAN_DB = 20.0  # noise is drawn from the lowest signal-to-noise ratio to this much above it
SHORTEST_T60_S = 0.05
DIRECT_DB = (0.0, 10.0)  # direct over reverberant energy: from the critical distance to close to the mouth
FRAME_S, ENVELOPE_S = 0.032, 0.0025  # of the phase vocoder; the envelope is the cepstrum below 400 Hz
MOST_GAIN = float(np.log(10.0))  # 20 dB, where an envelope is put back


@cache
def audio_part(config: AugmentConfig) -> AugmentConfig | None:
    """The part of a config that changes audio, all else at its defaults; none where it changes nothing."""
    asked = AugmentConfig(**{key: getattr(config, key) for key in CHANGES})
    return None if asked == AugmentConfig() else asked


def shortest_s(duration_s: float, config: AugmentConfig) -> float:
    """Seconds that the shortest version of a recording has."""
    if config.dysarthria:
        duration_s = shortest_share(config.dysarthria) * duration_s - HOP_S
    return duration_s / (1.0 + config.speed)


@dataclass(frozen=True)
class View:
    """A version of a recording.

    Attributes:
        changes: `audio_part` of the run's config; seed: of the run; recording: id; number: of the version, from 1.
    """

    changes: AugmentConfig
    seed: int
    recording: str
    number: int

    def of(self, waveform: np.ndarray, sample_rate: int) -> np.ndarray:
        """The version of a waveform: float32 [N] -> [N'], as from mouth to microphone; silence stays as it is.

        N' = N unless `speed` or `dysarthria` are asked for.
        """
        if not np.any(waveform):
            return waveform
        asked = self.changes
        if asked.dysarthria:
            random = self._random("dysarthria")
            waveform = impair(waveform, random.uniform(0.0, asked.dysarthria), random, sample_rate)
        if asked.speed:
            slowest = len(waveform) / (MAX_DURATION_S * sample_rate)  # no version is longer than a recording may be
            factor = self._random("speed").uniform(1.0 - asked.speed, 1.0 + asked.speed)
            waveform = change_speed(waveform, max(factor, slowest))
        if asked.pitch:
            semitones = self._random("pitch").uniform(-asked.pitch, asked.pitch)
            waveform = shift_pitch(waveform, semitones, sample_rate)
        if asked.reverberation_s:
            random = self._random("reverberation")
            t60_s = random.uniform(SHORTEST_T60_S, max(SHORTEST_T60_S, asked.reverberation_s))
            waveform = reverberate(waveform, t60_s, random.uniform(*DIRECT_DB), random, sample_rate)
        if asked.noise_db is not None:
            random = self._random("noise")
            snr_db = asked.noise_db + random.uniform(0.0, NOISE_SPAN_DB)
            waveform = add_noise(waveform, snr_db, random, pink=bool(random.integers(2)))
        return np.ascontiguousarray(waveform, np.float32)

    def _random(self, change: str) -> np.random.Generator:
        return seeded("view", change, self.seed, self.number, self.recording)


def impair(waveform: np.ndarray, severity: float, random: np.random.Generator, sample_rate: int) -> np.ndarray:
    """The recording as said by somebody with dysarthria of this severity, whose type and signs are drawn for it.

    The simulator and the shares of the types are those of `xded corpus simulate`: see `corpus.dysarthria` for its
    sources and for what it is not. Severity 0 changes nothing.
    """
    profile = make_profile(severity, speaker=str(random.integers(2**32)))
    return simulate(waveform, profile, random, sample_rate=sample_rate)


def change_speed(waveform: np.ndarray, factor: float) -> np.ndarray:
    """Tempo and pitch times `factor` by resampling (Ko et al. 2015, "Audio augmentation for speech recognition"):
    [N] -> [N / factor].
    """
    return soxr.resample(waveform, factor, 1.0)


def shift_pitch(waveform: np.ndarray, semitones: float, sample_rate: int) -> np.ndarray:
    """Another pitch at the same duration and with the same spectral envelope: [N] -> [N].

    A phase vocoder makes the recording longer (Flanagan & Golden 1966), resampling gives its length back and moves the
    pitch. That moves the formants too, which is `mel_warp`'s work and not that of pitch: each frame gets the
    original's envelope back (cepstral smoothing, as Röbel & Rodet 2005). The simulator's vocoder would do the same,
    but a student that hears its sound in training knows it from simulated test speakers.
    """
    ratio, count = 2.0 ** (semitones / 12.0), len(waveform)
    spectrum = _spectra(waveform, sample_rate)
    longer = _waveform(_stretch(spectrum, ratio), round(count * ratio), sample_rate)
    moved = soxr.resample(longer, ratio, 1.0)[:count]
    moved = _spectra(np.pad(moved, (0, count - len(moved))), sample_rate)
    gain = _envelope(spectrum, sample_rate) - _envelope(moved, sample_rate)
    return _waveform(moved * gain.clamp(-MOST_GAIN, MOST_GAIN).exp(), count, sample_rate)


def _framing(sample_rate: int) -> dict[str, Any]:
    """Frames of 32 ms that overlap by three quarters."""
    hop = round(FRAME_S * sample_rate / 4)
    return {"n_fft": 4 * hop, "hop_length": hop, "window": torch.hann_window(4 * hop)}


def _spectra(waveform: np.ndarray, sample_rate: int) -> Tensor:
    """Short-time spectra: [N] -> [F, T], the first frame centred on the first sample."""
    samples = torch.from_numpy(np.ascontiguousarray(waveform, np.float32))
    return torch.stft(samples, **_framing(sample_rate), pad_mode="constant", return_complex=True)


def _waveform(spectrum: Tensor, count: int, sample_rate: int) -> np.ndarray:
    """The `count` samples of short-time spectra [F, T]."""
    return torch.istft(spectrum, **_framing(sample_rate), length=count).numpy()


def _stretch(spectrum: Tensor, ratio: float) -> Tensor:
    """Short-time spectra [F, T] that say the same in `ratio` times the time: [F, T'].

    Magnitudes are interpolated; the phase of every bin goes on by what it goes on by in the original, hop for hop.
    """
    last = spectrum.shape[1] - 1
    places = (torch.arange(int(last * ratio) + 2) / ratio).clamp(max=last - 1e-3)
    low = places.long()
    share, magnitude, angle = places - low, spectrum.abs(), spectrum.angle()
    steps = angle.diff(dim=1)[:, low]
    phase = angle[:, :1] + steps.cumsum(dim=1, dtype=torch.float64) - steps
    return torch.polar(magnitude[:, low] * (1.0 - share) + magnitude[:, low + 1] * share, phase.float())


def _envelope(spectrum: Tensor, sample_rate: int) -> Tensor:
    """Natural log amplitude of short-time spectra [F, T], smoothed over frequency."""
    power = spectrum.abs().square()
    cepstrum = torch.fft.irfft(0.5 * torch.log(power + 1e-7 * power.max()), dim=0)  # 70 dB below the loudest
    kept = round(ENVELOPE_S * sample_rate)
    cepstrum[kept : len(cepstrum) - kept + 1] = 0.0
    return torch.fft.rfft(cepstrum, dim=0).real


def add_noise(waveform: np.ndarray, snr_db: float, random: np.random.Generator, *, pink: bool) -> np.ndarray:
    """The recording [N] with white or pink (power falling as 1 / f) noise.

    The signal-to-noise ratio is that of the mean powers of the whole recording, pauses included.
    """
    noise = random.standard_normal(len(waveform), np.float32)
    if pink:
        spectrum = scipy.fft.rfft(noise)
        spectrum[0] = 0.0
        spectrum[1:] /= np.sqrt(np.arange(1, len(spectrum), dtype=np.float32))
        noise = scipy.fft.irfft(spectrum, len(noise))
    return waveform + noise * (_level(waveform) / _level(noise) * 10.0 ** (-snr_db / 20.0))


def reverberate(
    waveform: np.ndarray, t60_s: float, direct_db: float, random: np.random.Generator, sample_rate: int
) -> np.ndarray:
    """The recording in a made-up room: [N] -> [N], what sounds on after the end is cut, the level is kept.

    The room's response is the direct path, which nothing delays, and after it white noise that falls by 60 dB in
    `t60_s` (Polack 1988), whose energy is `direct_db` below the direct path's. Ko et al. 2017 ("A study on data
    augmentation of reverberant speech") found simulated rooms as good as measured ones.
    """
    time_s = np.arange(1, round(t60_s * sample_rate) + 1, dtype=np.float32) / sample_rate
    tail = random.standard_normal(len(time_s), np.float32) * 10.0 ** (-3.0 * time_s / t60_s)
    tail *= 10.0 ** (-direct_db / 20.0) / np.linalg.norm(tail)
    response = np.concatenate([np.ones(1, np.float32), tail.astype(np.float32)])
    heard = scipy.signal.fftconvolve(waveform, response)[: len(waveform)]
    return heard * (_level(waveform) / _level(heard))


def _level(waveform: np.ndarray) -> float:
    """Root mean square."""
    return float(np.sqrt(np.mean(np.square(waveform, dtype=np.float64))))
