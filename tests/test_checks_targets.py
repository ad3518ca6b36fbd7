"""Checks of posteriors and targets: each one finds its fault, and says nothing of healthy ones."""

from __future__ import annotations

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
    made_up,
    make,
    only,
    permuted,
    spelled,
)
from xded.checks import posteriors as numbers
from xded.checks import targets as indexes
from xded.checks import teachers as spelling
from xded.targets.store import Entry, Index, Kind, Posterior
from xded.tokenizer import Tokenizer


@pytest.fixture
def made() -> Made:
    return make()


def weighted(made: Made, weights: list[dict[str, float]]) -> Index:
    """The index of the targets with other weights, in turn."""
    index = made.index("ctc")
    rows = [replace(e, weight=weights[i % len(weights)]) for i, e in enumerate(index.recordings)]
    return index.model_copy(update={"recordings": tuple(rows)})


def only_of(teacher: str) -> dict[str, float]:
    return {name: 1.0 if name == teacher else 1e-10 for name in TEACHERS}


# --- healthy ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_healthy_targets_have_no_finding(seed: int) -> None:
    made = make(seed)
    every = made.indexes()
    durations_s = {r.recording: r.duration for r in made.recordings}
    steps = {name: len(tokens) for name, tokens in made.tokens.items()}
    hashes = {r.recording: [str(r.audio_sha256)] for r in made.recordings}
    found = [
        *indexes.audio_hashes(every, hashes, WHERE),
        *indexes.frame_counts(every, durations_s, steps, WHERE),
        *indexes.temperature(every, {"run": 2.0}, WHERE),
        *indexes.tokenizers(every, {"run": TOKENIZER.fingerprint}, {"a file": TOKENIZER}, WHERE),
        *spelling.spike_misalignment(spelled(made), RATE_HZ, WHERE),
        *spelling.blank_average(spelled(made), averages(made), WHERE),
        *numbers.sharpness(made.said["ctc"], dict.fromkeys(TEACHERS, 2.0), TOKENIZER.size, TOKENIZER.blank, WHERE),
    ]
    for kind in KINDS:
        index, said, average = made.index(kind), made.said[kind], made.averages[kind]
        found += [
            *indexes.effective_teachers(index, WHERE),
            *indexes.coverage(index, made.recordings, WHERE),
            *indexes.frames_of_other_recordings(index, WHERE),
            *indexes.copied_hashes(index.teacher_hashes, WHERE),
            *indexes.teacher_forced(index, steps, 1.0, 1.0, WHERE),
            *numbers.normalisation({**said, "mean": average}, TOKENIZER.size, WHERE),
            *numbers.copied_posteriors(said, WHERE),
            *numbers.aggregate_of_others(average, said, index, WHERE),
            *numbers.rows_of_others(said, made.noted[kind], made.tokens, made.index(kind, "T1"), TOKENIZER, WHERE),
            *spelling.target_text(average, kind, TOKENIZER, made.texts, WHERE),
        ]
    assert found == []


# --- weights, copies, coverage ----------------------------------------------------------------------------


def test_one_teacher_with_all_the_weight(made: Made) -> None:
    found = only(indexes.effective_teachers(weighted(made, [only_of("T2")]), WHERE), "effective-teachers", "warn")
    assert found.evidence["effective"] == pytest.approx(1.0)
    assert "Of 3 teachers 1.00 have a say" in found.what
    assert "'T2' has 100 %" in found.what


def test_one_teacher_that_was_asked_for_is_not_advised_against(made: Made) -> None:
    index = weighted(made, [only_of("T2")])
    elitist = index.model_copy(update={"best": 1, "weighting": "reliability"})
    [asked], [not_asked] = (indexes.effective_teachers(i, WHERE) for i in (elitist, index))
    assert "Weigh them alike" in not_asked.remedy
    assert "Weigh them alike" not in asked.remedy
    assert "target.best 1 asks for one teacher" in asked.remedy


def test_another_teacher_for_every_recording_is_worth_a_note(made: Made) -> None:
    index = weighted(made, [only_of(teacher) for teacher in TEACHERS])
    assert only(indexes.effective_teachers(index, WHERE), "effective-teachers", "note").evidence[
        "effective_overall"
    ] == pytest.approx(3.0)


