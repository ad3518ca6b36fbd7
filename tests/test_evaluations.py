"""Evaluation files of all makes are read into one form; damaged and unknown ones are errors that say what is wrong."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import evaluation_files as files
from xded import evaluations
from xded.errors import ScoringError
from xded.evaluations import read_evaluation, recognise, with_takes
from xded.scoring import read_predictions, score, write_predictions

CONDITIONS = {"speakers": "unseen", "words": "seen", "word_list": "open", "decode": "ctc greedy"}


def ours(folder: Path, name: str = "predictions.jsonl") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [files.prediction(f"r{i}", "AB", "AB" if i else "A", (4, 5)) for i in range(4)]
    write_predictions(folder / name, rows)
    return folder / name


def scores_of(predictions: Path, path: Path) -> Path:
    rows = read_predictions(predictions)
    path.write_text(score(rows, normaliser="lower", conditions=CONDITIONS).to_json())
    return path


def test_student_json(tmp_path: Path) -> None:
    path = files.student(tmp_path / "eval.json", files.outputs(51), shift=-1)
    assert recognise(path) == "evaluation"
    e = read_evaluation(path)
    assert (e.source, e.stated_offset, e.tokenizer_path, e.epoch, e.val_loss) == ("student", 1, "t.ckpt", 39, 0.1)
    assert (len(e.items), len(e.takes), e.speakers, e.stated_count) == (
        files.RECORDINGS,
        255,
        ("M08",),
        files.RECORDINGS,
    )
    first = e.items[0]
    assert (first.recording, first.take, first.mic) == ("M08_B3_CW1_M2", "M08_B3_CW1", "M2")
    assert first.tokens == tuple(files.outputs(51)[0])
    assert e.reported["wra"] == pytest.approx(0.0, abs=1.0)


@pytest.mark.parametrize(
    "changes",
    [
        {"tokenizer": None},
        {"tokenizer": {}},
        {"tokenizer": {"type": None, "path": None, "vocab_offset": None}},
        {"wra": None},
        {"wra": {"value": None, "correct": None, "total": 0}, "wer": {"value": None, "S": None}},
        {"epoch": None, "val_loss": None, "checkpoint": None},
    ],
)
def test_headers_may_lack_anything(tmp_path: Path, changes: dict[str, Any]) -> None:
    e = read_evaluation(files.student(tmp_path / "e.json", files.outputs(20), **changes))
    assert len(e.items) == files.RECORDINGS
    assert e.reported.get("wra", 0.0) >= 0.0
    if "wra" in changes:
        assert "wra" not in e.reported


def test_shares_become_per_cent(tmp_path: Path) -> None:
    e = read_evaluation(files.student(tmp_path / "e.json", files.outputs(51), wer={"value": 1.25}))
    assert e.reported == {"wra": pytest.approx(20.0), "wer": 125.0}


@pytest.mark.parametrize("text", ["", "17 18", None])
def test_ids_without_text_are_no_empty_outputs(tmp_path: Path, text: str | None) -> None:
    path = files.student(tmp_path / "e.json", files.outputs(51))
    data = json.loads(path.read_text())
    for row in data["predictions"]:
        row["prediction_text"] = text
    e = read_evaluation(files.write(path, data))
    assert e.texts is None
    assert e.has_tokens


def test_zero_shot_json(tmp_path: Path) -> None:
    rows = [{"utterance_id": name, "target": word, "prediction": word.lower()} for name, word in files.names("M08")]
    e = read_evaluation(
        files.write(tmp_path / "z.json", {"model": "m", "num_samples": files.RECORDINGS, "predictions": rows})
    )
    assert (e.source, e.has_tokens, e.checkpoint, len(e.takes)) == ("zero-shot", False, "m", 255)


def test_averaging_and_ensemble_json(tmp_path: Path) -> None:
    texts = [" ".join(["NO"] * 30)] * files.RECORDINGS
    path = files.averaged(tmp_path / "a.json", texts)
    e = read_evaluation(path)
    assert (e.source, e.stated_speaker, e.stated_count) == ("averaging", "M08", files.RECORDINGS)
    assert e.reported["accuracy"] < -2800
    assert len(e.takes) == 255
    data = json.loads(path.read_text())
    for row in data["details"]:
        del row["id"]
    renamed = {"held_out": "M08", "num_utts": files.RECORDINGS, "agg": "logit_mean", "details": data["details"]}
    e = read_evaluation(files.write(tmp_path / "b.json", renamed))
    assert (e.source, e.stated_speaker, e.items[0].recording) == ("ensemble", "M08", "M08_B3_CW1_M2")


def test_ids_that_are_numbers_fall_back_on_the_audio_path(tmp_path: Path) -> None:
    rows = [{"id": 7, "audio_path": r"C:\audio\M08\M08_B3_D1_M4.wav", "reference": "ONE", "prediction": "ONE"}]
    e = read_evaluation(files.write(tmp_path / "a.json", {"details": rows}))
    assert (e.items[0].recording, e.items[0].take, e.items[0].speaker) == ("M08_B3_D1_M4", "M08_B3_D1", "M08")


def test_speechbrain_report(tmp_path: Path) -> None:
    path = files.report(tmp_path / "wer_M08.txt", [("M08_B3_D1_M2", "ONE", "ONE"), ("M08_B3_D2_M2", "TWO", "")])
    assert recognise(path) == "speechbrain"
    e = read_evaluation(path)
    assert (e.source, e.reported, e.stated_count) == ("speechbrain", {"wer": 50.0, "ser": 50.0}, 2)
    assert [(i.reference, i.hypothesis) for i in e.items] == [("ONE", "ONE"), ("TWO", "")]


def test_insertions_in_a_speechbrain_alignment(tmp_path: Path) -> None:
    path = tmp_path / "wer.txt"
    path.write_text(
        "%WER 200.00 [ 2 / 1, 1 ins, 0 del, 1 sub ]\na1, %WER 200.00 [ 2 / 1 ]\n<eps> ; CUT\n I ; S\nDO ; A"
    )
    assert [(i.reference, i.hypothesis) for i in read_evaluation(path).items] == [("CUT", "DO A")]


def test_truncated_speechbrain_report_is_an_error(tmp_path: Path) -> None:
    path = files.report(tmp_path / "wer.txt", [("M08_B3_D1_M2", "ONE", "ONE"), ("M08_B3_D2_M2", "TWO", "TWO")])
    path.write_text("\n".join(path.read_text().splitlines()[:-2]))
    with pytest.raises(ScoringError, match="ends in the middle of 'M08_B3_D2_M2'"):
        read_evaluation(path)


def test_our_predictions_bring_their_scores(tmp_path: Path) -> None:
    predictions = ours(tmp_path)
    assert read_evaluation(predictions).scores is None
    scores_of(predictions, tmp_path / "scores.json")
    for name in ("predictions.jsonl", "scores.json"):
        e = read_evaluation(tmp_path / name)
        assert (e.path, e.source, e.normaliser) == (predictions, "predictions", "lower")
        assert (e.reported["wra"], e.stated_count) == (75.0, 4)


def test_scores_under_another_name(tmp_path: Path) -> None:
    predictions = ours(tmp_path, "beam.predictions.jsonl")
    path = scores_of(predictions, tmp_path / "beam.json")
    assert read_evaluation(path).path == predictions
    assert read_evaluation(predictions).reported["wra"] == 75.0


def test_scores_without_predictions(tmp_path: Path) -> None:
    predictions = ours(tmp_path)
    path = scores_of(predictions, tmp_path / "scores.json")
    predictions.unlink()
    e = read_evaluation(path)
    assert (e.source, e.items, e.reported["wra"]) == ("scores", (), 75.0)


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("e.json", '{"predictions": [{"utterance_id": "a", "target": "B"', "damaged JSON"),
        ("e.json", '{"predictions": [{"utterance_id": "a", "prediction": "B"}]}', "target.*Field required"),
        ("e.json", '{"predictions": [{"utterance_id": "a", "target": "B", "prediction_tokens": ["5"]}]}', "integer"),
        ("e.json", '{"predictions": [1, 2]}', "valid dictionary"),
        ("e.json", '{"predictions": []}', "holds no outputs"),
        ("e.json", '{"predictions": [' + "[" * 100_000, "nested too deeply"),
        ("e.json", '{"predictions": [\xff]}', "damaged JSON"),
        ("e.json", '{"predictions": [' + "9" * 5000 + "]}", "damaged JSON"),
        ("e.json", '{"words": 3}', "is no evaluation: expected predictions.jsonl"),
        ("predictions.jsonl", "{half", "line 1"),
        ("predictions.jsonl", '{"recording": 1, "reference": "A", "hypothesis": "B"}', "line 1"),
        ("scores.json", '{"conditions": {}, "overall": {}}', "holds no scores"),
        ("wer.txt", "%WER 12.0 [ 1 / 8 ]\n", "holds no alignments"),
    ],
)
def test_bad_files_say_what_is_wrong(tmp_path: Path, name: str, text: str, problem: str) -> None:
    path = tmp_path / name
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ScoringError, match=problem) as error:
        read_evaluation(path)
    assert str(path) in str(error.value)


def test_a_file_that_is_far_too_large_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = files.student(tmp_path / "e.json", files.outputs(1))
    monkeypatch.setattr(evaluations, "MAX_BYTES", 1000)
    with pytest.raises(ScoringError, match="larger than"):
        read_evaluation(path)


@pytest.mark.parametrize(
    "text",
    [
        '{"utterance_ids": ["a"], "target_words": ["A"]}',
        '{"B3_CW1_M2": {"speaker": "M04"}}',
        '{"audio_filepath": "a.wav", "duration": 1.0, "text": "A"}\n',
        "[]",
        "",
        "\x00\x01\x02",
    ],
)
def test_other_files_are_not_recognised(tmp_path: Path, text: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    assert recognise(path) is None
    assert recognise(tmp_path / "absent") is None


def test_takes_are_what_is_counted(tmp_path: Path) -> None:
    e = read_evaluation(files.student(tmp_path / "e.json", files.outputs(20)))
    before = np.zeros(len(e.items))
    after = np.array([item.take in e.takes[:8] for item in e.items])
    better, worse, p_value = e.gain(before, after)
    assert (better, worse) == (8, 0)
    assert p_value == pytest.approx(0.5**8)  # 8 takes, not 56 recordings
    assert e.gain(before, before) == (0, 0, 1.0)


def test_a_corpus_may_know_better_what_a_take_is(tmp_path: Path) -> None:
    e = read_evaluation(ours(tmp_path))
    assert len(e.takes) == 4
    assert len(with_takes(e, {"r0": "t", "r1": "t"}, {}).takes) == 3
    assert with_takes(e, {}, {"r0": "other"}) is e  # it names its speakers itself
    nameless = files.evaluation([("a", "YES", "YES")])
    nameless = dataclasses.replace(nameless, items=(dataclasses.replace(nameless.items[0], speaker=""),))
    assert with_takes(nameless, {}, {"a": "anna"}).speakers == ("anna",)
