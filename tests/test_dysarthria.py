"""The dysarthria simulator: severity 0 changes nothing, more severity changes more, and a corpus comes out whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile

from xded.audio import read_audio
from xded.corpus.dysarthria import analyse, simulate, simulate_corpus
from xded.corpus.manifest import Corpus, Recording, read_corpus, write_manifest
from xded.corpus.severity import EMPHASIS, Kind, band_of_severity, make_profile
from xded.corpus.synthesiser import make_voice, say
from xded.corpus.synthetic import make_embedded_corpus
from xded.corpus.vocoder import pulses, seeded
from xded.errors import CorpusError

WORDS = ("seven", "nine", "people", "zero")
FSDD = Path(__file__).parents[2] / "shared" / "data" / "fsdd"


def healthy(word: str, speaker: str = "someone") -> np.ndarray:
    return say(make_voice(speaker, sex="m"), word, 0)


def degraded(word: str, severity: float, kind: Kind = "spastic", take: int = 0) -> np.ndarray:
    profile = make_profile(severity, kind, speaker="someone")
    return simulate(healthy(word), profile, seeded("test", word, take))


def mean_over_words(measure, severity: float, kind: Kind = "spastic") -> float:
    return float(np.mean([measure(degraded(word, severity, kind, take)) for word in WORDS for take in range(3)]))


def spectral_variance(waveform: np.ndarray) -> float:
    """Variance over time of the shape of the envelope where there is speech."""
    envelope = analyse(waveform).envelope
    level = envelope.mean(1)
    spoken = envelope[level > level.max() - 3]
    return float((spoken - spoken.mean(1, keepdims=True)).var(0).mean())


def spectral_flux(waveform: np.ndarray) -> float:
    """How fast the envelope moves, frame to frame."""
    envelope = analyse(waveform).envelope
    level = envelope.mean(1)
    return float(np.abs(np.diff(envelope, axis=0)).mean(1)[level[1:] > level.max() - 3].mean())


def test_severity_zero_returns_the_recording_unchanged():
    waveform = healthy("seven")
    profile = make_profile(0.0, "spastic", speaker="someone")
    assert np.array_equal(simulate(waveform, profile, seeded("test")), waveform)


@pytest.mark.parametrize("kind", list(EMPHASIS))
def test_output_is_sane_for_every_type(kind: Kind):
    for severity in (0.01, 0.5, 1.0):
        waveform = degraded("seven", severity, kind)
        assert waveform.dtype == np.float32
        assert waveform.ndim == 1
        assert np.isfinite(waveform).all()
        assert 0.05 <= len(waveform) / 16_000 <= 60
        assert np.abs(waveform).max() == pytest.approx(np.abs(healthy("seven")).max(), rel=1e-3)


def test_same_state_same_samples_and_takes_differ():
    assert degraded("seven", 0.7).tobytes() == degraded("seven", 0.7).tobytes()
    assert degraded("seven", 0.7, take=0).tobytes() != degraded("seven", 0.7, take=1).tobytes()


def test_profiles_are_fixed_per_speaker():
    assert make_profile(0.5, speaker="one", seed=1) == make_profile(0.5, speaker="one", seed=1)
    assert make_profile(0.5, "ataxic", speaker="one") != make_profile(0.5, "ataxic", speaker="two")
    kinds = {make_profile(0.5, speaker=f"speaker{number}").kind for number in range(60)}
    assert kinds == set(EMPHASIS)


def test_a_tiny_severity_is_close_to_the_recording():
    for word in WORDS:
        before, after = analyse(healthy(word)), analyse(degraded(word, 0.01))
        frames = min(len(before.envelope), len(after.envelope))
        level = before.envelope[:frames].mean(1)
        spoken = level > level.max() - 2.5
        error = np.abs(before.envelope[:frames] - after.envelope[:frames])[spoken, :128]
        assert np.median(error) * 20 / np.log(10) < 4.0, word  # dB below 4 kHz


def test_severity_slows_speech_down():
    durations = [mean_over_words(len, severity) for severity in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert np.all(np.diff(durations) > 0), durations
    assert durations[-1] > 1.4 * durations[0]


def test_severity_flattens_the_spectrum_over_time():
    variances = [mean_over_words(spectral_variance, severity) for severity in (0.05, 0.35, 0.65, 1.0)]
    assert np.all(np.diff(variances) < 0), variances
    assert variances[-1] < 0.5 * variances[0]


def test_undershoot_slows_the_spectrum_down():
    fluxes = [mean_over_words(spectral_flux, severity) for severity in (0.0, 0.3, 0.6)]
    assert np.all(np.diff(fluxes) < 0), fluxes


def test_athetoid_speech_has_more_pauses_and_varies_more_between_takes():
    def lengths(kind: Kind) -> np.ndarray:
        return np.array([len(degraded("people", 0.9, kind, take)) for take in range(12)])

    assert lengths("athetoid").std() > 1.3 * lengths("hypokinetic").std()


def test_monopitch_narrows_the_range_of_pitch():
    time_s = np.arange(200) * 0.005
    glide = pulses(np.exp(np.linspace(np.log(160), np.log(90), len(time_s))))

    def spread(waveform: np.ndarray) -> float:
        f0_hz = analyse(waveform).f0_hz
        return float(np.log(f0_hz[f0_hz > 0]).std())

    profile = make_profile(0.9, "spastic", speaker="someone")
    after = np.mean([spread(simulate(glide, profile, seeded(take))) for take in range(3)])
    assert after < 0.6 * spread(glide)


def test_analysis_finds_the_pitch():
    for pitch_hz in (90, 125, 220):
        f0_hz = analyse(pulses(np.full(200, float(pitch_hz)))).f0_hz[20:-20]
        assert np.median(f0_hz) == pytest.approx(pitch_hz, rel=0.02)
    noise = seeded("test").standard_normal(16_000).astype(np.float32)
    assert (analyse(noise).f0_hz > 0).mean() < 0.1


def test_long_and_short_recordings_stay_within_bounds():
    profile = make_profile(1.0, "athetoid", speaker="someone")
    rng = seeded("test")
    short = rng.standard_normal(800).astype(np.float32)
    assert 800 <= len(simulate(short, profile, rng)) + 160 <= 60 * 16_000
    long = np.tile(healthy("seven"), 200)[: 59 * 16_000]
    assert 58 * 16_000 < len(simulate(long, profile, rng)) <= 60 * 16_000


def test_other_sample_rates_keep_theirs():
    profile = make_profile(0.1, "ataxic", speaker="someone")
    at_8k = healthy("seven")[::2]
    assert len(simulate(at_8k, profile, seeded(0), sample_rate=8000)) == pytest.approx(len(at_8k), rel=0.5)


@pytest.mark.parametrize(
    ("waveform", "problem"),
    [
        (np.zeros(16_000), "is silent"),
        (np.full(16_000, np.nan), "not finite"),
        (np.ones(100), r"lasts 0\.006 s"),
        (np.ones(61 * 16_000), r"lasts 61\.000 s"),
        (np.ones((16_000, 2)), "one channel"),
    ],
)
def test_bad_waveforms_are_refused(waveform: np.ndarray, problem: str):
    with pytest.raises(CorpusError, match=problem):
        simulate(waveform, make_profile(0.5, speaker="someone"), seeded("test"))


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return read_corpus(make_embedded_corpus(tmp_path / "healthy", controls=1, targets=3, words=2, takes=2))


def contents(manifest: Path) -> dict[str, bytes]:
    return {row.recording: row.audio_filepath.read_bytes() for row in read_corpus(manifest).recordings}


def test_a_simulated_corpus_is_whole_and_leaves_controls_alone(corpus: Corpus, tmp_path: Path):
    manifest = simulate_corpus(corpus, tmp_path / "out", seed=5)
    result = read_corpus(manifest)
    assert [row.recording for row in result.recordings] == [row.recording for row in corpus.recordings]
    for before, after in zip(corpus.recordings, result.recordings, strict=True):
        assert (before.text, before.take, before.prompt, before.role) == (
            after.text,
            after.take,
            after.prompt,
            after.role,
        )
        assert after.audio_filepath.is_relative_to(tmp_path / "out")
        assert soundfile.info(after.audio_filepath).duration == pytest.approx(after.duration)
        unchanged = before.audio_filepath.read_bytes() == after.audio_filepath.read_bytes()
        assert unchanged == (before.role == "control")
    assert {result.band_of(speaker) for speaker in ("T01", "T02", "T03")} == {"high", "mid", "very_low"}
    assert result.band_of("C01") is None


def test_same_seed_same_bytes(corpus: Corpus, tmp_path: Path):
    first = contents(simulate_corpus(corpus, tmp_path / "one", seed=5))
    assert first == contents(simulate_corpus(corpus, tmp_path / "two", seed=5))
    assert first != contents(simulate_corpus(corpus, tmp_path / "three", seed=6))


def test_named_severities_touch_only_the_named(corpus: Corpus, tmp_path: Path):
    manifest = simulate_corpus(corpus, tmp_path / "out", {"C01": 0.6, "T01": 0.0}, kinds={"C01": "flaccid"})
    result = read_corpus(manifest)
    assert result.role_of("C01") == "target"
    assert result.band_of("C01") == band_of_severity(0.6) == "low"
    before = {row.recording: row for row in corpus.recordings}
    for row in result.select(["T01", "T02", "T03"]):
        assert row.audio_filepath.read_bytes() == before[row.recording].audio_filepath.read_bytes()
        assert row.band == before[row.recording].band


def test_microphone_copies_of_a_take_are_impaired_alike(tmp_path: Path):
    waveform = healthy("seven")
    rows = []
    for mic in ("M2", "M3"):
        path = tmp_path / "in" / f"{mic}.wav"
        path.parent.mkdir(exist_ok=True)
        soundfile.write(path, waveform, 16_000)
        rows.append(
            Recording(
                audio_filepath=path, duration=len(waveform) / 16_000, text="seven", recording=f"a/{mic}",
                speaker="a", take="a1", prompt="seven", mic=mic,
            )
        )  # fmt: skip
    write_manifest(tmp_path / "in" / "manifest.jsonl", rows)
    result = read_corpus(simulate_corpus(read_corpus(tmp_path / "in"), tmp_path / "out", {"a": 0.8}))
    one, two = (read_audio(row.audio_filepath) for row in result.recordings)
    assert np.array_equal(one, two)


def test_mistakes_are_named(corpus: Corpus, tmp_path: Path):
    with pytest.raises(CorpusError, match="no speaker 'T1'"):
        simulate_corpus(corpus, tmp_path / "out", {"T1": 0.5})
    with pytest.raises(CorpusError, match=r"Severity 2\.0 of speaker 'T01'"):
        simulate_corpus(corpus, tmp_path / "out", {"T01": 2.0})
    with pytest.raises(CorpusError, match="another folder"):
        simulate_corpus(corpus, corpus.path.parent)
    controls = Corpus(corpus.path, corpus.select(role="control"))
    with pytest.raises(CorpusError, match="no target speaker"):
        simulate_corpus(controls, tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.jsonl").exists()


def test_a_silent_recording_is_named(corpus: Corpus, tmp_path: Path):
    victim = corpus.select(["T02"])[0].audio_filepath
    soundfile.write(victim, np.zeros(8000), 16_000)
    with pytest.raises(CorpusError, match=rf"{victim.name}.*is silent"):
        simulate_corpus(corpus, tmp_path / "out")


def test_real_speech_can_be_simulated():
    files = sorted(FSDD.glob("[07]_*_0.wav"))
    if not files:
        pytest.skip(f"no recordings in {FSDD}")
    for file in files:
        waveform = read_audio(file)
        severe = simulate(waveform, make_profile(0.9, "spastic", speaker=file.name), seeded("test", file.name))
        assert np.isfinite(severe).all()
        assert len(severe) > 1.15 * len(waveform)
