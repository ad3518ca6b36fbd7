"""Whom to believe about a recording: weights, the best of them, and evidence from other recordings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from xded.config import TargetConfig, Weighting
from xded.corpus.manifest import Recording
from xded.errors import ConfigError
from xded.targets.aggregate import top_k
from xded.targets.asking import PARENT
from xded.targets.store import Entry, Posterior, TargetError
from xded.targets.weighting import (
    CLOSENESS_SCALE,
    Evidence,
    accuracies,
    closeness_of,
    confidence,
    fits,
    need_sense,
    weigh,
)

TEACHERS = ("a", "b", "c")
WORDS = ("AB", "BAD", "CAB", "DA")
WEIGHTINGS: tuple[Weighting, ...] = get_args(Weighting)


def spoken(speaker: str, word: str, take: int = 0, mic: str = "M1", band: Any = "low") -> Recording:
    name = f"{speaker}_{word}_{take}"
    return Recording(
        audio_filepath=Path("/a") / f"{name}_{mic}", duration=1.0, text=word, recording=f"{name}_{mic}",
        speaker=speaker, take=name, prompt=word, mic=mic, band=band,
    )  # fmt: skip


RECORDINGS = tuple(spoken(speaker, word, take) for speaker in TEACHERS for word in WORDS for take in (0, 1))


def entry(recording: Recording, log_prob: float | None = -1.0, text: str | None = "") -> Entry:
    return Entry(recording.recording, "a" * 64, 2, true_log_prob=log_prob, text=text)


def posterior(seed: int) -> Posterior:
    logits = np.random.default_rng(seed).normal(0, 2, (4, 20))
    soft = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return top_k(soft.astype(np.float32), 5, np.zeros(4))


def said_by(log_probs: Mapping[str, float]) -> dict[str, list[Entry]]:
    """Every teacher about every recording: right where its speaker's number is even, as probable as is given."""
    return {
        teacher: [
            entry(r, log_probs[teacher] - 0.1 * place, r.text.lower() if place % (2 + number) else "X")
            for place, r in enumerate(RECORDINGS)
        ]
        for number, teacher in enumerate(log_probs)
    }


def evidence_of(said: Mapping[str, Sequence[Entry]], voices: Mapping[str, np.ndarray] | None = None) -> Evidence:
    random = np.random.default_rng(3)
    voices = voices or {speaker: random.normal(5.0, 1.0, 8) for speaker in TEACHERS}
    bands = {"a": "low", "b": "high", "c": None}
    return Evidence(bands, accuracies(said, RECORDINGS, "upper"), fits(said, RECORDINGS), closeness_of(voices, said))


def weights_of(how: Weighting, said: Mapping[str, Sequence[Entry]], **options: Any) -> dict[str, float]:
    """About the first recording."""
    about = {teacher: rows[0] for teacher, rows in said.items()}
    posteriors = {teacher: posterior(ord(teacher[0])) for teacher in said}
    evidence = options.pop("evidence", None) or evidence_of(said)
    return weigh(how, RECORDINGS[0], about, posteriors, evidence, **options)


# --- properties of every weighting ---------------------------------------------------------------------------


@pytest.mark.parametrize("how", WEIGHTINGS)
def test_the_order_of_the_teachers_changes_nothing(how: Weighting) -> None:
    said = said_by({"a": -0.5, "b": -1.0, "c": -3.0})
    turned = dict(reversed(said.items()))
    for best in (None, 1, 2):
        assert weights_of(how, said, best=best) == weights_of(how, turned, best=best)


@pytest.mark.parametrize("how", WEIGHTINGS)
def test_teachers_who_are_the_same_weigh_the_same(how: Weighting) -> None:
    others = [r for r in RECORDINGS if r.speaker == "c"]
    same = {t: [entry(r, -1.0 - 0.1 * i, r.text if i % 2 else "X") for i, r in enumerate(others)] for t in ("a", "b")}
    evidence = Evidence(
        {"a": "mid", "b": "mid"}, accuracies(same, RECORDINGS, "upper"), fits(same, RECORDINGS),
        closeness_of({"a": np.array([1.0, 0.0]), "b": np.array([1.0, 0.0]), "c": np.array([0.0, 2.0])}, same),
    )  # fmt: skip
    posteriors = dict.fromkeys(same, posterior(1))
    weights = weigh(how, others[0], {t: rows[0] for t, rows in same.items()}, posteriors, evidence)
    assert weights["a"] == weights["b"] > 0


@pytest.mark.parametrize("how", WEIGHTINGS)
def test_the_best_of_all_are_all(how: Weighting) -> None:
    said = said_by({"a": -0.5, "b": -1.0, "c": -3.0})
    everyone = weights_of(how, said)
    assert weights_of(how, said, best=3) == everyone
    assert weights_of(how, said, best=99) == everyone
    for count in (1, 2):
        kept = weights_of(how, said, best=count)
        assert len(kept) == count
        assert kept.items() <= everyone.items()
        assert min(kept.values()) >= max((w for t, w in everyone.items() if t not in kept), default=0.0)


