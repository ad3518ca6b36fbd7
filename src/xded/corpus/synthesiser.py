"""A small formant synthesiser: any number of English voices, healthy or dysarthric, a few milliseconds a word.

A word goes through named stages: phones (with the speaker's own errors) -> segments (targets and durations) -> tracks
every 5 ms (formants, voicing, noise, aspiration) -> impaired tracks -> pitch -> spectral envelopes -> vocoder. The
model is the cascade of Klatt (1980): five resonances shape pulses and aspiration, frication noise has its own band.

Unlike a simulator that works on recordings, severity acts on articulation here: formant tracks are low-passed and
drawn to the schwa (undershoot: Kim et al. 2012, Lee et al. 2014), targets scatter (Niu & van Santen 2003), and
speaker-fixed rules replace or drop consonants (Rudzicz 2013, Hernandez et al. 2019). The remaining signs and their
sources are those of `xded.corpus.dysarthria`. It is a stand-in with a dial, not validated against listeners.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from xded.corpus.phones import (
    AFFRICATES,
    APPROXIMANTS,
    ASPIRATE,
    CONSONANT_RULES,
    DIPHTHONGS,
    FRICATIVES,
    NASALS,
    PHONES,
    REDUCED_VOWELS,
    STOPS,
    VOWELS,
    Noise,
    is_vowel,
    spell,
)
from xded.corpus.severity import Emphasis, Kind, Profile, make_profile
from xded.corpus.vocoder import BIN_HZ, HOP_S, SAMPLE_RATE, Array, nasal_colour, seeded, smooth, vocode, wander

Sex = Literal["f", "m"]

FRONTED_BACK = (0.0, 0.3, 0.0)  # log factors on UW and UH: since 1952 their F2 has risen by a third or more
# in most accents (Hagiwara 1997), by how much differs between speakers
SCHWA_HZ = np.array(VOWELS["AX"], float)
OFF_DB = -60.0  # of a source that is silent: below the background noise
HIGHER_FORMANTS_HZ = (3500.0, 4500.0)  # F4 and F5 of an adult man (Klatt 1980)
BANDWIDTHS_HZ = (70.0, 95.0, 140.0, 200.0, 280.0)  # F1 to F5
FINAL_FALL_DB = 12.0  # every voice falls off towards the end of a word said on its own
_NEPERS_PER_DB = np.log(10) / 20


@dataclass(frozen=True)
class Voice:
    """A speaker. All but `profile` and `errors` is who they are when healthy."""

    name: str
    f0_hz: float  # mean pitch
    vocal_tract: float  # factor on all formants: 1 for an adult man, above for a shorter tract
    rate: float  # factor on all durations: above 1 is slow
    tilt_db: float  # per octave, beyond the 6 dB of every voice
    breathiness: float  # 0..1
    frication: float  # factor on the centres of noises
    accent: Mapping[str, Array]  # factors on the formants (F1 F2 F3) of each phone
    timing: Mapping[str, float]  # factor on the duration of each phone
    profile: Profile  # dysarthria; severity 0 is healthy
    errors: Mapping[str, float]  # probability of each rule of `phones.CONSONANT_RULES`, and of "cluster" (drops a
    # consonant after a consonant), "final" (drops the last consonant) and "vowel" (reduces a vowel)
    seed: int


def make_voice(name: str, *, sex: Sex, severity: float = 0.0, kind: Kind | None = None, seed: int = 0) -> Voice:
    """A voice drawn from the name and the seed; severity changes the dysarthria, never the healthy voice under it.

    Raises:
        CorpusError: the severity is outside 0..1 or the type is unknown.
    """
    rng = seeded("voice", seed, name)
    male = sex == "m"
    resonant = [*VOWELS, *DIPHTHONGS, *APPROXIMANTS, *NASALS]
    return Voice(
        name=name,
        f0_hz=float(rng.normal(118, 14) if male else rng.normal(205, 20)),
        vocal_tract=float((1.0 if male else 1.15) * np.exp(rng.normal(0, 0.04))),
        rate=float(np.exp(rng.normal(-0.1, 0.15))),
        tilt_db=float(rng.normal(0, 1.5)),
        breathiness=float(rng.uniform(0, 0.25)),
        frication=float(np.exp(rng.normal(0, 0.08))),
        accent={phone: np.exp(rng.normal(0, (0.06, 0.05, 0.03))) for phone in resonant}
        | {phone: np.exp(rng.normal(FRONTED_BACK, (0.06, 0.2, 0.03))) for phone in ("UW", "UH")},
        timing={phone: float(np.exp(rng.normal(0, 0.12))) for phone in sorted(PHONES)},
        profile=make_profile(severity, kind, speaker=name, seed=seed),
        errors=_error_rates(severity, seeded("errors", seed, name)),
        seed=seed,
    )


def _error_rates(severity: float, rng: np.random.Generator) -> dict[str, float]:
    """Three to five consonant rules of this speaker with their rates, and the rates of dropping and reducing."""
    names = rng.permutation(list(CONSONANT_RULES))[: rng.integers(3, 6)]
    rates = {str(name): min(1.0, float(rng.beta(1.2, 1.2)) * 1.4 * severity) for name in names}
    return rates | {
        "cluster": severity * rng.uniform(0.3, 1.0),
        "final": severity**1.5 * rng.uniform(0.2, 0.9),
        "vowel": severity**1.5 * rng.uniform(0.2, 0.7),
    }


def pronounce(voice: Voice, word: str, rng: np.random.Generator) -> list[str]:
    """Phones that the voice says for a word of the lexicon, with its errors; at least one phone remains."""
    phones = spell(word)
    if voice.profile.severity == 0:
        return list(phones)
    said: list[str] = []
    for place, phone in enumerate(phones):
        if is_vowel(phone):
            reduced = rng.random() < voice.errors["vowel"]
            said.append(str(rng.choice(REDUCED_VOWELS)) if reduced else phone)
            continue
        if place + 1 == len(phones) > 2 and rng.random() < voice.errors["final"]:
            continue
        if place and not is_vowel(phones[place - 1]) and rng.random() < voice.errors["cluster"]:
            continue
        said.append(_replaced(voice, phone, rng))
    return said


def _replaced(voice: Voice, phone: str, rng: np.random.Generator) -> str:
    """The consonant after the first of the voice's rules that strikes, in the order of the rules."""
    for name, changes in CONSONANT_RULES.items():
        if name in voice.errors and phone in changes and rng.random() < voice.errors[name]:
            return changes[phone]
    return phone


