"""Dysarthria with a dial: profiles of how a speaker is impaired, and a simulator that degrades real recordings.

The simulator takes a recording apart into a pitch track and a spectral envelope per 5 ms frame (cepstral smoothing),
changes both, and puts them together again with a pulse-and-noise vocoder. What it changes, and who reports it:

- slower and irregular tempo, pauses within the word: Vachhani et al. (2018), Geng et al. (arXiv 2201.05562),
  Soleymanpour et al. (arXiv 2201.11571);
- articulatory undershoot, as a low-pass over time of the envelope: Kim et al. (2012), Lee et al. (2014);
- centralised vowels and random targets: Niu & van Santen (2003);
- pitch that is flat or trembles, voice breaks, voicing errors, breathiness, loudness decay, nasality, and how much of
  each the types of dysarthria have: Darley, Aronson & Brown (1969).

This is a stand-in with a dial. It has not been validated against listeners or against recordings of people with
dysarthria, and the simulator cannot replace one consonant by another, as people do (`synthesiser` can). `severity`
was scaled so that a recogniser trained on healthy voices loses roughly the share of words that `severity` says
(docs/severity.md has the figures); it is read as 1 - intelligibility, and the bands are cut at UASpeech's 25, 50 and
75 % intelligible words. Any severity above 0 passes through the vocoder, which alone changes a recording's sound a
little.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import numpy as np
import scipy.fft
import soxr

from xded.audio import MAX_DURATION_S, MIN_DURATION_S, read_audio
from xded.corpus.manifest import MANIFEST_NAME, Corpus, Recording, write_manifest
from xded.corpus.severity import (
    EMPHASIS,
    MOST_EMPHASIS,
    SIMULATOR,
    Emphasis,
    Kind,
    Profile,
    band_of_severity,
    make_profile,
    spread_severities,
)
from xded.corpus.vocoder import (
    BIN_HZ,
    BINS,
    FFT_SIZE,
    HOP_S,
    HOP_SAMPLES,
    SAMPLE_RATE,
    WINDOW,
    Array,
    frames_of,
    nasal_colour,
    seeded,
    smooth,
    spectra,
    vocode,
    wander,
    write_flac,
)
from xded.errors import CorpusError

SHORTEST_SHARE = 0.7  # of its length that hurried speech keeps
MOST_OF_TEMPO = 1.25  # a take is slowed or hurried by 0.75 to this times the speaker's amount


def _make_lifter() -> Array:
    """Weights [FFT_SIZE] that keep the cepstrum below 40 samples with a raised-cosine edge."""
    half = np.r_[np.ones(20), 0.5 + 0.5 * np.cos(np.pi * np.arange(20) / 20)]
    lifter = np.zeros(FFT_SIZE, np.float32)
    lifter[:40] = half
    lifter[-39:] = half[1:][::-1]
    return lifter


_LIFTER = _make_lifter()
_PITCH_WINDOW = np.hanning(1024).astype(np.float32)  # 64 ms: three periods at 50 Hz
_PITCH_LAGS = (SAMPLE_RATE // 400, SAMPLE_RATE // 65)  # samples
_window_power = np.abs(scipy.fft.rfft(_PITCH_WINDOW, 2048)) ** 2
_autocorrelation = scipy.fft.irfft(_window_power)[: _PITCH_LAGS[1]]
_WINDOW_AUTOCORRELATION = (_autocorrelation / _autocorrelation[0] + 1e-3).astype(np.float32)
_OCTAVE_COST = (0.02 * np.log2(np.maximum(1, np.arange(_PITCH_LAGS[1])))).astype(np.float32)
_PITCH_BAND = (np.linspace(0, SAMPLE_RATE / 2, 1025) < 1500).astype(np.float32)


@dataclass(frozen=True)
class Analysis:
    """A recording taken apart: pitch in Hz [T] (0: unvoiced) and natural log amplitude envelope [T, F], 5 ms frames."""

    f0_hz: Array
    envelope: Array

    def at(self, frames: Array) -> Analysis:
        """The analysis read at fractional frame positions [T']: envelope interpolated, pitch of the nearest frame."""
        low = frames.astype(int)
        high = np.minimum(low + 1, len(self.f0_hz) - 1)
        share = (frames - low).astype(np.float32)[:, None]
        envelope = (1 - share) * self.envelope[low] + share * self.envelope[high]
        return Analysis(self.f0_hz[np.rint(frames).astype(int)], envelope)


def analyse(waveform: Array) -> Analysis:
    """Pitch and envelope of a recording [N] at 16 kHz.

    The envelope is the log spectrum with all cepstral coefficients above 2.5 ms (40 samples) lifted out; the pitch is
    the highest peak between 65 and 400 Hz of the autocorrelation below 1.5 kHz, divided by the window's own and less a
    cost per octave (Boersma 1993). A frame is voiced where the peak exceeds one half, within 39 dB of the loudest.
    """
    frames = len(waveform) // HOP_SAMPLES + 1
    power = np.abs(spectra(waveform, frames)) ** 2 + 1e-9
    cepstrum = scipy.fft.irfft(0.5 * np.log(power), axis=1)
    envelope = scipy.fft.rfft(cepstrum * _LIFTER, axis=1).real
    return Analysis(_track_pitch(waveform, np.log(power.mean(1))), envelope)


def _track_pitch(waveform: Array, log_power: Array) -> Array:
    """Pitch [T] in Hz, 0 where unvoiced; lone voiced frames and jumps of nearly an octave are mended."""
    spectrum = scipy.fft.rfft(frames_of(waveform, len(log_power), _PITCH_WINDOW), 2048, axis=1)
    autocorrelation = scipy.fft.irfft(np.abs(spectrum) ** 2 * _PITCH_BAND, axis=1)[:, : _PITCH_LAGS[1]]
    autocorrelation /= _WINDOW_AUTOCORRELATION * (autocorrelation[:, :1] + 1e-9)
    # multiples of the period correlate as well as the period itself: Boersma's octave cost prefers the first
    lag = _PITCH_LAGS[0] + (autocorrelation - _OCTAVE_COST)[:, _PITCH_LAGS[0] :].argmax(1)
    height = autocorrelation[np.arange(len(lag)), lag]
    voiced = (height > 0.5) & (log_power > log_power.max() - 9)
    neighbours = np.r_[False, voiced[:-1]] | np.r_[voiced[1:], False]
    voiced &= neighbours
    f0_hz = np.where(voiced, SAMPLE_RATE / lag, 0.0)
    if voiced.any():
        median = np.median(f0_hz[voiced])
        astray = voiced & ((f0_hz > 1.7 * median) | (f0_hz < 0.58 * median))
        f0_hz[astray] = median
    return f0_hz


def _spoken(envelope: Array) -> tuple[int, int]:
    """First and last frame of speech: mean envelope within 30 dB (3.5 nepers) of the loudest frame."""
    level = envelope.mean(1)
    active = np.flatnonzero(level > level.max() - 3.5)
    return int(active[0]), int(active[-1]) + 1


def shortest_share(severity: float) -> float:
    """Least share of a recording's frames that `simulate` leaves: hurried (hypokinetic) speech, all of it spoken."""
    hurry = min(signs.tempo for signs in EMPHASIS.values()) * MOST_EMPHASIS * MOST_OF_TEMPO
    return max(SHORTEST_SHARE, 1 + 1.1 * severity * hurry)


def _change_tempo(analysis: Analysis, amounts: Emphasis, rng: np.random.Generator) -> Analysis:
    """Slows (or hurries) the spoken part as a whole and unevenly; silence around it keeps its length."""
    frames = len(analysis.f0_hz)
    first, last = _spoken(analysis.envelope)
    slowing = max(SHORTEST_SHARE, 1 + 1.1 * amounts.tempo * rng.uniform(0.75, MOST_OF_TEMPO))
    uneven = np.exp(0.85 * amounts.irregularity * wander(last - first, 9, rng))
    durations = np.ones(frames)
    durations[first:last] = uneven * slowing * (last - first) / uneven.sum()
    durations *= min(1.0, MAX_DURATION_S / HOP_S / (durations.sum() + 1))
    ends = np.r_[0, np.cumsum(durations)]
    wanted = max(12, int(ends[-1]))
    positions = np.interp(np.arange(wanted) + 0.5, ends, np.arange(frames + 1)) - 0.5
    return analysis.at(positions.clip(0, frames - 1))


def _insert_pauses(analysis: Analysis, amounts: Emphasis, rng: np.random.Generator) -> tuple[Analysis, Array]:
    """Holds quiet moments of the spoken part; returns the analysis and how much each frame is pause [T], 0..1."""
    frames = len(analysis.f0_hz)
    repeats = np.ones(frames, int)
    pauses = rng.poisson(1.8 * amounts.pauses)
    lengths = (rng.uniform(0.06, 0.06 + 0.3 * max(0.0, amounts.pauses), pauses) / HOP_S).astype(int)
    first, last = _spoken(analysis.envelope)
    level = smooth(analysis.envelope.mean(1), 3)
    inside = np.arange(first + 8, last - 8)  # 40 ms from either end
    dips = inside[(level[inside] <= level[inside - 1]) & (level[inside] <= level[inside + 1])]
    places = rng.permutation(dips)[:pauses]
    room = int(MAX_DURATION_S / HOP_S) - frames - 1
    for place, length in zip(places, lengths[: len(places)], strict=True):
        if length <= room:
            repeats[place] += length
            room -= length
    index = np.repeat(np.arange(frames), repeats)
    pausing = np.repeat(repeats > 1, repeats).astype(np.float32)
    f0_hz = np.where(pausing > 0, 0.0, analysis.f0_hz[index])
    return Analysis(f0_hz, analysis.envelope[index]), smooth(pausing, 2)


def _undershoot(envelope: Array, amounts: Emphasis) -> Array:
    """Low-passes every bin's track over time, up to 68 ms: transitions flatten and targets are not reached."""
    if amounts.undershoot <= 0:
        return envelope
    smoothed = smooth(envelope, 0.5 + 13 * amounts.undershoot)
    share = min(1.0, 1.5 * amounts.undershoot)
    return (1 - share) * envelope + share * smoothed


def _centralise(envelope: Array, amounts: Emphasis) -> Array:
    """Draws every frame's spectral shape to the recording's mean shape and widens the formants."""
    amount = amounts.centralisation
    if amount <= 0:
        return envelope
    level = envelope.mean(1, keepdims=True)
    weight = np.exp(2 * (level - level.max()))
    mean_shape = (weight * envelope).sum(0) / weight.sum()
    mean_shape -= mean_shape.mean()
    drawn = level + (1 - 0.85 * amount) * (envelope - level) + 0.85 * amount * mean_shape
    return smooth(drawn, 0.5 + 7 * amount, axis=1)


def _stray(envelope: Array, amounts: Emphasis, rng: np.random.Generator) -> Array:
    """Random targets: each frame's frequency axis is stretched slowly at random (s.d. 7 % at full irregularity)."""
    factor = np.exp(0.07 * amounts.irregularity * wander(len(envelope), 12, rng))[:, None]
    source = np.clip(np.arange(BINS, dtype=np.float32)[None] * factor, 0, BINS - 1.001)
    low = source.astype(int)
    share = source - low
    rows = np.arange(len(envelope))[:, None]
    return envelope[rows, low] * (1 - share) + envelope[rows, low + 1] * share


def _impair_pitch(f0_hz: Array, amounts: Emphasis, rng: np.random.Generator) -> Array:
    """Monopitch, tremor of 4 to 7 Hz, wandering and jitter on the voiced frames; the mean stays the speaker's."""
    voiced = f0_hz > 0
    if not voiced.any():
        return f0_hz
    log_f0 = np.log(f0_hz[voiced])
    mean = log_f0.mean()
    time_s = np.flatnonzero(voiced) * HOP_S
    tremor = np.sin(2 * np.pi * (rng.uniform(4, 7) * time_s + rng.uniform()))
    log_f0 = (
        mean
        + (log_f0 - mean) * (1 - 0.85 * amounts.monopitch)
        + 0.10 * amounts.irregularity * tremor
        + 0.08 * amounts.irregularity * wander(len(log_f0), 12, rng)
        + 0.03 * max(amounts.irregularity, amounts.breathiness) * rng.standard_normal(len(log_f0))
    )
    changed = f0_hz.copy()
    changed[voiced] = np.exp(log_f0).clip(50, 500)
    return changed


def _misvoice(f0_hz: Array, envelope: Array, pausing: Array, amounts: Emphasis, rng: np.random.Generator) -> Array:
    """Voice breaks (a stretch of voiced frames loses its pitch) and voicing of loud unvoiced frames."""
    voiced = np.flatnonzero(f0_hz > 0)
    if len(voiced) == 0:
        return f0_hz
    changed = f0_hz.copy()
    median = np.median(f0_hz[voiced])
    if rng.random() < 0.8 * amounts.voicing:
        length = int(rng.uniform(0.15, 0.5) * len(voiced))
        start = rng.integers(0, max(1, len(voiced) - length))
        changed[voiced[start : start + length]] = 0
    if rng.random() < 0.9 * amounts.voicing:
        level = envelope.mean(1)
        changed[(f0_hz == 0) & (level > level.max() - 3) & (pausing < 0.5)] = median
    return changed


def _loudness(frames: int, pausing: Array, amounts: Emphasis, rng: np.random.Generator) -> Array:
    """Natural log gain [T]: decay through the recording (11 dB at most), slow swings, silence in pauses (-43 dB)."""
    decay = -1.3 * amounts.decay * np.linspace(0, 1, frames)
    return decay + 0.25 * amounts.irregularity * wander(frames, 15, rng) - 5 * pausing


def noise_share(breathiness: float) -> Array:
    """Power share of noise in voiced frames [F], rising with frequency and with breathiness."""
    height = BIN_HZ / (SAMPLE_RATE / 2)
    healthy = 0.05 + 0.45 * height**1.5
    return healthy + breathiness * (0.2 + 0.8 * height) * (1 - healthy)


def _resynthesise(f0_hz: Array, envelope: Array, breathiness: float, rng: np.random.Generator) -> Array:
    """Samples [T * 80] of the changed pitch [T] and log envelope [T, F]."""
    share = np.where(f0_hz[:, None] > 0, noise_share(breathiness), 1.0)
    gain = np.exp(envelope) / np.sqrt((WINDOW**2).sum())  # the envelope is that of windowed frames
    return vocode(f0_hz, gain * np.sqrt(1 - share), gain * np.sqrt(share), rng)


def _check(waveform: Array, sample_rate: int) -> None:
    """Refuses what cannot be simulated, with the reason."""
    problem = None
    if waveform.ndim != 1:
        problem = f"has shape {waveform.shape}, expected one channel [N]"
    elif not MIN_DURATION_S <= len(waveform) / sample_rate <= MAX_DURATION_S:
        problem = f"lasts {len(waveform) / sample_rate:.3f} s, expected {MIN_DURATION_S} to {MAX_DURATION_S:.0f} s"
    elif not np.isfinite(waveform).all():
        problem = "holds samples that are not finite"
    elif not np.any(waveform):
        problem = "is silent"
    if problem:
        raise CorpusError(f"A recording to simulate {problem}.", "Check it with `xded corpus describe`, or drop it.")


def simulate(
    waveform: Array, profile: Profile, rng: np.random.Generator, *, sample_rate: int = SAMPLE_RATE
) -> np.ndarray:
    """A recording as a speaker with this profile might have said it.

    Args:
        waveform: [N] samples, one channel, 0.05 to 60 s.
        profile: the speaker's dysarthria; severity 0 returns the samples unchanged.
        rng: decides the variation of this one take; the same state gives the same samples.
        sample_rate: Hz of the input and of the output (at other rates than 16 kHz it is resampled there and back).

    Returns:
        [N'] float32 samples with the input's peak; N' differs from N, 0.05 to 60 s.

    Raises:
        CorpusError: the waveform is not one channel, too short or long, silent, or not finite.
    """
    waveform = np.asarray(waveform, np.float32)
    _check(waveform, sample_rate)
    if profile.severity == 0:
        return waveform
    amounts = profile.amounts
    peak = float(np.abs(waveform).max())
    resampled = soxr.resample(waveform, sample_rate, SAMPLE_RATE) if sample_rate != SAMPLE_RATE else waveform
    analysis = analyse(resampled / peak)
    analysis = _change_tempo(analysis, amounts, rng)
    analysis, pausing = _insert_pauses(analysis, amounts, rng)
    envelope = _undershoot(analysis.envelope, amounts)
    envelope = _stray(_centralise(envelope, amounts), amounts, rng) + nasal_colour(amounts.nasality)
    f0_hz = _impair_pitch(analysis.f0_hz, amounts, rng)
    f0_hz = _misvoice(f0_hz, envelope, pausing, amounts, rng)
    envelope = envelope + _loudness(len(envelope), pausing, amounts, rng)[:, None]
    speech = _resynthesise(f0_hz, envelope, amounts.breathiness, rng)
    if sample_rate != SAMPLE_RATE:
        speech = soxr.resample(speech, SAMPLE_RATE, sample_rate)
    return (speech * (peak / (np.abs(speech).max() + 1e-9))).astype(np.float32)


def _checked_severities(corpus: Corpus, severities: Mapping[str, float] | None, seed: int) -> dict[str, float]:
    """The severity of every named speaker; a spread over the target speakers when none is named."""
    if severities is None:
        targets = {recording.speaker for recording in corpus.select(role="target")}
        if not targets:
            raise CorpusError(
                f"{corpus.path} holds no target speaker to simulate dysarthria for.",
                "Name speakers and severities, or import the corpus with some speakers as targets.",
            )
        return spread_severities(targets, seed)
    corpus.require(severities)
    return dict(severities)


def _simulated(recording: Recording, profile: Profile, out: Path, seed: int) -> Recording:
    """Writes one degraded recording; microphone copies of a take share their random state."""
    waveform = simulate(read_audio(recording.audio_filepath), profile, seeded("simulate", seed, recording.take))
    path = out / "audio" / quote(recording.speaker, safe="") / f"{quote(recording.recording, safe='')}.flac"
    digest = write_flac(path, waveform)
    changes = {
        "audio_filepath": path,
        "duration": len(waveform) / SAMPLE_RATE,
        "role": "target",
        "band": band_of_severity(profile.severity),
        "simulated_by": SIMULATOR,
        "sample_rate": SAMPLE_RATE,
        "audio_sha256": digest,
    }
    return recording.model_copy(update=changes)


def _copied(recording: Recording, out: Path) -> Recording:
    """Copies one recording byte for byte, so that the new corpus stands alone."""
    source = recording.audio_filepath
    path = out / "audio" / quote(recording.speaker, safe="") / f"{quote(recording.recording, safe='')}{source.suffix}"
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, path)
    return recording.model_copy(update={"audio_filepath": path})