# --- one weighting after the other ---------------------------------------------------------------------------


def test_weights_from_the_recording_itself() -> None:
    known = {t: [entry(RECORDINGS[0], p)] for t, p in {"a": math.log(0.5), "b": math.log(0.25), "c": -100.0}.items()}
    evidence = Evidence(bands={"a": "low", "b": "high", "c": None})
    assert weights_of("uniform", known, evidence=evidence) == {"a": 1.0, "b": 1.0, "c": 1.0}
    reliability = weights_of("reliability", known, evidence=evidence)
    assert (reliability["a"], reliability["b"]) == (pytest.approx(0.5), pytest.approx(0.25))
    assert 0 < reliability["c"] < 1e-9
    by_band = {"a": 1.0, "b": pytest.approx(1 / 3), "c": pytest.approx(1 / 3)}
    assert weights_of("band", known, evidence=evidence) == by_band
    by_confidence = {t: pytest.approx(confidence(posterior(ord(t)))) for t in known}
    assert weights_of("confidence", known, evidence=evidence) == by_confidence


def test_confidence_is_one_when_certain_and_zero_when_uniform() -> None:
    certain = Posterior(np.array([[1, 2]]), np.array([[1.0, 0.0]]), np.zeros(1), np.zeros(1))
    blank = Posterior(np.array([[1, 2]]), np.array([[1 / 3, 1 / 3]]), np.array([1 / 3]), np.zeros(1))
    assert confidence(certain) == pytest.approx(1.0)
    assert confidence(blank) == pytest.approx(0.0, abs=1e-6)


def test_the_best_of_the_hopeless_is_the_least_hopeless() -> None:
    """Weights below the least one are lifted to it, and must be told apart before."""
    known = {t: [entry(RECORDINGS[0], p)] for t, p in {"a": -80.0, "b": -40.0, "c": -60.0}.items()}
    assert list(weights_of("reliability", known, best=1, evidence=Evidence())) == ["b"]


def test_of_equal_teachers_the_first_name_is_the_best() -> None:
    known = {t: [entry(RECORDINGS[0])] for t in ("c", "b", "a")}
    assert list(weights_of("reliability", known, best=1, evidence=Evidence())) == ["a"]


def test_reliability_without_a_noted_probability_is_refused() -> None:
    known = {"a": [entry(RECORDINGS[0], None)], "b": [entry(RECORDINGS[0])]}
    with pytest.raises(TargetError, match="how probable teacher a found the true text") as error:
        weights_of("reliability", known, evidence=Evidence())
    assert "uniform, confidence or band" in error.value.remedy


# --- accuracy ------------------------------------------------------------------------------------------------


def test_accuracy_is_of_other_speakers_training_recordings() -> None:
    said = {"a": [entry(r, text=r.text.lower() if r.speaker == "b" else "X") for r in RECORDINGS]}
    assert accuracies(said, RECORDINGS, "upper") == {"a": (8 + 1) / (16 + 2)}
    own_right = {"a": [entry(r, text=r.text if r.speaker == "a" else "X") for r in RECORDINGS]}
    assert accuracies(own_right, RECORDINGS, "upper") == {"a": 1 / 18}  # never 0
    assert accuracies({PARENT: own_right["a"]}, RECORDINGS, "upper") == {PARENT: 9 / 26}  # it has no own speaker


def test_accuracy_hears_nothing_of_recordings_that_do_not_train() -> None:
    said = {"a": [entry(r, text=r.text) for r in RECORDINGS]}
    strangers = [entry(spoken("held_out", word), text="X") for word in WORDS]
    assert accuracies({"a": [*said["a"], *strangers]}, RECORDINGS, "upper") == accuracies(said, RECORDINGS, "upper")


def test_accuracy_without_texts_or_others_is_refused() -> None:
    silent = {"a": [entry(r, text=None) for r in RECORDINGS]}
    with pytest.raises(TargetError, match="what teacher a heard in b_AB_0") as error:
        accuracies(silent, RECORDINGS, "upper")
    assert "uniform, confidence or band" in error.value.remedy
    alone = {"a": [entry(r) for r in RECORDINGS if r.speaker == "a"]}
    with pytest.raises(TargetError, match="own speaker only"):
        accuracies(alone, RECORDINGS, "upper")


# --- likelihood ----------------------------------------------------------------------------------------------


def likelihood(said: Mapping[str, Sequence[Entry]], about: Recording, recordings: Sequence[Recording]) -> dict:
    entries = {t: next(e for e in rows if e.recording == about.recording) for t, rows in said.items()}
    return weigh("likelihood", about, entries, {}, Evidence(fit=fits(said, recordings)))