@dataclass(frozen=True)
class Segment:
    """A stretch of a word with targets for the tracks. Levels in dB, at or below `OFF_DB` for none."""

    phone: str
    duration_s: float
    start_hz: Array  # F1 F2 F3
    end_hz: Array
    voicing_db: float = 0.0
    noise_db: float = OFF_DB
    noise_hz: float = 4000.0
    noise_width_hz: float = 2000.0
    aspiration_db: float = OFF_DB
    nasal: float = 0.0


def _resonance(voice: Voice, phone: str, end: bool = False) -> Array | None:
    """Formants of a vowel, an approximant or the start (end) of a diphthong; None for other phones."""
    if phone in DIPHTHONGS:
        return np.array(DIPHTHONGS[phone][int(end)]) * voice.accent[phone]
    target = VOWELS.get(phone) or APPROXIMANTS.get(phone)
    return None if target is None else np.array(target) * voice.accent[phone]


def _neighbour(voice: Voice, phones: Sequence[str], place: int) -> Array:
    """Formants that a consonant leads to: of the next resonant phone, else it comes from the one before, else schwa."""
    for phone in phones[place + 1 :]:
        if (target := _resonance(voice, phone)) is not None:
            return target
    for phone in reversed(phones[:place]):
        if (target := _resonance(voice, phone, end=True)) is not None:
            return target
    return SCHWA_HZ


def _constriction(vowel_hz: Array, noise: Noise, f1_hz: float) -> Array:
    """Formants at a constriction: F1 low, F2 part of the way from the vowel to the locus, F3 of the vowel."""
    f2_hz = (1 - noise.locus_weight) * vowel_hz[1] + noise.locus_weight * noise.locus_hz
    return np.array([f1_hz, f2_hz, vowel_hz[2]])


def _leak_db(amounts: Emphasis) -> float:
    """Level of what passes a closure: it leaks when the articulation is weak."""
    return -40 + 25.5 * amounts.undershoot