@pytest.mark.parametrize("weights", [{"T1": 0.9, "T2": 0.1, "T3": 0.1}, {"T1": 1.0, "T2": 0.05, "T3": 0.05}])
def test_reliable_teachers_may_weigh_more(made: Made, weights: dict[str, float]) -> None:
    assert indexes.effective_teachers(weighted(made, [weights]), WHERE) == []


def test_a_single_teacher_is_no_fault(made: Made) -> None:
    index = weighted(made, [{"T1": 1.0}]).model_copy(update={"teachers": ("T1",)})
    assert indexes.effective_teachers(index, WHERE) == []


@pytest.mark.parametrize("weights", [dict.fromkeys(TEACHERS, 0.0), {"T1": -1.0, "T2": 2.0, "T3": 2.0}])
def test_impossible_weights(made: Made, weights: dict[str, float]) -> None:
    index = weighted(made, [weights, dict.fromkeys(TEACHERS, 1.0)])
    found = only(indexes.effective_teachers(index, WHERE), "effective-teachers", "refuse")
    assert found.evidence == {"impossible": 36, "recordings": 72}


def test_one_checkpoint_under_all_names(made: Made) -> None:
    found = only(indexes.copied_hashes(dict.fromkeys(TEACHERS, "a" * 64), WHERE), "copied-teacher", "refuse")
    assert found.evidence["distinct"] == 1
    twice = {**made.index("ctc").teacher_hashes, "T3": made.index("ctc").teacher_hashes["T1"]}
    assert only(indexes.copied_hashes(twice, WHERE), "copied-teacher", "warn").evidence["groups"] == [["T1", "T3"]]


def test_posteriors_of_one_teacher_copied_into_all(made: Made) -> None:
    said = made.said["ctc"]
    found = only(numbers.copied_posteriors(dict.fromkeys(TEACHERS, said["T1"]), WHERE), "copied-teacher", "refuse")
    assert "3 of 3 teachers" in found.what
    assert only(numbers.copied_posteriors({**said, "T3": said["T2"]}, WHERE), "copied-teacher", "warn").evidence[
        "groups"
    ] == [["T2", "T3"]]


@pytest.mark.parametrize(("kept", "severity"), [(0, "refuse"), (30, "warn"), (60, "note")])
def test_training_recordings_without_targets(made: Made, kept: int, severity: str) -> None:
    index = made.index("ctc")
    part = index.model_copy(update={"recordings": index.recordings[:kept]})
    found = only(indexes.coverage(part, made.recordings, WHERE), "target-coverage", severity)
    assert (found.evidence["covered"], found.evidence["of"]) == (kept, 72)


def test_targets_that_were_dropped_are_told_from_those_that_are_missing(made: Made) -> None:
    index, names = made.index("ctc"), [r.recording for r in made.recordings]
    left = {"recordings": index.recordings[40:], "dropped": tuple(names[:40])}
    part = index.model_copy(update=left)
    found = only(indexes.coverage(part, made.recordings, WHERE), "target-coverage", "note")
    assert (found.evidence["dropped"], found.evidence["of"]) == (40, 72)
    part = index.model_copy(update={**left, "recordings": index.recordings[60:]})
    gaps, dropped = indexes.coverage(part, made.recordings, WHERE)
    assert dropped == found
    assert only([gaps], "target-coverage", "warn").evidence["covered"] == 12
    assert gaps.evidence["of"] == 32


def test_a_strict_choice_of_prompts_is_worth_a_note(made: Made) -> None:
    index = made.index("decoder", heard="same_prompt")
    part = index.model_copy(update={"recordings": index.recordings[:20]})
    assert "--coverage all" in only(indexes.coverage(part, made.recordings, WHERE), "target-coverage", "note").remedy


def test_frames_averaged_over_other_recordings(made: Made) -> None:
    found = indexes.frames_of_other_recordings(made.index("ctc", heard="same_prompt"), WHERE)
    assert only(found, "target-coverage", "refuse").evidence["recordings"] == 72
    assert indexes.frames_of_other_recordings(made.index("decoder", heard="same_prompt"), WHERE) == []