def test_likelihood_leaves_the_take_out_and_nothing_else() -> None:
    """Another microphone's copy of the take is the same evidence."""
    recordings = [spoken("a", w, take, mic) for w in WORDS for take in (0, 1) for mic in ("M1", "M2")]
    recordings += [spoken("b", w) for w in WORDS]
    about, copy, other = recordings[0], recordings[1], recordings[2]
    assert copy.take == about.take != other.take

    def with_log_probs(**changed: float) -> dict[str, Sequence[Entry]]:
        rows = [entry(r, changed.get(r.recording, -0.01 * i)) for i, r in enumerate(recordings)]
        return {"a": rows, "b": [entry(r, -2.0) for r in recordings]}

    before = likelihood(with_log_probs(), about, recordings)
    expected = np.mean([-0.01 * i for i, r in enumerate(recordings) if r.speaker == "a" and r.take != about.take])
    assert before == {"a": pytest.approx(math.exp(expected)), "b": pytest.approx(math.exp(-2.0))}
    for unheard in (about, copy, spoken("b", "AB")):
        after = likelihood(with_log_probs(**{unheard.recording: -50.0}), about, recordings)
        assert after == pytest.approx(before)
    assert likelihood(with_log_probs(**{other.recording: -5.0}), about, recordings)["a"] < before["a"]


def test_likelihood_hears_nothing_of_recordings_that_do_not_train() -> None:
    train = [r for r in RECORDINGS if r.take != "a_DA_1"]
    said = {"a": [entry(r, -1.0) for r in RECORDINGS]}
    changed = {"a": [entry(r, -1.0 if r in train else -90.0) for r in RECORDINGS]}
    assert likelihood(said, RECORDINGS[0], train) == likelihood(changed, RECORDINGS[0], train)


def test_a_speakers_only_take_tells_no_teachers_apart() -> None:
    only = spoken("d", "AB")
    said = {"a": [entry(only, -1.0)], "b": [entry(only, -9.0)]}
    assert likelihood(said, only, [only]) == {"a": 1.0, "b": 1.0}


def test_a_teacher_who_was_asked_about_one_recording_only_is_refused() -> None:
    said = {"a": [entry(r) for r in RECORDINGS], "b": [entry(RECORDINGS[0])]}
    with pytest.raises(TargetError, match="how teacher b understands a, and it was only asked about 'a_AB_0_M1'"):
        likelihood(said, RECORDINGS[0], RECORDINGS)
    with pytest.raises(TargetError, match="how probable teacher a found"):
        fits({"a": [entry(RECORDINGS[0], None)]}, RECORDINGS)


# --- embedding -----------------------------------------------------------------------------------------------


def test_closeness_of_voices() -> None:
    voices = {"a": np.array([9.0, 1.0]), "b": np.array([9.0, 0.5]), "c": np.array([9.0, -1.5]), "k": np.array([9.0, 0])}
    near = closeness_of(voices, (*TEACHERS, PARENT))
    twin, opposite = math.exp(1 / CLOSENESS_SCALE), math.exp(-1 / CLOSENESS_SCALE)
    assert near["a"] == {"a": pytest.approx(twin), "b": pytest.approx(twin), "c": pytest.approx(opposite), PARENT: 1.0}
    assert set(near["k"].values()) == {1.0}  # just like the mean of all: like nobody in particular
    for speaker in TEACHERS:
        assert near[speaker][speaker] == max(near[speaker].values())
    moved = closeness_of({s: v + 100.0 for s, v in voices.items()}, TEACHERS)  # what all have in common
    assert moved["c"] == pytest.approx({t: near["c"][t] for t in TEACHERS})


def test_one_voice_alone_is_like_no_other() -> None:
    assert closeness_of({"a": np.array([3.0, 4.0])}, ["a"]) == {"a": {"a": 1.0}}


def test_a_teacher_without_a_voice_is_refused() -> None:
    with pytest.raises(TargetError, match="no training recording of z") as error:
        closeness_of({"a": np.ones(2)}, ["a", "z"])
    assert "likelihood" in error.value.remedy


# --- what goes together ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("choices", "problem"),
    [
        ({"heard": "same_prompt", "weighting": "accuracy"}, "each has heard its own speaker only"),
        ({"heard": "same_prompt", "weighting": "likelihood"}, "each has heard its own speaker only"),
        ({"heard": "same_prompt", "asked": "own"}, "the parent has no speaker to hear"),
        ({"best": 1}, "takes every teacher for as good as any other"),
        ({"asked": "own", "coverage": "strict"}, "counts teachers"),
    ],
)
def test_choices_that_do_not_go_together_are_refused(choices: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        need_sense(TargetConfig(**choices))
    need_sense(TargetConfig())