def _stop(voice: Voice, phone: str, neighbour_hz: Array, amounts: Emphasis) -> list[Segment]:
    """Closure, burst and, for voiceless stops, aspiration; for affricates closure and frication."""
    stop = AFFRICATES.get(phone, phone)
    noise = STOPS[stop]
    at_hz = _constriction(neighbour_hz, noise, 280.0)
    band = {"noise_hz": noise.centre_hz, "noise_width_hz": noise.bandwidth_hz}
    leak_db = _leak_db(amounts)
    closure = Segment(
        phone, 0.062, at_hz, at_hz, -22.0 if noise.voiced else leak_db - 10, noise_db=leak_db - 12, **band
    )
    if phone in AFFRICATES:
        voicing_db = -16.0 if noise.voiced else OFF_DB
        friction = Segment(phone, 0.075, at_hz, at_hz, voicing_db, noise_db=-8, noise_hz=3000, noise_width_hz=1000)
        return [closure, friction]
    burst = Segment(phone, 0.014, at_hz, at_hz, OFF_DB, noise_db=noise.level_db, **band)
    if noise.voiced:
        return [closure, burst]
    return [closure, burst, Segment(phone, 0.034, neighbour_hz, neighbour_hz, OFF_DB, aspiration_db=-16)]


def _segments_of(voice: Voice, phones: Sequence[str], place: int, amounts: Emphasis) -> list[Segment]:
    """The segments of one phone in its word, before the speaker's tempo."""
    phone = phones[place]
    if phone in DIPHTHONGS:
        start_hz, end_hz = (np.array(target) * voice.accent[phone] for target in DIPHTHONGS[phone])
        return [Segment(phone, 0.165, start_hz, end_hz)]
    own_hz = _resonance(voice, phone)
    if own_hz is not None and phone in VOWELS:
        duration_s = 0.065 if phone == "AX" else 0.115 if place < 3 else 0.095
        return [Segment(phone, duration_s, own_hz, own_hz)]
    if own_hz is not None:
        return [Segment(phone, 0.065, own_hz, own_hz, -4.0)]
    if phone in NASALS:
        at_hz = np.array(NASALS[phone]) * voice.accent[phone]
        return [Segment(phone, 0.075, at_hz, at_hz, -8.0, nasal=1.0)]
    neighbour_hz = _neighbour(voice, phones, place)
    if phone == ASPIRATE:
        return [Segment(phone, 0.070, neighbour_hz, neighbour_hz, OFF_DB, aspiration_db=-12)]
    if phone in FRICATIVES:
        noise = FRICATIVES[phone]
        at_hz = _constriction(neighbour_hz, noise, 350.0)
        voicing_db = -14.0 if noise.voiced else OFF_DB
        return [Segment(phone, 0.105, at_hz, at_hz, voicing_db, noise.level_db, noise.centre_hz, noise.bandwidth_hz)]
    return _stop(voice, phone, neighbour_hz, amounts)


def plan(voice: Voice, phones: Sequence[str], rng: np.random.Generator) -> list[Segment]:
    """Segments of a word with the durations of this take: the voice's and the take's tempo, scatter, pauses."""
    amounts = voice.profile.amounts
    tempo = max(0.75, (1 + 1.1 * amounts.tempo) * voice.rate * rng.uniform(0.9, 1.1))
    scatter = 0.10 + 0.45 * amounts.irregularity
    segments: list[Segment] = []
    for place in range(len(phones)):
        pause_s = rng.uniform(0.05, 0.05 + 0.22 * voice.profile.severity)
        if rng.random() < 0.35 * amounts.pauses and segments:
            held_hz = segments[-1].end_hz
            segments.append(Segment("pause", pause_s, held_hz, held_hz, OFF_DB))
        for segment in _segments_of(voice, phones, place, amounts):
            factor = tempo * voice.timing[segment.phone] * np.exp(scatter * rng.standard_normal())
            segments.append(replace(segment, duration_s=segment.duration_s * factor))
    return segments


@dataclass(frozen=True)
class Tracks:
    """What the envelopes are made of, every 5 ms; levels in dB."""

    formants_hz: Array  # [T, 3]
    voicing_db: Array  # [T]
    noise_db: Array  # [T]
    noise_hz: Array  # [T] centre
    noise_width_hz: Array  # [T]
    aspiration_db: Array  # [T]
    nasal: Array  # [T] 0..1