def test_speakers_without_any_target(made: Made) -> None:
    rows = made.recordings
    index = made.index("ctc")
    part = index.model_copy(update={"recordings": tuple(e for e in index.recordings if e.recording[:2] != "T3")})
    found = only(indexes.coverage(part, rows, WHERE), "target-coverage", "warn")
    assert (found.evidence["without"], found.evidence["covered"]) == (["T3"], 48)
    controls = [r.model_copy(update={"role": "control"}) if r.speaker == "T3" else r for r in rows]
    assert only(indexes.coverage(part, controls, WHERE), "target-coverage", "note").evidence["without"] == []


# --- audio, lengths -----------------------------------------------------------------------------------------


def test_targets_of_other_audio(made: Made) -> None:
    hashes = {r.recording: [str(r.audio_sha256)] for r in made.recordings}
    names = list(hashes)
    swapped = {**hashes, names[0]: hashes[names[1]], names[1]: hashes[names[0]], names[2]: ["f" * 64]}
    found = only(indexes.audio_hashes(made.indexes(), swapped, WHERE), "audio-hash", "refuse")
    assert (found.evidence["wrong"], found.evidence["of"], found.evidence["of_other_recordings"]) == (3, 72, 2)
    assert len(found.evidence["stores"]) == 8


def test_recordings_that_the_corpus_does_not_know_are_not_judged(made: Made) -> None:
    assert indexes.audio_hashes(made.indexes(), {"another": ["f" * 64]}, WHERE) == []


def lengths_of_others(made: Made, kind: Kind, *teachers: str | None) -> dict[str, Index]:
    """Indexes in which some stores have the steps of other recordings."""
    found = {}
    for teacher in (None, *TEACHERS):
        index = made.index(kind, teacher)
        if teacher in teachers:
            steps = np.random.default_rng(0).permutation([entry.steps for entry in index.recordings]).tolist()
            rows = [replace(entry, steps=n) for entry, n in zip(index.recordings, steps, strict=True)]
            index = index.model_copy(update={"recordings": tuple(rows)})
        found[teacher or "mean"] = index
    return found


def test_frames_of_other_recordings_do_not_fit_the_durations(made: Made) -> None:
    durations_s = {r.recording: r.duration for r in made.recordings}
    every = lengths_of_others(made, "ctc", None, *TEACHERS)
    found = only(indexes.frame_counts(every, durations_s, {}, WHERE), "frame-count", "refuse")
    assert found.evidence["off"] > 50
    assert found.evidence["ratio_low"] < 0.8
    assert found.evidence["ratio_high"] > 1.3
    assert "other recordings" in found.effect


def test_teachers_that_disagree_about_lengths_need_no_corpus(made: Made) -> None:
    found = only(indexes.frame_counts(lengths_of_others(made, "ctc", "T2"), {}, {}, WHERE), "frame-count", "refuse")
    assert "4 sets of ctc posteriors disagree" in found.what
    assert found.evidence["ratio_median"] > 1.2


def test_decoder_targets_of_other_texts(made: Made) -> None:
    steps = {name: len(tokens) for name, tokens in made.tokens.items()}
    every = lengths_of_others(made, "decoder", None, *TEACHERS)
    found = only(indexes.frame_counts(every, {}, steps, WHERE), "frame-count", "refuse")
    assert "decoder targets do not have one step for every token" in found.what
    assert 20 < found.evidence["off"] < 72


def test_a_wrong_frame_rate_is_told_from_other_recordings(made: Made) -> None:
    durations_s = {r.recording: r.duration for r in made.recordings}
    every = {"ctc": made.index("ctc", frame_rate_hz=50.0)}
    found = only(indexes.frame_counts(every, durations_s, {}, WHERE), "frame-count", "refuse")
    assert found.evidence["ratio_median"] == pytest.approx(0.5, abs=0.02)
    assert "frame rate in the index is wrong" in found.effect


def test_a_few_wrong_durations_are_the_manifests(made: Made) -> None:
    many = [made_up(f"r{n}", "T1", "BAD", 2.0) for n in range(300)]
    index = made.index("ctc").model_copy(
        update={"recordings": tuple(Entry(r.recording, str(r.audio_sha256), 50) for r in many)}
    )
    durations_s = {r.recording: r.duration for r in many} | {"r7": 3.0, "r8": 2.05}
    found = only(indexes.frame_counts({"ctc": index}, durations_s, {}, WHERE), "frame-count", "warn")
    assert found.evidence["off"] == 1


