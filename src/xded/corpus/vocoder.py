"""Pulse-and-noise vocoder at 16 kHz, shared by the formant synthesiser and the dysarthria simulator.

Both describe speech as one spectral envelope for pulses and one for noise per 5 ms frame; the vocoder filters a pulse
train and white noise with them in the short-time Fourier domain and overlap-adds the frames, as Klatt (1980) mixes
voicing and turbulence, without his filters running sample by sample in Python.
"""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import numpy as np
import scipy.fft
import soundfile
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter1d

SAMPLE_RATE = 16_000  # Hz
HOP_SAMPLES = 80  # 5 ms
HOP_S = HOP_SAMPLES / SAMPLE_RATE
FFT_SIZE = 512
BINS = FFT_SIZE // 2 + 1
BIN_HZ = np.linspace(0, SAMPLE_RATE / 2, BINS, dtype=np.float32)  # [F]
WINDOW_SAMPLES = 400  # 25 ms
WINDOW = np.hanning(WINDOW_SAMPLES + 1)[:-1].astype(np.float32)  # periodic: overlapping squares add to a constant
_OVERLAP_GAIN = float((WINDOW.astype(np.float64) ** 2).sum() / HOP_SAMPLES)

Array = NDArray[np.floating]


def seeded(*key: object) -> np.random.Generator:
    """A random generator that depends on all parts of the key and on nothing else (not on Python's hash seed)."""
    digest = hashlib.sha256("|".join(map(str, key)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "little"))


def smooth(track: Array, sigma_frames: float, axis: int = 0) -> Array:
    """Gaussian smoothing along an axis, with repeated edges."""
    return gaussian_filter1d(track, sigma_frames, axis=axis, mode="nearest", truncate=3.0)


def wander(shape: int | tuple[int, int], sigma_frames: float, rng: np.random.Generator) -> Array:
    """Slow random tracks [T] or [T, D], float32, with a standard deviation of about 1."""
    noise = gaussian_filter1d(rng.standard_normal(shape), sigma_frames, axis=0, mode="wrap", truncate=3.0)
    return (noise * np.sqrt(2 * np.sqrt(np.pi) * sigma_frames)).astype(np.float32)


def frames_of(waveform: Array, frames: int, window: Array = WINDOW) -> Array:
    """Windowed frames, one every 5 ms, the first centred on sample 0.

    Args:
        waveform: [N] samples at 16 kHz.
        frames: T, how many; the waveform is padded with zeros as far as they reach.
        window: [W] window.

    Returns:
        [T, W] float32.
    """
    size = len(window)
    missing = max(0, frames * HOP_SAMPLES + size - len(waveform) - size // 2)
    padded = np.pad(np.asarray(waveform, np.float32), (size // 2, missing))
    return np.lib.stride_tricks.sliding_window_view(padded, size)[::HOP_SAMPLES][:frames] * window


def spectra(waveform: Array, frames: int) -> NDArray[np.complexfloating]:
    """Short-time spectra [T, F] of a waveform [N]."""
    return scipy.fft.rfft(frames_of(waveform, frames), FFT_SIZE, axis=1)


def overlap_add(spectrum: NDArray[np.complexfloating]) -> Array:
    """The waveform [T * 80] of short-time spectra [T, F]; undoes `spectra`."""
    frames = scipy.fft.irfft(spectrum, FFT_SIZE, axis=1)[:, :WINDOW_SAMPLES] * WINDOW
    length = len(frames) * HOP_SAMPLES
    waveform = np.zeros(length + WINDOW_SAMPLES, np.float32)
    for start in range(0, WINDOW_SAMPLES, HOP_SAMPLES):  # the frames' pieces of one hop lie end to end
        piece = frames[:, start : start + HOP_SAMPLES].ravel()
        waveform[start : start + length] += piece
    middle = WINDOW_SAMPLES // 2
    return waveform[middle : middle + length] / _OVERLAP_GAIN


def pulses(f0_hz: Array) -> Array:
    """A pulse train [T * 80] of unit mean power that follows a pitch track [T]; frames at 0 Hz hold no pulse."""
    pitch = np.repeat(f0_hz, HOP_SAMPLES)
    phase = np.cumsum(pitch / SAMPLE_RATE)
    at = np.flatnonzero(np.diff(np.floor(phase), prepend=0) > 0)
    train = np.zeros(len(pitch), np.float32)
    train[at] = np.sqrt(SAMPLE_RATE / np.maximum(pitch[at], 1.0))
    return train


def vocode(f0_hz: Array, voiced: Array, noise: Array, rng: np.random.Generator) -> Array:
    """Speech of a pitch track and two envelopes.

    Args:
        f0_hz: [T] pitch; 0 where there are no pulses.
        voiced: [T, F] linear gain of the pulses.
        noise: [T, F] linear gain of the noise.
        rng: source of the noise.

    Returns:
        [T * 80] samples, not levelled.
    """
    frames = len(f0_hz)
    hiss = rng.standard_normal(frames * HOP_SAMPLES, np.float32)
    return overlap_add(spectra(pulses(f0_hz), frames) * voiced + spectra(hiss, frames) * noise)


def nasal_colour(amount: float) -> Array:
    """Natural log gain [F] of an open velum: a pole near 280 Hz, a weak band near 900 Hz, less treble (Klatt 1980)."""
    pole = np.exp(-(((BIN_HZ - 280) / 120) ** 2))
    gap = np.exp(-(((BIN_HZ - 900) / 450) ** 2))
    return amount * (pole - 1.1 * gap - 1.1 * BIN_HZ / (SAMPLE_RATE / 2))


def write_flac(path: Path, waveform: Array) -> str:
    """Writes samples [N] at 16 kHz as 16-bit FLAC, making folders as needed; returns the SHA-256 of the bytes."""
    buffer = io.BytesIO()
    soundfile.write(buffer, waveform, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    data = buffer.getvalue()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return hashlib.sha256(data).hexdigest()