def simulate_corpus(
    corpus: Corpus,
    out: Path,
    severities: Mapping[str, float] | None = None,
    *,
    kinds: Mapping[str, Kind] | None = None,
    seed: int = 0,
) -> Path:
    """A copy of a corpus in which some speakers have simulated dysarthria.

    Args:
        corpus: the recordings, of any sample rate; degraded ones are written as FLAC at 16 kHz.
        out: folder of the new corpus (not the corpus's own); gets `audio/<speaker>/` and, last, `manifest.jsonl`.
        severities: 0..1 per speaker; a speaker above 0 becomes a target with the band of its severity. Speakers not
            named, and those at 0, are copied byte for byte. None: the target speakers get UASpeech's spread.
        kinds: dysarthria type per speaker; others draw theirs from the seed.
        seed: decides profiles, the spread and every take's variation; same seed and inputs, same bytes.

    Returns:
        The path of the new manifest.

    Raises:
        CorpusError: a speaker is unknown, a severity out of range, or a recording cannot be simulated (it is named).
    """
    out = out.resolve()
    if out == corpus.path.resolve().parent:
        raise CorpusError(f"{out} holds the corpus to simulate from.", "Give another folder for the new corpus.")
    kinds = kinds or {}
    corpus.require(kinds)
    profiles = {
        speaker: make_profile(severity, kinds.get(speaker), speaker=speaker, seed=seed)
        for speaker, severity in _checked_severities(corpus, severities, seed).items()
    }
    written = []
    for recording in corpus.recordings:
        profile = profiles.get(recording.speaker)
        if profile is None or profile.severity == 0:
            written.append(_copied(recording, out))
            continue
        try:
            written.append(_simulated(recording, profile, out, seed))
        except CorpusError as error:
            raise CorpusError(f"{recording.audio_filepath}: {error.problem}", error.remedy) from error
    manifest = out / MANIFEST_NAME
    write_manifest(manifest, written)
    return manifest