# --- temperature, tokenizers ------------------------------------------------------------------------------------


def test_an_objective_with_another_temperature(made: Made) -> None:
    found = only(indexes.temperature(made.indexes(), {"runs/a": 1.0, "runs/b": 2.0}, WHERE), "temperature", "refuse")
    assert (found.evidence["targets"], found.evidence["objective"]) == ([2.0], 1.0)
    assert "runs/a" in found.what
    assert "--temperature 1" in found.remedy


def test_posteriors_of_two_temperatures(made: Made) -> None:
    every = {**made.indexes(), "posteriors/T2/ctc": made.index("ctc", "T2", temperature=1.0)}
    found = only(indexes.temperature(every, {}, WHERE), "temperature", "refuse")
    assert found.evidence["stores"]["1"] == ["posteriors/T2/ctc"]


@pytest.mark.parametrize("declared", [1.0, 4.0])
def test_a_temperature_that_the_numbers_do_not_have(made: Made, declared: float) -> None:
    said = dict.fromkeys(TEACHERS, declared)
    findings = numbers.sharpness(made.said["ctc"], said, TOKENIZER.size, TOKENIZER.blank, WHERE)
    found = only(findings, "temperature", "refuse")
    assert found.evidence["found"] == dict.fromkeys(TEACHERS, 2.0)
    assert f"say T = {declared:g} but are as sharp as T = 2" in found.what


def test_few_entries_of_a_flat_posterior_keep_their_temperature() -> None:
    random = np.random.default_rng(0)
    logits = random.normal(0, 1.0, (200, 40))
    p = np.exp(logits / 2)
    p /= p.sum(1, keepdims=True)
    blank = (np.exp(logits) / np.exp(logits).sum(1, keepdims=True))[:, 0]
    ids = np.argsort(-p, axis=1)[:, :8]
    kept = np.take_along_axis(p, ids, axis=1).astype(np.float32)
    said = {"T1": {"r": Posterior(ids, kept, 1 - kept.sum(1), blank)}}
    assert numbers.sharpness(said, {"T1": 2.0}, 40, 0, WHERE) == []


def test_another_tokenizer_in_a_store_or_a_run(made: Made) -> None:
    every = {**made.indexes(), "posteriors/T2/ctc": made.index("ctc", "T2", tokenizer="e" * 64)}
    found = only(indexes.tokenizers(every, {}, {}, WHERE), "tokenizer-mismatch", "refuse")
    assert found.evidence["fingerprints"]["e" * 12] == ["posteriors/T2/ctc"]
    assert only(
        indexes.tokenizers(made.indexes(), {"runs/a": "d" * 64}, {}, WHERE), "tokenizer-mismatch", "refuse"
    ).evidence["fingerprints"]["d" * 12] == ["runs/a"]


def test_a_given_tokenizer_of_the_same_size_with_other_pieces(made: Made) -> None:
    others = Tokenizer.train([w.translate(str.maketrans("BD", "XY")) for w in made.texts.values()], "char", 64, "upper")
    assert others.size == TOKENIZER.size
    found = only(indexes.tokenizers(made.indexes(), {}, {"x.model": others}, WHERE), "tokenizer-mismatch", "warn")
    assert found.evidence["same_size"] == ["x.model"]
    smaller = Tokenizer.train(["AB"], "char", 64, "upper")
    assert only(indexes.tokenizers(made.indexes(), {}, {"s": smaller}, WHERE), "tokenizer-mismatch", "note")


def test_the_right_tokenizer_read_with_another_normaliser(made: Made) -> None:
    lower = TOKENIZER.with_normaliser("lower")
    assert lower.fingerprint != TOKENIZER.fingerprint
    assert indexes.tokenizers(made.indexes(), {}, {"a file": lower}, WHERE) == []


# --- numbers -----------------------------------------------------------------------------------------------------


