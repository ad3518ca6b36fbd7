"""What teachers spell and recognise: each check finds its fault, and says nothing of healthy or merely poor ones."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest

from made_targets import (
    KINDS,
    RATE_HZ,
    TEACHERS,
    TOKENIZER,
    WHERE,
    Made,
    averages,
    make,
    only,
    permuted,
    shifted,
    spelled,
)
from xded.checks import posteriors
from xded.checks import teachers as spelling
from xded.findings import Finding
from xded.targets.store import Kind
from xded.tokenizer import Tokenizer


@pytest.fixture
def made() -> Made:
    return make()


# --- what they spell ------------------------------------------------------------------------------------------


def test_the_blank_is_that_of_the_tokenizer_and_found_without_it(made: Made) -> None:
    """A blank behind the last piece, and <unk> elsewhere, as with the tokenizers of NeMo and wav2vec 2.0."""
    last = Tokenizer(json.dumps(list(TOKENIZER.pieces[3:])).encode(), "upper")
    moved = np.array([last.blank, last.bos, last.eos, *range(TOKENIZER.size - 3)])  # id of each piece in `last`
    said = {name: replace(p, ids=moved[p.ids]) for name, p in made.said["ctc"]["T1"].items()}
    assert spelling.blank_of(said.values()) == last.blank == TOKENIZER.size - 3
    assert spelling.blank_of(made.said["ctc"]["T1"].values()) == TOKENIZER.blank
    assert spelling.blank_of([]) is None
    index = made.index("ctc", "T1").model_copy(update={"vocabulary": last.size})
    for name, posterior in said.items():
        before = made.said["ctc"]["T1"][name]
        assert spelling.text_of(posterior, "ctc", last) == spelling.text_of(before, "ctc", TOKENIZER)
        tokens = moved[made.tokens[name]].tolist()
        wanted = posteriors.true_log_prob(before, made.tokens[name], index, TOKENIZER)
        assert posteriors.true_log_prob(posterior, tokens, index, last) == pytest.approx(wanted)
    sharpness = posteriors.sharpness({"T1": said}, {"T1": 2.0}, last.size, last.blank, WHERE)
    assert sharpness == []
    only(posteriors.sharpness({"T1": said}, {"T1": 1.0}, last.size, last.blank, WHERE), "temperature", "refuse")


@pytest.mark.parametrize("by", [-1, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_token_ids_that_are_one_off(made: Made, kind: Kind, by: int) -> None:
    said = shifted(made.averages[kind], by)
    found = only(spelling.target_text(said, kind, TOKENIZER, made.texts, WHERE), "token-offset", "refuse")
    assert found.evidence["shift"] == -by
    assert found.points > 90
    assert f"{-by:+d} is added to every id" in found.what


@pytest.mark.parametrize("kind", KINDS)
def test_targets_that_say_other_recordings_words(made: Made, kind: Kind) -> None:
    said = permuted(made.averages[kind])
    found = only(spelling.target_text(said, kind, TOKENIZER, made.texts, WHERE), "target-text", "refuse")
    assert found.evidence["listed"] == 72
    assert found.evidence["right"] < 15
    assert found.evidence["roll"] is None


def test_targets_that_are_two_recordings_late(made: Made) -> None:
    names = list(made.averages["ctc"])
    late = {name: made.averages["ctc"][names[i - 2]] for i, name in enumerate(names)}
    found = only(spelling.target_text(late, "ctc", TOKENIZER, made.texts, WHERE), "target-text", "refuse")
    assert found.evidence["roll"] == -2
    assert "the recording -2 places away" in found.what


def test_poor_targets_are_not_wrong_ones(made: Made) -> None:
    blank, half = {}, {}
    for i, (name, p) in enumerate(made.averages["ctc"].items()):
        silent = replace(p, ids=np.where(p.ids == p.ids[0, :1], 0, p.ids) * 0, probabilities=p.probabilities)
        blank[name] = silent
        half[name] = p if i % 2 else silent
    one = dict.fromkeys(made.texts, made.averages["ctc"]["T1_BAD_1"])
    for said in (blank, half, one):
        assert spelling.target_text(said, "ctc", TOKENIZER, made.texts, WHERE) == []


def test_spikes_of_teachers_that_were_trained_apart() -> None:
    random = np.random.default_rng(0)
    rows = spelled(make())
    apart = {
        t: {n: replace(s, frames=tuple(f + int(random.integers(-2, 3)) for f in s.frames)) for n, s in r.items()}
        for t, r in rows.items()
    }
    found = only(spelling.spike_misalignment(apart, RATE_HZ, WHERE), "spike-misalignment", "warn")
    assert 1.2 < found.evidence["frames_apart"] < 2.0
    assert found.evidence["labels"] > 200


def test_one_teacher_that_is_late() -> None:
    made = make(lags={"T2": 3})
    found = only(spelling.spike_misalignment(spelled(made), RATE_HZ, WHERE), "spike-misalignment", "warn")
    assert found.evidence["lag_frames"] == {"T1": 0.0, "T2": 3.0, "T3": 0.0}
    assert "'T2' is 3.0 frames from the others" in found.what
    lost = only(spelling.blank_average(spelled(make(lags={"T2": 3, "T3": -3})), averages(make(
        lags={"T2": 3, "T3": -3})), WHERE), "blank-average", "warn")  # fmt: skip
    assert lost.evidence["lost"] > 0.5 * lost.evidence["labels"]


def test_an_average_that_is_empty_where_every_teacher_speaks(made: Made) -> None:
    empty = {name: spelling.Spikes((), ()) for name in made.texts}
    found = only(spelling.blank_average(spelled(made), empty, WHERE), "blank-average", "warn")
    assert (found.evidence["empty"], found.evidence["spoken"]) == (72, 72)


def test_teachers_that_spell_nothing_alike_are_not_compared(made: Made) -> None:
    rows = {t: {n: spelling.Spikes((i,), (5 * i,)) for n in made.texts} for i, t in enumerate(TEACHERS, start=5)}
    assert spelling.spike_misalignment(rows, RATE_HZ, WHERE) == []


# --- what teachers recognise -------------------------------------------------------------------------------


def counts(own: Mapping[str, int], others: Mapping[str, int], of: int = 25) -> dict[str, dict[str, tuple[int, int]]]:
    return {t: {s: (own[t] if s == t else others[t], of) for s in TEACHERS} for t in TEACHERS}


def accuracy(rows: spelling.Counts) -> list[Finding]:
    return spelling.teacher_accuracy(rows, 0.1, "a test", WHERE)


def test_a_teacher_that_knows_nothing_among_others_that_do() -> None:
    rows = counts({"T1": 24, "T2": 1, "T3": 23}, {"T1": 18, "T2": 1, "T3": 17})
    found = only(accuracy(rows), "teacher-accuracy", "warn")
    assert found.evidence["broken"] == ["T2"]
    assert found.evidence["teachers"]["T2"] == {"own": [1, 25], "others": [2, 50]}


@pytest.mark.parametrize(
    ("own", "others", "said"),
    [
        ({"T1": 0, "T2": 1, "T3": 0}, {"T1": 0, "T2": 0, "T3": 1}, "No teacher recognises more than chance"),
        ({"T1": 24, "T2": 1, "T3": 23}, {"T1": 2, "T2": 2, "T3": 2}, "1 of 3 teachers are at chance"),
        ({"T1": 24, "T2": 22, "T3": 23}, {"T1": 6, "T2": 7, "T3": 5}, "92 % right on their own speaker and 24 %"),
    ],
)
def test_weak_teachers_are_noted(own: dict[str, int], others: dict[str, int], said: str) -> None:
    assert said in only(accuracy(counts(own, others)), "teacher-accuracy", "note").what


def test_good_teachers_and_too_few_recordings_say_nothing() -> None:
    assert accuracy(counts(dict.fromkeys(TEACHERS, 24), dict.fromkeys(TEACHERS, 17))) == []
    assert accuracy(counts(dict.fromkeys(TEACHERS, 0), dict.fromkeys(TEACHERS, 0), of=4)) == []


def heard(forced: bool, wrong: int, free_right: int, of: int = 40) -> list[spelling.Heard]:
    """Predictions that are (or, for one recording, are not) the teacher-forced texts."""
    rows = []
    for n in range(of):
        told = "BAT" if n < wrong else "BAD"
        said = told if forced or n else "CAB"
        rows.append(spelling.Heard(said, told, "BAD" if n < free_right else "X", "BAD"))
    return rows


@pytest.mark.parametrize(("mode", "wrong"), [("ctc", 0), ("ctc", 8), ("decoder", 8)])
def test_predictions_that_were_told_the_true_text(mode: str, wrong: int) -> None:
    rows = {"T1": heard(True, wrong, 20), "T2": heard(False, wrong, 20)}
    found = only(spelling.forced_predictions(rows, mode, WHERE), "teacher-forced", "warn")
    assert found.evidence["teachers"] == ["T1"]
    assert found.evidence["right_percent"] == pytest.approx(100 * (40 - wrong) / 40)
    assert found.evidence["ctc_right_percent"] == pytest.approx(50)


def test_predictions_of_a_good_decoder_or_a_good_ctc_head_are_their_own() -> None:
    flawless, alike = {"T1": heard(True, 0, 20)}, {"T1": heard(True, 0, 40)}
    assert spelling.forced_predictions(flawless, "decoder", WHERE) == []
    assert spelling.forced_predictions(alike, "ctc", WHERE) == []
