"""Versions of audio: repeatable, of the length, level and pitch asked for, served in turn, none when none is asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.ndimage
import scipy.signal
import torch

from tiny_corpus import job_for, tiny_config, write_corpus
from xded import augment_audio
from xded.audio import MAX_DURATION_S, read_audio
from xded.augment_audio import (
    View,
    add_noise,
    audio_part,
    change_speed,
    impair,
    reverberate,
    shift_pitch,
    shortest_s,
)  # fmt: skip
from xded.checks.data import same_simulator
from xded.config import AugmentConfig
from xded.corpus.dysarthria import analyse, shortest_share, simulate, simulate_corpus
from xded.corpus.manifest import Corpus, read_corpus
from xded.corpus.severity import EMPHASIS, MOST_EMPHASIS, Profile
from xded.corpus.synthesiser import make_voice, say
from xded.corpus.synthetic import make_embedded_corpus
from xded.errors import ConfigError, CorpusError
from xded.models.checkpoints import load
from xded.models.student import Student
from xded.training import data as training_data
from xded.training.data import TrainingData
from xded.training.loop import Loop
from xded.training.run import fit

RATE = 16_000
KEEPING: dict[str, dict[str, Any]] = {
    "pitch": {"pitch": 2.0}, "noise": {"noise_db": 5.0}, "reverberation": {"reverberation_s": 0.5},
}  # fmt: skip
MOVING: dict[str, dict[str, Any]] = {"speed": {"speed": 0.1}, "dysarthria": {"dysarthria": 0.5}}
ALL = {key: value for one in (KEEPING | MOVING).values() for key, value in one.items()}
STILL: dict[str, Any] = {"frequency_masks": 0, "time_masks": 0, "mel_warp": 0, "noise": 0}


@pytest.fixture(scope="module")
def spoken() -> np.ndarray:
    return say(make_voice("someone", sex="m"), "seven", 0)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def view(number: int = 1, *, seed: int = 0, recording: str = "r", **changes: Any) -> View:
    part = audio_part(AugmentConfig(**changes))
    assert part is not None
    return View(part, seed, recording, number)


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def power(waveform: np.ndarray) -> float:
    return float(np.mean(np.square(waveform, dtype=np.float64)))


# --- changes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [*KEEPING.values(), *MOVING.values(), ALL], ids=[*KEEPING, *MOVING, "all"])
def test_a_version_is_a_function_of_seed_recording_and_number(changes: dict[str, Any], spoken: np.ndarray) -> None:
    before = spoken.copy()
    first = view(**changes).of(spoken, RATE)
    assert first.dtype == np.float32
    assert np.isfinite(first).all()
    np.testing.assert_array_equal(first, view(**changes).of(spoken, RATE))
    np.testing.assert_array_equal(spoken, before)
    others = view(2, **changes), view(seed=1, **changes), view(recording="s", **changes)
    assert not any(np.array_equal(first, other.of(spoken, RATE)) for other in others)


@pytest.mark.parametrize("changes", KEEPING.values(), ids=KEEPING)
def test_pitch_noise_and_rooms_keep_every_sample_in_its_place(changes: dict[str, Any], spoken: np.ndarray) -> None:
    for number in range(1, 9):
        changed = view(number, **changes).of(spoken, RATE)
        assert len(changed) == len(spoken)
        tracks = [np.sqrt(scipy.ndimage.uniform_filter1d(w**2, 160)) for w in (spoken, changed)]
        agreement = scipy.signal.correlate(tracks[1] - tracks[1].mean(), tracks[0] - tracks[0].mean(), "same")
        assert abs(int(agreement.argmax()) - len(spoken) // 2) < 0.015 * RATE


def test_speed_divides_the_duration_and_multiplies_the_pitch(spoken: np.ndarray) -> None:
    tone = np.sin(2 * np.pi * 1000 * np.arange(RATE) / RATE).astype(np.float32)
    for factor in (0.8, 1.0, 1.23):
        changed = change_speed(tone, factor)
        assert abs(len(changed) - RATE / factor) <= 1
        peak_hz = np.abs(np.fft.rfft(changed * np.hanning(len(changed)))).argmax() * RATE / len(changed)
        assert peak_hz == pytest.approx(1000 * factor, rel=2e-3)
    shares = [len(spoken) / len(view(n, speed=0.1).of(spoken, RATE)) for n in range(1, 60)]
    assert 0.9 <= min(shares) < 0.92
    assert 1.08 < max(shares) <= 1.1 + 1e-3
    long = np.ones(int(MAX_DURATION_S) * RATE - RATE, np.float32)
    assert max(len(view(n, speed=0.5).of(long, RATE)) for n in range(1, 4)) <= MAX_DURATION_S * RATE + 1


@pytest.mark.parametrize("semitones", [-4.0, -1.5, 2.0, 4.0])
def test_pitch_moves_by_semitones_and_leaves_the_envelope(
    semitones: float, spoken: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = shift_pitch(spoken, semitones, RATE)
    before, after = analyse(spoken), analyse(changed)
    both = (before.f0_hz > 0) & (after.f0_hz > 0)
    assert both.sum() > 0.8 * (before.f0_hz > 0).sum()
    moved = 12 * np.log2(np.median(after.f0_hz[both] / before.f0_hz[both]))
    assert moved == pytest.approx(semitones, abs=0.35)

    def heard_differently(other: np.ndarray) -> float:  # below 4 kHz, nepers
        return float(np.abs(analyse(other).envelope - before.envelope)[both, :128].mean())

    monkeypatch.setattr(augment_audio, "MOST_GAIN", 0.0)  # no envelope is put back
    with_its_formants = shift_pitch(spoken, semitones, RATE)
    assert heard_differently(changed) < 0.75 * heard_differently(with_its_formants)


def test_no_semitone_is_no_change(spoken: np.ndarray) -> None:
    np.testing.assert_allclose(shift_pitch(spoken, 0.0, RATE), spoken, atol=5e-4)
    short = spoken[:200]
    assert len(shift_pitch(short, 3.0, RATE)) == 200


@pytest.mark.parametrize("pink", [False, True])
@pytest.mark.parametrize("snr_db", [-5.0, 0.0, 20.0])
def test_noise_has_the_level_and_colour_asked_for(snr_db: float, pink: bool, spoken: np.ndarray) -> None:
    noise = add_noise(spoken, snr_db, generator(), pink=pink) - spoken
    assert 10 * np.log10(power(spoken) / power(noise)) == pytest.approx(snr_db, abs=1e-2)
    frequencies, density = scipy.signal.welch(noise, RATE, nperseg=1024)
    kept = (frequencies > 100) & (frequencies < 7000)
    slope = np.polyfit(np.log10(frequencies[kept]), np.log10(density[kept]), 1)[0]
    assert slope == pytest.approx(-1.0 if pink else 0.0, abs=0.15)


def test_versions_are_as_noisy_as_asked(spoken: np.ndarray) -> None:
    noises = [view(n, noise_db=5.0).of(spoken, RATE) - spoken for n in range(1, 80)]
    ratios_db = [10 * np.log10(power(spoken) / power(noise)) for noise in noises]
    assert 5.0 - 0.1 <= min(ratios_db) < 7.5
    assert 22.5 < max(ratios_db) <= 25.0 + 0.1


def test_a_room_keeps_the_direct_path_and_dies_away_as_asked() -> None:
    click = np.zeros(2 * RATE, np.float32)
    click[100] = 1.0
    heard = reverberate(click, 0.4, 6.0, generator(), RATE)
    assert not heard[:99].any() or np.abs(heard[:99]).max() < 1e-6  # nothing before the direct path
    assert np.abs(heard).argmax() == 100
    tail = heard[101:].astype(np.float64)
    assert 10 * np.log10(heard[100] ** 2 / (tail**2).sum()) == pytest.approx(6.0, abs=0.1)
    energy_db = 10 * np.log10(np.cumsum((tail**2)[::-1])[::-1][: int(0.3 * RATE)])  # Schroeder 1965
    slope_db_s = np.polyfit(np.arange(len(energy_db)) / RATE, energy_db, 1)[0]
    assert slope_db_s == pytest.approx(-60 / 0.4, rel=0.12)


def test_a_room_and_no_room_are_equally_loud(spoken: np.ndarray) -> None:
    for number in range(1, 5):
        assert power(view(number, reverberation_s=1.0).of(spoken, RATE)) == pytest.approx(power(spoken), rel=1e-3)
    assert np.isfinite(view(reverberation_s=1e-6).of(spoken, RATE)).all()  # the smallest room there is


def test_severity_zero_changes_nothing_and_more_changes_more(spoken: np.ndarray) -> None:
    assert np.array_equal(impair(spoken, 0.0, generator(), RATE), spoken)
    before = analyse(spoken).envelope.std(0).mean()
    spread = [np.mean([analyse(impair(spoken, s, generator(n), RATE)).envelope.std(0).mean() for n in range(8)])
              for s in (0.2, 0.9)]  # fmt: skip
    assert before > spread[0] > spread[1]


def test_every_version_is_another_speaker(spoken: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[Profile] = []
    simulated = augment_audio.simulate

    def watched(waveform: np.ndarray, profile: Profile, *args: Any, **named: Any) -> np.ndarray:
        heard.append(profile)
        return simulated(waveform, profile, *args, **named)

    monkeypatch.setattr(augment_audio, "simulate", watched)
    for number in range(1, 30):
        view(number, dysarthria=0.6).of(spoken, RATE)
    severities = [profile.severity for profile in heard]
    assert 0 <= min(severities) < 0.1
    assert 0.5 < max(severities) <= 0.6
    assert len({profile.kind for profile in heard}) >= 3
    assert len({profile.emphasis for profile in heard}) == len(heard)


def test_one_change_more_leaves_the_others_as_they_were(spoken: np.ndarray) -> None:
    alone, both = (view(speed=0.1, **more).of(spoken, RATE) for more in ({}, {"noise_db": 20.0}))
    assert len(alone) == len(both)
    assert 10 * np.log10(power(alone) / power(both - alone)) > 19.9


@pytest.mark.parametrize("rate", [8_000, 22_050])
def test_other_rates(rate: int, spoken: np.ndarray) -> None:
    waveform = np.ascontiguousarray(change_speed(spoken, RATE / rate))
    for changes in KEEPING.values():
        assert len(view(**changes).of(waveform, rate)) == len(waveform)
    slow = view(dysarthria=0.5).of(waveform, rate)
    assert len(slow) / rate == pytest.approx(len(view(dysarthria=0.5).of(spoken, RATE)) / RATE, rel=0.2)


def test_silence_stays_silent() -> None:
    silence = np.zeros(RATE, np.float32)
    assert np.array_equal(view(**ALL).of(silence, RATE), silence)


# --- the shortest ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("severity", [0.2, 0.5, 1.0])
def test_hurried_speech_is_never_shorter_than_said(severity: float, spoken: np.ndarray) -> None:
    kind = "hypokinetic"
    emphasis = type(EMPHASIS[kind])(**{k: v * MOST_EMPHASIS for k, v in vars(EMPHASIS[kind]).items()})
    no_pauses = Profile(severity, kind, type(emphasis)(**{**vars(emphasis), "pauses": 0.0}))
    loud = generator().normal(0, 0.1, len(spoken)).astype(np.float32)  # spoken from end to end
    shares = [len(simulate(loud, no_pauses, generator(n), sample_rate=RATE)) / len(loud) for n in range(40)]
    least = (shortest_share(severity) * len(loud) - 80) / len(loud)
    assert least <= min(shares) < least + 0.05
    assert shortest_s(2.0, AugmentConfig(dysarthria=severity)) == pytest.approx(2 * shortest_share(severity) - 0.005)


def test_the_shortest_is_as_it_is_without_changes_of_time() -> None:
    assert shortest_s(0.7, AugmentConfig(tempo=0.5, pitch=1, noise_db=0)) == 0.7
    assert shortest_s(1.1, AugmentConfig(speed=0.1)) == pytest.approx(1.0)


@pytest.mark.parametrize(("key", "value"), [("speed", 0.99), ("dysarthria", 1.0)])
def test_a_text_that_the_shortest_version_cannot_hold_is_refused(
    corpus: Corpus, tmp_path: Path, key: str, value: float
) -> None:
    job = job_for(corpus, tmp_path, augment={key: value})
    place, named = max(enumerate(job.train), key=lambda item: item[1].duration)
    letters = "ABC" * 20
    frames = int(named.duration * 25)
    changed = [*job.train]
    changed[place] = named.model_copy(update={"text": letters[: frames - 1], "prompt": "long"})
    job.train = changed
    with pytest.raises(CorpusError, match=rf"too short for CTC.*{named.recording}.*or without augment.{key}\."):
        fit(job, quiet=True)
    plain = job_for(corpus, tmp_path, train={"stages": [{"epochs": 1, "peak_lr": 1e-3}]})
    plain.train = job.train
    fit(plain, quiet=True)


@pytest.mark.parametrize("key", ["speed", "dysarthria"])
def test_cached_frames_do_not_move(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"augment\.{key} moves frames"):
        tiny_config(objective={"ctc_kd": 1.0}, augment={key: 0.1})
    tiny_config(objective={"decoder_kd": 1.0}, augment={key: 0.1})
    tiny_config(objective={"ctc_kd": 1.0}, augment={"pitch": 1, "noise_db": 10, "reverberation_s": 0.3})


# --- what is served ----------------------------------------------------------------------------------------------


def data_of(job: Any, **features: Any) -> TrainingData:
    student = Student(job.config.model, job.tokenizer.size, job.config.features.model_copy(update=features))
    return TrainingData(job.train, student.front_end, job.tokenizer, augmentation=job.config.augment, seed=5)


def rows(data: TrainingData, epochs: int = 3) -> list[torch.Tensor]:
    return [data[(e, i)]["features"] for e in range(epochs) for i in (*range(len(data)), len(data) + 1)]


def same(one: list[torch.Tensor], two: list[torch.Tensor]) -> bool:
    return all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_off_is_as_before_whatever_the_number_of_views(corpus: Corpus, tmp_path: Path) -> None:
    plain, many = (data_of(job_for(corpus, tmp_path, augment=more)) for more in ({}, {"views": 9}))
    assert audio_part(AugmentConfig(views=9, tempo=0.2, noise=1.0)) is None
    assert {many.view(e, i) for e in range(10) for i in range(len(many))} == {None}
    assert same(rows(plain), rows(many))
    still = data_of(job_for(corpus, tmp_path, augment=STILL))
    assert all(torch.equal(still[(e, 1)]["features"], torch.from_numpy(still.features(1))) for e in range(3))


@pytest.mark.parametrize("normalisation", ["per_recording", "global"])
def test_two_datas_serve_the_same_rows(corpus: Corpus, tmp_path: Path, normalisation: str) -> None:
    job = job_for(corpus, tmp_path, augment=ALL)
    served = rows(data_of(job, normalisation=normalisation))
    training_data.features_of.cache_clear()
    backwards = data_of(job, normalisation=normalisation)
    again = [[backwards[(e, i)]["features"] for i in (*range(len(backwards)), len(backwards) + 1)] for e in (2, 1, 0)]
    assert same(served, [row for epoch in reversed(again) for row in epoch])


@pytest.mark.parametrize("normalisation", ["per_recording", "global"])
def test_views_come_in_turn_and_are_made_once(
    corpus: Corpus, tmp_path: Path, normalisation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[str, int]] = []
    of = View.of

    def watched(self: View, *args: Any) -> np.ndarray:
        made.append((self.recording, self.number))
        return of(self, *args)

    monkeypatch.setattr(View, "of", watched)
    training_data.features_of.cache_clear()
    three = job_for(corpus, tmp_path, augment={**STILL, "noise_db": 5.0, "views": 3})
    data = data_of(three, normalisation=normalisation)
    numbers = [[(v.number if (v := data.view(e, i)) else 0) for i in range(len(data))] for e in range(6)]
    assert all(
        sorted({numbers[e][i] for e in range(s, s + 3)}) == [0, 1, 2] for i in range(len(data)) for s in range(3)
    )
    assert all(set(epoch) == {0, 1, 2} for epoch in numbers)
    assert data.view(0, 1) != data.view(0, 1 + len(data)) != data.view(0, 1 + 2 * len(data))
    for epoch in range(6):
        for index in range(len(data)):
            served = data[(epoch, index)]["features"]
            assert torch.equal(served, torch.from_numpy(data.features(index))) == (numbers[epoch][index] == 0)
    assert len(made) == len(set(made)) == 2 * len(data)


def test_without_augmentation_recordings_are_as_they_are(corpus: Corpus, tmp_path: Path) -> None:
    data = data_of(job_for(corpus, tmp_path, augment=ALL))
    bare = data_of(job_for(corpus, tmp_path, augment=STILL))
    for index in range(len(data)):
        data[(index % 4, index)]
        assert torch.equal(data.plain()[(3, index)]["features"], bare[(0, index)]["features"])
    bare_spread = {r.recording: float(bare.features(i).std()) for i, r in enumerate(bare.recordings)}
    assert data.spread == bare_spread
    assert data.opened == {r.recording: r.audio_filepath for r in data.recordings}


def test_features_are_those_of_the_changed_audio_and_changed_again(corpus: Corpus, tmp_path: Path) -> None:
    data = data_of(job_for(corpus, tmp_path, augment={**STILL, "pitch": 2.0}))
    epoch = next(e for e in range(4) if data.view(e, 0) is not None)
    heard = data.view(epoch, 0)
    assert heard is not None
    waveform = torch.from_numpy(heard.of(read_audio(data.recordings[0].audio_filepath), RATE))[None]
    features, lengths = data.front_end(waveform, torch.tensor([waveform.shape[1]]))
    assert torch.equal(data[(epoch, 0)]["features"], features[0, : int(lengths[0])])
    masked = data_of(job_for(corpus, tmp_path, augment={"pitch": 2.0}))
    assert not torch.equal(masked[(epoch, 0)]["features"], data[(epoch, 0)]["features"])


def test_a_waveform_front_end_hears_the_versions(corpus: Corpus, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from xded.models.hugging_face import HuggingFaceFrontEnd

    front_end = HuggingFaceFrontEnd(
        {"feature_extractor_type": "Wav2Vec2FeatureExtractor", "sampling_rate": RATE, "feature_size": 1,
         "do_normalize": True}
    )  # fmt: skip
    job = job_for(corpus, tmp_path, augment={"noise_db": 0.0, "speed": 0.1, "views": 2})
    data = TrainingData(job.train, front_end, job.tokenizer, augmentation=job.config.augment)
    one, two, three = (data[(epoch, 0)]["features"] for epoch in (0, 1, 2))
    assert torch.equal(one, three)  # masks and noise of features are not for waveforms
    assert len(one) != len(two)


# --- runs --------------------------------------------------------------------------------------------------------


class KilledError(BaseException):
    """Stands in for the end of the process."""


def test_a_run_that_goes_on_is_bit_identical(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sections: dict[str, Any] = {
        "augment": {**ALL, "views": 3}, "train": {"stages": [{"epochs": 4, "peak_lr": 1e-3}], "save_every_steps": 1},
    }  # fmt: skip
    step = Loop.training_step
    heard: list[torch.Tensor] = []

    def training_step(self: Loop, batch: Any, batch_idx: int) -> torch.Tensor:
        heard.append(batch.features)
        if len(heard) == killed_in:
            raise KilledError
        return step(self, batch, batch_idx)

    monkeypatch.setattr(Loop, "training_step", training_step)
    killed_in = -1
    unbroken = load(fit(job_for(corpus, tmp_path / "a", **sections), quiet=True))["model_state_dict"]
    whole, heard, killed_in = heard, [], 9
    with pytest.raises(KilledError):
        fit(job_for(corpus, tmp_path / "b", **sections), quiet=True)
    training_data.features_of.cache_clear()
    heard, killed_in = [], -1
    resumed = load(fit(job_for(corpus, tmp_path / "b", **sections), resume=True, quiet=True))["model_state_dict"]
    assert 0 < len(heard) < len(whole)
    assert same(heard, whole[-len(heard) :])
    assert all(torch.equal(unbroken[name], resumed[name]) for name in unbroken)


def test_a_global_normaliser_is_fitted_to_recordings_as_they_are(corpus: Corpus, tmp_path: Path) -> None:
    sections: dict[str, Any] = {
        "features": {"normalisation": "global"}, "train": {"stages": [{"epochs": 2, "peak_lr": 1e-3}]},
    }  # fmt: skip
    plain, changed = (
        load(fit(job_for(corpus, tmp_path / str(n), augment=augment, **sections), quiet=True))["model_state_dict"]
        for n, augment in enumerate(({}, {"noise_db": 0.0, "speed": 0.1}))
    )
    normaliser = [name for name in plain if name.endswith(("front_end.mean", "front_end.std"))]
    assert len(normaliser) == 2
    assert all(torch.equal(plain[name], changed[name]) for name in normaliser)
    assert any(not torch.equal(plain[name], changed[name]) for name in plain)


# --- the same simulator --------------------------------------------------------------------------------------------


def test_corpora_say_that_they_were_simulated(corpus: Corpus, tmp_path: Path) -> None:
    assert {r.simulated_by for r in corpus.recordings} == {None}
    assert "simulated_by" not in corpus.path.read_text()
    made = read_corpus(simulate_corpus(corpus, tmp_path / "simulated", {"t1": 0.5, "t2": 0.0}))
    assert {(r.speaker, r.simulated_by) for r in made.recordings} == {("t1", "simulator"), ("t2", None)}
    own = read_corpus(make_embedded_corpus(tmp_path / "own", controls=1, targets=1, words=2, takes=1))
    assert {r.simulated_by for r in own.recordings} == {"synthesiser"}


def test_one_simulator_for_training_and_test_is_noted(corpus: Corpus, tmp_path: Path) -> None:
    made = read_corpus(simulate_corpus(corpus, tmp_path / "simulated", {"t1": 0.3, "t2": 0.3}))

    def notes(on: Corpus, name: str, held_out: str = "t2", **augment: Any) -> list[str]:
        job = job_for(on, tmp_path / name, augment=augment, fold={"held_out": [held_out]},
                      train={"stages": [{"epochs": 1, "peak_lr": 1e-3}]})  # fmt: skip
        job.config = job.config.model_copy(update={"corpus": on.path})
        fit(job, quiet=True)
        found = json.loads((job.out / "findings.json").read_text())["findings"]
        return [f["what"] for f in found if f["check"] == "same-simulator"]

    (said,) = notes(made, "both", dysarthria=0.4)
    assert "augment.dysarthria is 0.4" in said
    assert "our own simulator" in said
    assert notes(made, "without") == []
    assert notes(corpus, "real", dysarthria=0.4) == []
    test_alone = read_corpus(simulate_corpus(corpus, tmp_path / "test", {"t1": 0.0, "t2": 0.3}))
    assert len(notes(test_alone, "test alone", dysarthria=0.4)) == 1


def test_the_finding_counts_what_was_made_and_by_what() -> None:
    (found,) = same_simulator(0.5, ["simulator", None, "synthesiser", "simulator"], "student")
    assert found.severity == "note"
    assert "3 recordings were made by our own simulator and synthesiser" in found.what
    assert same_simulator(0.0, ["simulator"], "student") == same_simulator(0.5, [None], "student") == []