def broken(said: Mapping[str, Posterior], how: str) -> dict[str, Posterior]:
    def change(p: Posterior) -> Posterior:
        ids, probabilities = p.ids.copy(), p.probabilities.copy()
        if how == "a sum other than 1":
            probabilities *= 0.7
        elif how == "NaN or infinity":
            probabilities[0, 0] = np.nan
        elif how == "a value below 0 or above 1":
            probabilities = np.log(probabilities + 1e-6)
        elif how == "an id outside the vocabulary":
            ids[0, 0] = TOKENIZER.size
        else:
            ids[0, 0] = ids[0, 1]
        return replace(p, ids=ids, probabilities=probabilities)

    return {name: change(p) for name, p in said.items()}


@pytest.mark.parametrize(
    "how",
    [
        "a sum other than 1", "NaN or infinity", "a value below 0 or above 1", "an id outside the vocabulary",
        "an id listed twice",
    ],
)  # fmt: skip
def test_steps_that_are_no_distribution(made: Made, how: str) -> None:
    said = {**made.said["ctc"], "T2": broken(made.said["ctc"]["T2"], how)}
    found = only(numbers.normalisation(said, TOKENIZER.size, WHERE), "normalisation", "refuse")
    assert list(found.evidence["stores"]) == ["T2"]
    assert found.evidence["faults"][how] >= 72
    assert how in found.what


def test_targets_that_are_one_teachers_posterior(made: Made) -> None:
    found = numbers.aggregate_of_others(made.said["ctc"]["T2"], made.said["ctc"], made.index("ctc"), WHERE)
    finding = only(found, "effective-teachers", "refuse")
    assert (finding.evidence["teacher"], finding.evidence["off"]) == ("T2", 72)


def test_targets_that_are_not_the_mean_of_their_posteriors(made: Made) -> None:
    other = permuted(made.averages["decoder"])
    found = numbers.aggregate_of_others(other, made.said["decoder"], made.index("decoder"), WHERE)
    assert only(found, "target-text", "refuse").evidence["of"] >= 10


def test_the_mean_of_a_single_teacher_is_that_teachers_posterior(made: Made) -> None:
    said = made.said["ctc"]["T1"]
    index = weighted(made, [{"T1": 1.0}])
    assert numbers.aggregate_of_others(said, {"T1": said}, index, WHERE) == []


@pytest.mark.parametrize("kind", KINDS)
def test_posteriors_under_other_recordings_names(made: Made, kind: Kind) -> None:
    said = {**made.said[kind], "T2": permuted(made.said[kind]["T2"])}
    found = numbers.rows_of_others(said, made.noted[kind], made.tokens, made.index(kind, "T1"), TOKENIZER, WHERE)
    teachers = only(found, "target-text", "refuse").evidence["teachers"]
    assert list(teachers) == ["T2"]
    assert teachers["T2"]["off"] > 0.8 * teachers["T2"]["of"]


def test_teachers_that_know_no_text_prove_nothing(made: Made) -> None:
    said = {"T2": permuted(made.said["ctc"]["T2"])}
    noted = {"T2": dict.fromkeys(made.texts, -3.0)}
    assert numbers.rows_of_others(said, noted, made.tokens, made.index("ctc", "T2"), TOKENIZER, WHERE) == []


# --- told the true text ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("right", "ctc_right", "fires"), [(0.9, None, True), (0.99, 0.4, True), (0.99, 0.95, False)])
def test_decoder_targets_that_pass_for_free_running(
    made: Made, right: float, ctc_right: float | None, fires: bool
) -> None:
    steps = {name: len(tokens) for name, tokens in made.tokens.items()}
    index = made.index("decoder", teacher_forced=False)
    found = indexes.teacher_forced(index, steps, right, ctc_right, WHERE)
    if fires:
        assert only(found, "teacher-forced", "warn").evidence["recordings"] == 72
    else:
        assert found == []
    free = index.model_copy(update={"recordings": (replace(index.recordings[0], steps=9), *index.recordings[1:])})
    assert indexes.teacher_forced(free, steps, right, ctc_right, WHERE) == []


def test_who_noted_the_true_texts_probability_followed_it(made: Made) -> None:
    steps = {name: len(tokens) for name, tokens in made.tokens.items()}
    found = indexes.teacher_forced(made.index("decoder", "T1", teacher_forced=False), steps, 1.0, 1.0, WHERE)
    assert only(found, "teacher-forced", "warn").evidence["noted"] == 72
    assert indexes.teacher_forced(made.index("decoder", "T1"), steps, 1.0, 1.0, WHERE) == []
