"""The formant synthesiser: what a voice says is spellable, repeatable, near its targets, and worse with severity."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.signal import find_peaks

from xded.corpus import phones
from xded.corpus.severity import EMPHASIS, band_of_severity, make_profile, spread_severities
from xded.corpus.synthesiser import (
    Voice,
    articulate,
    envelopes,
    lay_out,
    make_voice,
    pitch,
    plan,
    pronounce,
    say,
)
from xded.corpus.vocoder import BIN_HZ, HOP_SAMPLES, overlap_add, pulses, seeded, spectra
from xded.errors import CorpusError


def plain(sex: str = "m") -> Voice:
    """A healthy voice with no accent of its own, so that formants can be compared with the tables."""
    voice = make_voice("plain", sex=sex)  # type: ignore[arg-type]
    return replace(
        voice,
        vocal_tract=1.0,
        accent=dict.fromkeys(voice.accent, np.ones(3)),
        timing=dict.fromkeys(voice.timing, 1.0),
        breathiness=0.0,
    )


def test_every_word_is_spelled_with_known_phones():
    for word, said in phones.LEXICON.items():
        assert said, word
        assert set(said) <= phones.PHONES, word
    for changes in phones.CONSONANT_RULES.values():
        assert set(changes) | set(changes.values()) <= phones.PHONES


def test_default_words_are_thirty_with_the_digits_first():
    assert len(phones.DEFAULT_WORDS) == len(set(phones.DEFAULT_WORDS)) >= 30
    digits = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    assert list(phones.DEFAULT_WORDS[:10]) == digits
    assert set(phones.DEFAULT_WORDS) <= set(phones.LEXICON)
    assert {phones.WORD_TYPES[word] for word in phones.DEFAULT_WORDS} == {"D", "C", "L", "CW"}


def test_words_of_the_lexicon_sound_different():
    spellings = list(phones.LEXICON.values())
    assert len(set(spellings)) == len(spellings)


def test_an_unknown_word_names_the_nearest():
    with pytest.raises(CorpusError, match=r"'sevn'.*did you mean 'seven'"):
        phones.spell("sevn")
    assert phones.spell("SEVEN") == phones.spell("seven")


@pytest.mark.parametrize("severity", [0.0, 1.0])
def test_every_word_is_sane_audio(severity: float):
    voice = make_voice("someone", sex="f", severity=severity, kind="athetoid")
    for word in phones.LEXICON:
        waveform = say(voice, word, 0)
        assert waveform.dtype == np.float32
        assert waveform.ndim == 1
        assert np.isfinite(waveform).all()
        assert 0.05 <= len(waveform) / 16_000 <= 60
        assert 0.2 < np.abs(waveform).max() < 1.0, word


def test_same_arguments_same_samples_and_takes_differ():
    voice = make_voice("someone", sex="m", severity=0.5)
    again = make_voice("someone", sex="m", severity=0.5)
    assert say(voice, "seven", 1).tobytes() == say(again, "seven", 1).tobytes()
    assert say(voice, "seven", 1).tobytes() == say(again, "SEVEN", 1).tobytes()
    assert say(voice, "seven", 1).tobytes() != say(voice, "seven", 2).tobytes()
    other_seed = make_voice("someone", sex="m", severity=0.5, seed=1)
    assert say(voice, "seven", 1).tobytes() != say(other_seed, "seven", 1).tobytes()


def test_severity_leaves_the_healthy_voice_alone():
    healthy, severe = (make_voice("someone", sex="m", severity=severity) for severity in (0.0, 1.0))
    for name in ("f0_hz", "vocal_tract", "rate", "tilt_db", "breathiness", "frication", "timing"):
        assert getattr(healthy, name) == getattr(severe, name), name
    assert healthy.profile.emphasis == severe.profile.emphasis
    assert healthy.profile.kind == severe.profile.kind


def test_voices_differ_and_women_speak_higher():
    men = [make_voice(f"speaker{number}", sex="m") for number in range(8)]
    women = [make_voice(f"speaker{number}", sex="f") for number in range(8)]
    assert len({voice.f0_hz for voice in men}) == 8
    assert len({voice.vocal_tract for voice in men}) == 8
    assert np.mean([voice.f0_hz for voice in women]) > 1.4 * np.mean([voice.f0_hz for voice in men])
    assert np.mean([voice.vocal_tract for voice in women]) > 1.08 * np.mean([voice.vocal_tract for voice in men])


@pytest.mark.parametrize("vowel", ["IY", "EH", "AE", "AA", "ER"])
def test_spectral_peaks_of_a_vowel_lie_at_its_formants(vowel: str):
    voice = plain()
    rng = seeded("test", vowel)
    tracks = articulate(lay_out(plan(voice, [vowel] * 3, rng)), voice, rng)
    voiced, _ = envelopes(tracks, voice, np.zeros(len(tracks.voicing_db)))
    middle = 20 * np.log10(voiced[len(voiced) // 2])
    peaks = BIN_HZ[find_peaks(middle)[0]]
    for formant_hz in phones.VOWELS[vowel]:
        assert np.abs(peaks / formant_hz - 1).min() < 0.12, (vowel, formant_hz, peaks)


def test_the_waveform_has_the_pitch_of_its_track():
    f0_hz = np.full(200, 125.0)  # one second
    train = pulses(f0_hz)
    assert np.count_nonzero(train) == pytest.approx(125, abs=1)
    assert (train**2).mean() == pytest.approx(1.0, rel=0.02)


def test_overlap_add_undoes_the_short_time_spectra():
    waveform = seeded("test").standard_normal(50 * HOP_SAMPLES).astype(np.float32)
    back = overlap_add(spectra(waveform, 50))
    inside = slice(400, -400)  # the ends have fewer windows
    np.testing.assert_allclose(back[inside], waveform[inside], atol=1e-4)


def mean_over_takes(measure, severity: float, kind: str = "spastic") -> float:
    values = []
    for number in range(4):
        voice = make_voice(f"speaker{number}", sex="m" if number % 2 else "f", severity=severity, kind=kind)  # type: ignore[arg-type]
        values += [measure(voice, word) for word in ("seven", "nine", "zero", "people", "about", "delete")]
    return float(np.mean(values))


def duration_s(voice: Voice, word: str) -> float:
    return len(say(voice, word, 0)) / 16_000


def f2_range_hz(voice: Voice, word: str) -> float:
    """Range of F2 in the correct pronunciation, taken back to the adult man's vocal tract."""
    rng = seeded("test", word, voice.name)
    segments = plan(voice, phones.spell(word), rng)
    return float(np.ptp(articulate(lay_out(segments), voice, rng).formants_hz[:, 1]) / voice.vocal_tract)


