"""A study's tables: which rows there are, whatever they are called."""

from __future__ import annotations

from pathlib import Path

from xded.report.study_tables import StudyTables, systems_of, tables_of
from xded.scoring import Prediction
from xded.study.outcome import Result, Source
from xded.study.plan import MEAN_TEACHER, build

STUDY = build({"name": "s", "attempts": {"a": {}}}, "x")
WORDS = ("AB", "DA")
IMPORTED = "teacher X (imported)"


def result(system: str, source: Source, own_percent: float | None = None) -> Result:
    said = [Prediction(f"{w}1", f"{w}1", "t1", "low", None, w, w, w, ()) for w in WORDS]
    return Result(system, source, ("t1",), {"open": said}, (Path("run"),), own_percent=own_percent)


def tables(*results: Result) -> StudyTables:
    return tables_of(STUDY, results, WORDS, "open", "seen")


def test_an_imported_result_that_is_called_a_teacher_is_none() -> None:
    found = tables(result("a", "attempt"), result(IMPORTED, "imported"))
    assert found.teachers is None
    assert [row[0] for row in found.main.rows[1:]] == ["a", IMPORTED]


def test_teachers_of_the_study_are_those_that_it_tested() -> None:
    derived = result(MEAN_TEACHER, "derived")
    found = tables(result("teacher t2", "baseline", 50.0), derived, result(IMPORTED, "imported"))
    assert found.teachers is not None
    assert [row[:2] for row in found.teachers.rows] == [("teacher t2", "50.0"), (MEAN_TEACHER, "50.0")]


def test_without_their_mean_teachers_have_no_row_of_it() -> None:
    results = [result("teacher t2", "baseline"), result(IMPORTED, "imported"), result("a", "attempt")]
    found = tables(*results)
    assert found.teachers is not None
    assert [row[0] for row in found.teachers.rows] == ["teacher t2"]
    assert systems_of(STUDY, results) == ["teacher t2", "a", IMPORTED]