def lay_out(segments: Sequence[Segment]) -> Tracks:
    """Segments as tracks: formants run straight from start to end, everything else is a step."""
    frames = [max(2, round(segment.duration_s / HOP_S)) for segment in segments]
    ramps = [np.linspace(0, 1, count)[:, None] for count in frames]
    formants = [s.start_hz * (1 - ramp) + s.end_hz * ramp for s, ramp in zip(segments, ramps, strict=True)]
    return Tracks(
        formants_hz=np.concatenate(formants),
        voicing_db=np.repeat([s.voicing_db for s in segments], frames),
        noise_db=np.repeat([s.noise_db for s in segments], frames),
        noise_hz=np.repeat([s.noise_hz for s in segments], frames),
        noise_width_hz=np.repeat([s.noise_width_hz for s in segments], frames),
        aspiration_db=np.repeat([s.aspiration_db for s in segments], frames),
        nasal=np.repeat([s.nasal for s in segments], frames),
    )


def articulate(tracks: Tracks, voice: Voice, rng: np.random.Generator) -> Tracks:
    """Tracks as this voice moves through them.

    Every voice smooths its formants (20 ms), as articulators have mass. With severity they are smoothed further
    (undershoot), drawn to the schwa (centralisation) and scattered (target variability); sources switch slowly and
    noises lose their force; the velum leaks.
    """
    amounts, severity = voice.profile.amounts, voice.profile.severity
    undershoot = amounts.undershoot
    formants_hz = smooth(tracks.formants_hz, 4 + 10 * undershoot)
    formants_hz += (SCHWA_HZ - formants_hz) * np.array([0.65, 0.75, 0.55]) * amounts.centralisation
    formants_hz *= np.exp((0.013 + 0.052 * severity) * wander(formants_hz.shape, 6, rng)) * voice.vocal_tract
    noise_hz = tracks.noise_hz * voice.frication
    return Tracks(
        formants_hz=formants_hz,
        voicing_db=smooth(tracks.voicing_db, 1.2 + 4 * undershoot),
        noise_db=smooth(tracks.noise_db, 1.0 + 4.5 * undershoot) - 8 * undershoot * rng.random(),
        noise_hz=noise_hz - 900 * undershoot * (noise_hz > 2500),
        noise_width_hz=tracks.noise_width_hz,
        aspiration_db=smooth(tracks.aspiration_db, 1.2 + 3 * undershoot),
        nasal=np.maximum(smooth(tracks.nasal, 3), 0.8 * amounts.nasality),
    )


def misvoice(tracks: Tracks, amounts: Emphasis, rng: np.random.Generator) -> Tracks:
    """A voice break (a stretch turns to whisper) and voicing of noises, each in some takes."""
    voicing_db, aspiration_db = tracks.voicing_db.copy(), tracks.aspiration_db.copy()
    frames = len(voicing_db)
    breaks, voices = rng.random(2) < 0.7 * amounts.voicing
    length = int(rng.uniform(0.15, 0.45) * frames)
    start = rng.integers(0, frames - length)
    if breaks:
        part = slice(start, start + length)
        aspiration_db[part] = np.maximum(aspiration_db[part], voicing_db[part] - 6)
        voicing_db[part] -= 25
    if voices:
        voicing_db = np.maximum(voicing_db, tracks.noise_db - 4)
    return replace(tracks, voicing_db=voicing_db, aspiration_db=aspiration_db)


def pitch(voice: Voice, frames: int, rng: np.random.Generator) -> Array:
    """Pitch [T] in Hz: a declarative fall with a small rise and fall on top, flattened by monopitch, with jitter,
    tremor (4 to 7 Hz) and wandering by irregularity."""
    amounts = voice.profile.amounts
    place = np.linspace(0, 1, frames)
    melody = 0.12 - 0.28 * place + 0.08 * np.sin(np.pi * place)
    tremor = np.sin(2 * np.pi * (rng.uniform(4, 7) * np.arange(frames) * HOP_S + rng.uniform()))
    log_ratio = (
        rng.normal(0, 0.05)
        + (1 - 0.85 * amounts.monopitch) * melody
        + 0.12 * amounts.irregularity * tremor
        + 0.16 * amounts.irregularity * wander(frames, 12, rng)
        + (0.01 + 0.03 * voice.profile.severity) * rng.standard_normal(frames)
    )
    return (voice.f0_hz * np.exp(log_ratio)).clip(50, 500)