def pitch_fall(voice: Voice, word: str) -> float:
    log_f0 = np.log(pitch(voice, 120, seeded("test", word)))
    return float(log_f0[:30].mean() - log_f0[-30:].mean())


def test_severity_slows_speech_down():
    durations = [mean_over_takes(duration_s, severity) for severity in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert np.all(np.diff(durations) > 0), durations
    assert durations[-1] > 1.5 * durations[0]


def test_severity_shrinks_the_range_of_f2():
    ranges = [mean_over_takes(f2_range_hz, severity) for severity in (0.0, 0.3, 0.6, 1.0)]
    assert np.all(np.diff(ranges) < 0), ranges
    assert ranges[-1] < 0.6 * ranges[0]


def test_spastic_speech_is_monotonous():
    healthy, spastic = mean_over_takes(pitch_fall, 0.0), mean_over_takes(pitch_fall, 1.0)
    assert healthy > 0.1
    assert abs(spastic) < 0.5 * healthy


def test_hypokinetic_speech_is_hurried():
    assert mean_over_takes(duration_s, 1.0, "hypokinetic") < mean_over_takes(duration_s, 1.0, "spastic") / 1.5


def test_consonant_errors_are_the_speakers_own_and_grow_with_severity():
    def wrong(severity: float) -> float:
        share = []
        for number in range(12):
            voice = make_voice(f"speaker{number}", sex="m", severity=severity)
            for word in phones.DEFAULT_WORDS:
                share.append(tuple(pronounce(voice, word, seeded(number, word))) != phones.spell(word))
        return float(np.mean(share))

    rates = [wrong(severity) for severity in (0.0, 0.3, 0.6, 1.0)]
    assert rates[0] == 0
    assert np.all(np.diff(rates) > 0), rates
    one, two = (make_voice(name, sex="m", severity=0.8).errors for name in ("one", "two"))
    assert one != two
    assert one == make_voice("one", sex="m", severity=0.8).errors
    assert max(max(make_voice(f"s{n}", sex="m", severity=1.0).errors.values()) for n in range(20)) <= 1


def test_a_word_never_loses_all_its_phones():
    for number in range(10):
        voice = make_voice(f"speaker{number}", sex="f", severity=1.0)
        for word in phones.LEXICON:
            assert pronounce(voice, word, seeded(number, word))


def test_bands_are_cut_where_uaspeech_cuts_them():
    intelligibility = {0.95: "high", 0.76: "high", 0.75: "mid", 0.58: "mid", 0.5: "low", 0.28: "low", 0.25: "very_low"}
    for share, band in intelligibility.items():
        assert band_of_severity(round(1 - share, 2)) == band, share


def test_severities_are_spread_as_in_uaspeech():
    fifteen = spread_severities([f"s{number}" for number in range(15)])
    bands = [band_of_severity(severity) for severity in fifteen.values()]
    assert [bands.count(band) for band in ("very_low", "low", "mid", "high")] == [4, 3, 3, 5]
    nine = spread_severities([f"s{number}" for number in range(9)], seed=3)
    assert {band_of_severity(severity) for severity in nine.values()} == {"very_low", "low", "mid", "high"}
    assert nine == spread_severities([f"s{number}" for number in reversed(range(9))], seed=3)
    assert nine != spread_severities([f"s{number}" for number in range(9)], seed=4)
    assert spread_severities([]) == {}


@pytest.mark.parametrize("severity", [-0.1, 1.1, float("nan")])
def test_a_severity_outside_its_range_is_refused(severity: float):
    with pytest.raises(CorpusError, match=r"outside 0\.\.1"):
        make_voice("someone", sex="m", severity=severity)


def test_an_unknown_type_is_refused():
    with pytest.raises(CorpusError, match="'mixed' is unknown"):
        make_profile(0.5, "mixed", speaker="someone")  # type: ignore[arg-type]


def test_no_amount_exceeds_one():
    for kind in EMPHASIS:
        amounts = make_profile(1.0, kind, speaker="someone").amounts
        assert all(value <= 1 for value in vars(amounts).values())
