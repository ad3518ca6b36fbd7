"""What validations say: collapse, empty or endless outputs, a decoder that needs the true text; and curricula."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from xded.checks import learning
from xded.checks.curriculum import curriculum, is_difficulty
from xded.config import DecodeConfig
from xded.findings import Finding

RECORDINGS, REFERENCES, NEEDED = 40.0, 20.0, 3.0


def epoch(number: int, loss: float, wra: float, distinct: float, **more: Any) -> dict[str, Any]:
    """A validated epoch: outputs as long as prompts unless said otherwise; one distinct output is the empty one."""
    return {
        "event": "epoch", "epoch": number, "update": 30 * number, "train_loss": loss, "val_loss": loss, "wra": wra,
        "empty": 1.0 if distinct == 1 else 0.0, "distinct": distinct, "recordings": RECORDINGS,
        "references": REFERENCES, "tokens": 0.0 if distinct == 1 else NEEDED, "needed": NEEDED, "repeats": 0.0, **more,
    }  # fmt: skip


def only(findings: list[Finding], check: str, severity: str) -> Finding:
    assert [(f.check, f.severity) for f in findings] == [(check, severity)]
    return findings[0]


# measured: the tiny model on 8 words, 208 recordings, peak 3e-3: blank-only for three epochs, then it learns
LEARNING = [3.33, 2.38, 1.98, 1.71, 1.38, 1.12, 0.98, 0.87, 0.78, 0.67, 0.54, 0.47]
WRA = [0, 0, 0, 0, 0.25, 0.3, 0.3, 0.65, 0.7, 0.75, 0.85, 0.9]
DISTINCT = [1, 1, 1, 3, 8, 7, 9, 13, 12, 10, 11, 9]
# measured: peak 1e-4: blank-only to the end of a run that is too short, the loss creeping down
TOO_SHORT = [4.1, 3.6, 3.24, 3.05, 2.9, 2.77, 2.68, 2.62, 2.57, 2.55, 2.54, 2.53, 2.52, 2.51, 2.5]


def healthy() -> list[dict[str, Any]]:
    return [epoch(i, *row) for i, row in enumerate(zip(LEARNING, WRA, DISTINCT, strict=True), start=1)]


def too_short() -> list[dict[str, Any]]:
    return [epoch(i, loss, 0.0, 1) for i, loss in enumerate(TOO_SHORT, start=1)]


def stopped_after(rows: list[dict[str, Any]], epochs: int) -> int | None:
    """Epoch after which the loop stops a run."""
    for end in range(1, len(rows) + 1):
        if learning.collapsed(rows[:end], epochs):
            return end
    return None


# --- collapse -------------------------------------------------------------------------------------


def test_healthy_runs_are_never_stopped() -> None:
    assert stopped_after(healthy(), 12) is None
    assert stopped_after(too_short(), 15) is None


def test_a_run_that_could_and_no_longer_can_is_stopped_after_three_validations() -> None:
    rows = healthy() + [epoch(i, 2.4, 0.0, 1) for i in range(13, 20)]
    assert stopped_after(rows, 40) == 15
    finding = learning.collapsed(rows[:15], 40)
    assert finding is not None
    assert (finding.check, finding.severity) == ("collapse", "refuse")
    assert "after a WRA of 90.0 % and up to 13 distinct outputs" in finding.what
    assert finding.evidence["distinct"][-3:] == [1, 1, 1]


def test_two_bad_validations_are_not_enough() -> None:
    rows = healthy() + [epoch(i, 2.4, 0.0, 1) for i in (13, 14)] + [epoch(15, 0.5, 0.9, 9)]
    assert stopped_after(rows, 40) is None


def test_a_run_whose_loss_still_falls_is_never_stopped() -> None:
    garbage = [epoch(1, 8.0, 0.0, 15), epoch(2, 5.0, 0.0, 6)]  # an untrained CTC head writes anything
    rows = garbage + [epoch(i, 4.0 * 0.95**i, 0.0, 1) for i in range(3, 40)]
    assert stopped_after(rows, 40) is None


def test_a_run_that_diverges_before_it_got_anything_right_is_stopped() -> None:
    rows = [epoch(i, 2.0, 0.0, 12) for i in (1, 2, 3)] + [epoch(i, 6.0, 0.0, 1) for i in range(4, 10)]
    assert stopped_after(rows, 40) == 6


def test_a_run_that_never_wrote_anything_and_no_longer_learns_is_given_up_late() -> None:
    rows = [epoch(i, 2.5, 0.0, 1) for i in range(1, 41)]
    assert stopped_after(rows, 40) == 24
    finding = learning.collapsed(rows[:24], 40)
    assert finding is not None
    assert finding.what.startswith("After 24 of 40 epochs there were never more than 2 distinct outputs")


def test_few_prompts_make_few_outputs() -> None:
    rows = [epoch(i, 2.5, 0.5, 2, references=2.0) for i in range(1, 41)]
    assert stopped_after(rows, 40) is None


def test_epochs_without_validation_count_for_the_loss_only() -> None:
    rows: list[dict[str, Any]] = [{"epoch": i, "train_loss": 3.0 * 0.9**i} for i in range(1, 41)]
    for i in (10, 20, 30, 40):
        rows[i - 1] |= {"wra": 0.0, "distinct": 1.0, "references": REFERENCES, "recordings": RECORDINGS}
    assert stopped_after(rows, 40) is None  # and rows as the loop has them, without the event's name
    for row in rows:
        row["train_loss"] = 3.0
    assert stopped_after(rows, 40) == 30


# --- outputs at the end ---------------------------------------------------------------------------


def test_a_run_that_learned_has_no_symptom() -> None:
    assert learning.outputs(healthy(), "run") == []


def test_a_run_that_was_too_short_is_a_note() -> None:
    finding = only(learning.outputs(too_short(), "run"), "blank-only", "note")
    assert finding.what.startswith("100 % of outputs are empty at the end (epoch 15, update 450, WRA 0.0 %)")
    assert "too short" in finding.what


def test_a_run_that_is_stuck_or_fell_back_is_a_warning() -> None:
    stuck = [epoch(i, 2.5, 0.0, 1) for i in range(1, 20)]
    assert only(learning.outputs(stuck, "run"), "blank-only", "warn")
    fell = [*healthy(), epoch(13, 2.4, 0.0, 2)]
    finding = only(learning.outputs(fell, "run"), "collapse", "warn")
    assert "2 distinct outputs for 20 different prompts" in finding.what
    assert finding.symptom


@pytest.mark.parametrize(
    ("change", "check", "number"),
    [
        ({"tokens": 18.0}, "over-generation", "18.0 tokens long in the mean, prompts 3.0"),
        ({"repeats": 0.8}, "loops", "80 % of outputs say a token three times in a row"),
    ],
)
def test_endless_and_repeating_outputs(change: dict[str, float], check: str, number: str) -> None:
    rows = healthy()
    rows[-1] |= change
    assert number in only(learning.outputs(rows, "run"), check, "warn").what
    untrained = [epoch(1, 3.3, 0.0, 9) | change]
    assert only(learning.outputs(untrained, "run"), check, "note")


def test_a_short_run_of_a_decoder_that_says_one_word_is_a_note() -> None:
    measured = [2.47, 2.07, 1.89, 1.79, 1.7, 1.67, 1.64, 1.63]  # decoder alone, 104 updates
    rows = [epoch(i, loss, 0.1, 1, empty=0.0, tokens=2.0) for i, loss in enumerate(measured, start=1)]
    assert only(learning.outputs(rows, "run"), "collapse", "note")


def test_few_outputs_that_are_right_by_chance() -> None:
    # measured: a micro model whose features are all zero (its outputs follow the length), and one that learns
    zero = [3.03, 1.76, 1.47, 1.35, 1.27, 1.21, 1.15, 1.11, 1.08]
    whole = [2.99, 1.77, 1.46, 1.25, 0.96, 0.74, 0.59, 0.49, 0.42]
    size = {"recordings": 90.0, "references": 8.0, "empty": 0.0}
    rows = [epoch(i, loss, 0.067, 6, **size) for i, loss in enumerate(zero, start=1)]
    finding = only(
        learning.outputs(rows, "run"), "collapse", "note"
    )  # a low learning rate gets no further in 198 updates
    assert finding.what.startswith("6 distinct outputs for 8 different prompts, right no more often than one word")
    assert learning.outputs(rows, "run", "decoder") == []
    assert learning.outputs(rows[:8], "run") == []  # too short to say
    assert learning.outputs([epoch(i, loss, 0.48, 26, **size) for i, loss in enumerate(whole, start=1)], "run") == []
    assert learning.outputs([epoch(i, loss, 0.03, 11, **size) for i, loss in enumerate(zero, start=1)], "run") == []


def test_a_handful_of_recordings_says_nothing() -> None:
    assert learning.outputs([epoch(i, 2.5, 0.0, 1, recordings=2.0) for i in range(1, 20)], "run") == []


def test_a_loss_that_falls_without_any_word() -> None:
    rows = [epoch(i, loss, 0.0, 15) for i, loss in enumerate(LEARNING, start=1)]
    finding = only(learning.stalled(rows, "run"), "stalled", "warn")
    assert "fell from 3.33 to 0.47 while WRA stayed at 0.0 % or below in 12 validations" in finding.what
    assert learning.stalled(healthy(), "run") == []
    assert learning.stalled(too_short(), "run") == []


# --- free running ---------------------------------------------------------------------------------

DECODER = DecodeConfig(mode="decoder")


def test_a_decoder_that_runs_otherwise_than_it_was_trained() -> None:
    rows = [epoch(9, 0.1, 0.02, 15, teacher_forced=0.98)]
    finding = only(learning.free_running(rows, "run", DECODER), "free-running", "refuse")
    assert finding.evidence["least_wra"] == pytest.approx(0.84)
    assert "98.0 % of its steps right" in finding.what
    assert "2.0 % do" in finding.what
    assert learning.free_running(rows, "run", DecodeConfig()) == []  # the CTC head is decoded


def test_a_decoder_that_leans_on_the_true_text_is_a_note() -> None:
    rows = [epoch(9, 0.7, 0.1, 4, teacher_forced=0.8)]  # three of four steps follow from the first
    assert only(learning.free_running(rows, "run", DECODER), "free-running", "note").evidence["wra"] == 0.1
    assert learning.free_running([epoch(9, 0.1, 0.9, 15, teacher_forced=0.98)], "run", DECODER) == []


# --- validation, state ----------------------------------------------------------------------------


def test_what_validation_measures() -> None:
    takes = [f"take{i}" for i in range(40)]
    card = {
        "train": {"meant": {"a": 90, "b": 90}}, "validation": {"meant": {"c": 40}}, "takes": {"validation": takes},
    }  # fmt: skip
    assert learning.validation(healthy(), "run", card) == []
    heard = only(
        learning.validation(healthy(), "run", {**card, "validation": {"meant": {"a": 40}}}), "validation", "note"
    )
    assert heard.evidence == {"speakers": ["a"]}
    few = only(
        learning.validation(healthy(), "run", {**card, "takes": {"validation": takes[:4]}}), "validation", "note"
    )
    assert "4 takes: one more right is 25 points" in few.what
    none = only(learning.validation([{"event": "epoch", "epoch": 1}], "run", None), "validation", "note")
    assert "no recordings for validation" in none.what
    teacher = {**card, "train": {"meant": {"c": 90}}}  # a teacher is for its own speaker
    assert learning.validation(healthy(), "run", teacher) == []


@pytest.mark.parametrize(("state", "severity"), [("running", "note"), ("killed", "note"), ("failed", "warn")])
def test_a_run_that_is_not_at_its_end(state: str, severity: str) -> None:
    status = {"state": state, "update": 120, "message": "out of memory" if state == "failed" else ""}
    finding = only(learning.unfinished(status, "run"), "unfinished", severity)
    assert f"{state} at update 120" in finding.what
    assert learning.unfinished({"state": "finished", "update": 200}, "run") == []


def test_a_refusal_that_was_overridden() -> None:
    finding = only(learning.unfinished({"state": "finished", "forced": ["leakage"]}, "run"), "leakage", "warn")
    assert "'leakage' refused" in finding.what


# --- curriculum -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    recording: str
    speaker: str
    take: str
    prompt: str
    text: str = ""
    block: str | None = None
    mic: str | None = None
    word_type: str | None = None
    duration: float | None = None


ROWS = [Row(f"{s}_B1_CW{i}", s, f"{s}_B1_CW{i}", f"CW{i}") for s in ("F02", "M04", "M08") for i in range(12)]


def scores() -> dict[str, float]:
    return {row.recording: (i % 7) / 7 for i, row in enumerate(ROWS) if row.speaker != "M08"}  # who is held out


@pytest.mark.parametrize("data", [scores(), {"utterance_scores": scores()}], ids=["flat", "under a key"])
def test_scores_that_reach_the_recordings(data: dict[str, Any]) -> None:
    assert is_difficulty(data)
    assert curriculum(data, "file", ROWS) == []
    assert curriculum(data, "file", []) == []


def test_the_study_s_scores_reach_nobody() -> None:
    entry = {"speaker": "M04", "speaker_wer": 86.4, "combined_difficulty": 0.7, "entropy": 0.6}
    data = {f"B1_CW{i}": {**entry, "speaker": "M04" if i < 9 else "F03"} for i in range(12)}
    assert is_difficulty(data)
    finding = only(curriculum(data, "file", ROWS), "curriculum", "refuse")
    assert finding.what.startswith("0 of 12 entries are scores: they hold a table each")
    assert "9 of 12 entries are those of M04" in finding.what


def test_scores_one_level_too_deep() -> None:
    data = {"difficulty": {"utterance_scores": 1}, "all": scores()}
    assert is_difficulty({"all": scores()})
    assert "under 'all'" in only(curriculum({"all": scores()}, "file", ROWS), "curriculum", "refuse").what
    assert only(curriculum(data, "file", ROWS), "curriculum", "refuse").evidence["scores"] == 0


def test_keys_without_a_speaker() -> None:
    finding = only(curriculum({f"B1_CW{i}": i / 12 for i in range(12)}, "file", ROWS), "curriculum", "refuse")
    assert finding.what.startswith("0 of 36 recordings have a difficulty score")
    assert finding.evidence["keys_without_speaker"] == 12


def test_recordings_without_a_score() -> None:
    some = dict(list(scores().items())[:18])
    finding = only(curriculum(some, "file", ROWS), "curriculum", "warn")
    assert finding.evidence["missing"] == {"M04": 6, "M08": 12}


def test_scores_that_are_all_the_default() -> None:
    data = dict.fromkeys(scores(), 0.5)
    assert only(curriculum(data, "file", ROWS), "curriculum", "refuse").what == "All 24 difficulty scores are 0.5."
    data["F02_B1_CW3"] = 0.7
    assert only(curriculum(data, "file", ROWS), "curriculum", "warn").evidence["count"] == 23


@pytest.mark.parametrize("data", [[], {}, {"a": 1}, {"a": {"b": "c"}}, {"wra": {"value": 1}, "n": 3}, "text", 7])
def test_other_files_are_no_difficulty_scores(data: object) -> None:
    assert not is_difficulty(data)