def _resonances_db(tracks: Tracks, voice: Voice) -> Array:
    """Level [T, F] of the cascade of five resonances, unit gain at 0 Hz (Klatt 1980, eq. 6, as a continuous filter)."""
    frames = len(tracks.formants_hz)
    higher_hz = np.tile(np.array(HIGHER_FORMANTS_HZ) * voice.vocal_tract, (frames, 1))
    centres_hz = np.concatenate([tracks.formants_hz, higher_hz], axis=1).astype(np.float32)
    widening = 1 + 1.1 * voice.profile.amounts.centralisation
    widths_hz = np.array(BANDWIDTHS_HZ) * np.array([widening, widening, widening, 1, 1])
    loss = np.ones((frames, len(BIN_HZ)), np.float32)
    for number, width_hz in enumerate(widths_hz.astype(np.float32)):
        centre_hz = centres_hz[:, number : number + 1]
        relative = BIN_HZ / centre_hz
        loss *= (1 - relative**2) ** 2 + (relative * width_hz / centre_hz) ** 2
    return -10 * np.log10(loss)


def envelopes(tracks: Tracks, voice: Voice, level_db: Array) -> tuple[Array, Array]:
    """Linear gains [T, F] of pulses and noise.

    Pulses have the resonances and a fall of 6 dB per octave and the voice's tilt; noise is the sum of breath (rising
    with frequency), aspiration (resonances, flattened) and frication (a band of its own).

    Args:
        tracks: of the word.
        voice: who speaks.
        level_db: [T] gain on everything.
    """
    resonances_db = _resonances_db(tracks, voice)
    nasal_db = np.outer(tracks.nasal, nasal_colour(1.0) / _NEPERS_PER_DB).astype(np.float32)
    tilt_db = -(6 + voice.tilt_db) * np.log2(np.maximum(BIN_HZ, 120) / 500)
    voiced_db = resonances_db + nasal_db + tilt_db + tracks.voicing_db[:, None]
    breath = min(0.9, voice.breathiness + 0.9 * voice.profile.amounts.breathiness)
    breath_db = voiced_db - 22 + 16 * breath + 6 * BIN_HZ / (SAMPLE_RATE / 2)
    aspiration_db = 0.6 * resonances_db + tracks.aspiration_db[:, None] - 3
    distance = np.abs((BIN_HZ - tracks.noise_hz[:, None]) / tracks.noise_width_hz[:, None])
    frication_db = tracks.noise_db[:, None] - 12 * distance**1.6 + 14

    def power(db: Array) -> Array:
        return np.exp(2 * _NEPERS_PER_DB * np.clip(db + level_db[:, None], -90, 60)).astype(np.float32)

    noise_power = power(breath_db) + power(aspiration_db) + power(frication_db)
    return np.sqrt(power(voiced_db - 3 * breath)), np.sqrt(noise_power)


def _level_db(voice: Voice, frames: int, rng: np.random.Generator) -> Array:
    """Loudness [T]: decay through the word and slow swings."""
    amounts = voice.profile.amounts
    place = np.linspace(0, 1, frames)
    swings = (0.42 + 2.6 * amounts.irregularity) * wander(frames, 14, rng)
    return swings - FINAL_FALL_DB * place**3 - 14 * amounts.decay * place


def _record(speech: Array, rng: np.random.Generator) -> np.ndarray:
    """The recording: peak 0.25 to 0.7 of full scale, 40 to 120 ms before and after, a noise floor 26 to 50 dB down."""
    speech = speech / (np.abs(speech).max() + 1e-9) * rng.uniform(0.25, 0.7)
    before, after = (rng.uniform(0.04, 0.12, 2) * SAMPLE_RATE).astype(int)
    padded = np.pad(speech, (before, after))
    floor = padded.std() * 10 ** (-rng.uniform(26, 50) / 20)
    return (padded + floor * rng.standard_normal(len(padded), np.float32)).astype(np.float32)


def say(voice: Voice, word: str, take: int) -> np.ndarray:
    """One take of a word.

    Args:
        voice: who speaks.
        word: a word of `phones.LEXICON`, any case.
        take: number of the take; it and the voice decide everything that varies.

    Returns:
        [N] float32 samples at 16 kHz, below full scale; the same arguments give the same samples.

    Raises:
        CorpusError: the lexicon does not hold the word.
    """
    rng = seeded("say", voice.seed, voice.name, word.lower(), take)
    segments = plan(voice, pronounce(voice, word, rng), rng)
    tracks = misvoice(articulate(lay_out(segments), voice, rng), voice.profile.amounts, rng)
    frames = len(tracks.voicing_db)
    f0_hz = pitch(voice, frames, rng)
    voiced, noise = envelopes(tracks, voice, _level_db(voice, frames, rng))
    return _record(vocode(f0_hz, voiced, noise, rng), rng)
