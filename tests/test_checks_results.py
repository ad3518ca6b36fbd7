"""Result files that misreport, are miscounted, misnamed or copied are seen; sound ones are not."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import evaluation_files as files
from xded.checks import results
from xded.checks.readings import Reading, as_stored
from xded.evaluations import Evaluation, read_evaluation, take_of
from xded.findings import Finding
from xded.scoring import Prediction, score, write_predictions

CONDITIONS = {"speakers": "unseen", "words": "seen", "word_list": "open", "decode": "ctc greedy"}


def stored(evaluation: Evaluation) -> Reading:
    reading = as_stored(evaluation)
    assert reading is not None
    return reading


def on_stored(check: Callable[[Evaluation, Reading], list[Finding]], evaluation: Evaluation) -> list[Finding]:
    return check(evaluation, stored(evaluation))


def said(rows: list[tuple[str, str, str]], **reported: float) -> Evaluation:
    return files.evaluation(rows, reported)


OUTPUTS = ["YES"] * 20 + ["YES YES"] * 10 + ["NO NO"] * 10 + ["NO"] * 60  # WRA 20 %, first word 30 %, WER 90 %
ROWS = [(f"r{i}", "YES", output) for i, output in enumerate(OUTPUTS)]


def test_reports_that_say_what_the_outputs_say() -> None:
    e = said(ROWS, wra=20.0, wer=90.0)
    assert on_stored(results.report_differs, e) == []
    assert on_stored(results.other_rule, e) == []
    assert results.out_of_range(e) == []


@pytest.mark.parametrize(("reported", "severity"), [(45.0, "refuse"), (20.5, "warn")])
def test_a_report_that_differs(reported: float, severity: str) -> None:
    (found,) = on_stored(results.report_differs, said(ROWS, wra=reported))
    assert (found.check, found.severity, found.points) == ("report-differs", severity, reported - 20.0)
    assert "its outputs give 20.00 %" in found.what


def test_a_report_about_more_outputs_than_there_are() -> None:
    e = dataclasses.replace(said(ROWS, wra=20.0), stated_count=1785)
    (found,) = on_stored(results.report_differs, e)
    assert "says 1785 outputs and holds 100" in found.what


def test_rounded_reports_are_not_blamed() -> None:
    third = [(f"r{i}", "YES", "YES" if i < 1 else "NO") for i in range(3)]
    for reported in (33.33, 33.3, 100 / 3):
        assert on_stored(results.report_differs, said(third, wra=reported)) == []
    assert len(on_stored(results.report_differs, said(third, wra=33.25))) == 1


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [("wra", 30.0, "first word of the output"), ("accuracy", 10.0, "100 - WER"), ("ser", 90.0, "100 - WER")],
)
def test_another_rule(name: str, value: float, rule: str) -> None:
    e = said(ROWS, **{name: value})
    (found,) = on_stored(results.other_rule, e)
    assert (found.check, found.severity, found.points) == ("other-rule", "warn", 10.0)
    assert rule in found.what
    assert "20.00 %" in found.what
    assert on_stored(results.report_differs, e) == []  # one finding for one fault


def test_another_rule_that_hardly_matters_is_a_note() -> None:
    rows = [("a", "YES", "YES YES"), *((f"r{i}", "YES", "YES" if i < 20 else "NO") for i in range(999))]
    assert [f.severity for f in on_stored(results.other_rule, said(rows, wra=2.1))] == ["note"]


@pytest.mark.parametrize("value", [-2004.99, 4168.0, math.nan, math.inf])
def test_impossible_metrics(value: float) -> None:
    e = said(ROWS, accuracy=value)
    (found,) = results.out_of_range(e)
    assert (found.check, found.severity) == ("out-of-range", "warn")
    json.dumps(found.evidence, allow_nan=False)
    assert on_stored(results.report_differs, e) == on_stored(results.other_rule, e) == []


def test_error_rates_may_exceed_100() -> None:
    rows = [(f"r{i}", "YES", "NO NO NO") for i in range(10)]
    assert results.out_of_range(said(rows, wer=300.0, wra=0.0)) == []
    assert len(results.out_of_range(said(rows, wer=-1.0))) == 1


def ours(folder: Path, *, right: int, mics: int = 7, take_each: bool = False) -> Path:
    """predictions.jsonl and scores.json of 100 takes, with copies as takes of their own when `take_each`."""
    folder.mkdir(parents=True)
    rows: list[Prediction] = []
    for i, word in enumerate(files.words()[:100], start=1):
        for mic in range(2, 2 + mics):
            name = f"M08_B3_CW{i}_M{mic}"
            text = word if i <= right else "NO"
            take = name if take_each else take_of(name)
            rows.append(files.prediction(name, word, text, take=take, speaker="M08"))
    write_predictions(folder / "predictions.jsonl", rows)
    (folder / "scores.json").write_text(score(rows, normaliser="upper", conditions=CONDITIONS).to_json())
    return folder / "predictions.jsonl"


def named_takes(evaluation: Evaluation) -> dict[str, str]:
    return {item.recording: take_of(item.recording) or item.take for item in evaluation.items}


def test_microphone_copies_in_our_intervals(tmp_path: Path) -> None:
    e = read_evaluation(ours(tmp_path / "bad", right=50, take_each=True))
    (found,) = results.copies_as_takes(e, named_takes(e))
    assert (found.check, found.severity) == ("copies-as-takes", "warn")
    assert (found.evidence["counted"], found.evidence["takes"]) == (700, 100)
    assert found.evidence["factor"] == pytest.approx(7**0.5, rel=0.1)
    healthy = read_evaluation(ours(tmp_path / "good", right=50))
    assert results.copies_as_takes(healthy, named_takes(healthy)) == []
    assert on_stored(results.report_differs, healthy) == []


def test_scores_of_other_predictions(tmp_path: Path) -> None:
    path = ours(tmp_path / "a", right=50)
    other = ours(tmp_path / "b", right=80)
    path.write_bytes(other.read_bytes())
    (found,) = on_stored(results.report_differs, read_evaluation(path))
    assert (found.severity, found.points) == ("refuse", pytest.approx(30.0))
    assert "scores.json beside it" in found.what


def test_copies_in_other_peoples_files_are_one_note(tmp_path: Path) -> None:
    evaluations = [read_evaluation(files.student(tmp_path / f"{i}.json", files.outputs(51, seed=i))) for i in range(3)]
    (found,) = results.copies_unstated(evaluations)
    assert (found.severity, found.evidence["recordings"], found.evidence["takes"]) == ("note", 2295, 765)
    assert results.copies_unstated([said(ROWS)]) == []


def test_one_result_under_two_names(tmp_path: Path) -> None:
    first = files.student(tmp_path / "epoch70.json", files.outputs(51))
    same_bytes = tmp_path / "epoch70_teacher.json"
    same_bytes.write_bytes(first.read_bytes())
    same_outputs = files.student(tmp_path / "again.json", files.outputs(51), val_loss=7.0)
    elsewhere = tmp_path / "copy" / "epoch70.json"
    elsewhere.parent.mkdir()
    elsewhere.write_bytes(first.read_bytes())
    other = files.student(tmp_path / "other.json", files.outputs(51, seed=1))
    read = [read_evaluation(path) for path in (first, same_bytes, same_outputs, elsewhere, other)]
    found = {Path(f.subject): (f.severity, f.evidence["bytes"]) for f in results.same_file(read)}
    assert found == {same_bytes: ("warn", True), same_outputs: ("warn", False), elsewhere: ("note", True)}


def test_recognisers_that_agree_by_necessity_are_no_copies(tmp_path: Path) -> None:
    perfect = [read_evaluation(files.student(tmp_path / f"p{i}.json", files.outputs(255), epoch=i)) for i in (1, 2)]
    empty = [read_evaluation(files.averaged(tmp_path / f"e{i}.json", [""] * files.RECORDINGS, note=i)) for i in (1, 2)]
    assert results.same_file([*perfect, *empty]) == []


def test_a_file_about_another_speaker(tmp_path: Path) -> None:
    rows = [(f"F05_B3_CW{i}_M2", "YES", "YES") for i in range(1, 20)]
    wrong = read_evaluation(files.report(tmp_path / "M01 cross" / "wer_M01.txt", rows))
    (found,) = results.wrong_speaker(wrong)
    assert (found.check, found.severity) == ("wrong-speaker", "refuse")
    assert found.evidence == {"named": "M01", "inside": "F05", "recordings": 19}


def test_two_searches_may_agree(tmp_path: Path) -> None:
    """A beam that changes nothing is no copy of the greedy outputs; the same search twice is."""
    outputs = [files.read_at(ids, 0) for ids in files.outputs(51)]
    rows = [files.prediction(n, w, text) for (n, w), text in zip(files.names("M08"), outputs, strict=True)]
    for name, decode in (("greedy", "ctc greedy"), ("beam", "ctc beam 4"), ("again", "ctc greedy")):
        write_predictions(tmp_path / f"{name}.predictions.jsonl", rows)
        scores = score(rows, normaliser="upper", conditions={**CONDITIONS, "decode": decode})
        (tmp_path / f"{name}.json").write_text(scores.to_json())
    read = [read_evaluation(tmp_path / f"{name}.json") for name in ("greedy", "beam", "again")]
    for copies in (read, [dataclasses.replace(e, sha256=str(i)) for i, e in enumerate(read)]):
        assert [f.subject for f in results.same_file(copies)] == [str(tmp_path / "again.predictions.jsonl")]


@pytest.mark.parametrize(
    ("name", "severity"),
    [
        ("M01 cross/wer_F05.txt", None),
        ("crosstest/F05/teacher_M01.txt", None),  # the teacher, not the tested speaker
        ("crosstest/M01.txt", None),
        ("eval_excl_M01.txt", None),
        ("M01_to_F05.txt", None),
        ("HIGH_F05_results.txt", None),
        ("results.txt", None),
        ("M04/results.txt", "note"),  # folders may be named by the model
        ("M04_results.txt", "refuse"),
    ],
)
def test_names_of_files(tmp_path: Path, name: str, severity: str | None) -> None:
    rows = [(f"F05_B3_CW{i}_M2", "YES", "YES") for i in range(1, 20)]
    found = results.wrong_speaker(read_evaluation(files.report(tmp_path / name, rows)))
    assert [f.severity for f in found] == ([severity] if severity else [])


def test_a_header_about_another_speaker(tmp_path: Path) -> None:
    e = read_evaluation(files.averaged(tmp_path / "a.json", [""] * files.RECORDINGS, speaker_id="F02"))
    assert [(f.severity, f.evidence["named"]) for f in results.wrong_speaker(e)] == [("refuse", "F02")]
    assert results.wrong_speaker(read_evaluation(files.averaged(tmp_path / "b.json", [""] * files.RECORDINGS))) == []


def test_lines_about_another_speaker(tmp_path: Path) -> None:
    rows = [files.prediction(f"F05_B3_CW{i}_M2", "YES", "YES", speaker="M08") for i in range(1, 9)]
    write_predictions(tmp_path / "predictions.jsonl", rows)
    (found,) = results.wrong_speaker(read_evaluation(tmp_path / "predictions.jsonl"))
    assert (found.severity, found.evidence["named"], found.evidence["inside"]) == ("refuse", "M08", "F05")


def test_names_of_other_corpora(tmp_path: Path) -> None:
    rows = [files.prediction(f"x{i}", "YES", "YES", speaker="anna") for i in range(8)]
    path = tmp_path / "eval_ben.predictions.jsonl"
    write_predictions(path, rows)
    e = read_evaluation(path)
    assert results.wrong_speaker(e) == []  # nobody knows that ben is a speaker
    assert len(results.wrong_speaker(e, {"anna", "ben"})) == 1


def spoken(rename: dict[int, int], right: float, takes: int = 6, words: int = 10, seed: int = 0) -> Evaluation:
    """Words said several times: the model writes `rename[word]` with probability `right`, else any word."""
    random = np.random.default_rng(seed)
    names = [f"W{i}" for i in range(words)]
    rows = []
    for i, word in enumerate(names):
        for take in range(takes):
            output = rename.get(i, i) if random.random() < right else int(random.integers(words))
            rows.append((f"{word}-{take}", word, names[output]))
    return said(rows)


def test_permuted_words() -> None:
    rolled = {i: (i + 1) % 10 for i in range(10)}
    (found,) = on_stored(results.renamed_words, spoken(rolled, 0.7))
    assert (found.check, found.severity, found.evidence["words"]) == ("renamed-words", "refuse", 10)
    assert found.evidence["renamed_wra"] > 60.0 > 20.0 > found.evidence["wra"]
    assert found.points > 40.0


def test_weak_renaming_is_a_note() -> None:
    """Consistent slips of a recogniser that has learned little look like that as well."""
    (found,) = on_stored(results.renamed_words, spoken({i: (i + 1) % 10 for i in range(10)}, 0.35, takes=12))
    assert found.severity == "note"


def test_two_words_exchanged() -> None:
    (found,) = on_stored(results.renamed_words, spoken({0: 1, 1: 0}, 0.9, takes=12))
    assert found.evidence["words"] == 2


@pytest.mark.parametrize("right", [0.0, 0.1, 0.3, 0.9])
def test_weak_recognisers_do_not_rename(right: float) -> None:
    for seed in range(10):
        for takes in (2, 6, 20):
            assert on_stored(results.renamed_words, spoken({}, right, takes=takes, seed=seed)) == []


def test_slips_into_one_word_are_no_renaming() -> None:
    """A collapsed recogniser says one word for all; many words heard as one cannot be mapped one to one."""
    assert on_stored(results.renamed_words, spoken(dict.fromkeys(range(10), 3), 0.95)) == []
    assert on_stored(results.renamed_words, spoken({0: 1, 2: 3, 4: 5}, 0.9)) == []


def test_one_take_a_word_cannot_show_renaming() -> None:
    assert on_stored(results.renamed_words, spoken({i: (i + 1) % 10 for i in range(10)}, 1.0, takes=1)) == []
