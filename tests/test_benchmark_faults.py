"""The benchmark of the doctor plants what it says, counts what the doctor says, and the doctor finds a sample of it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from xded.findings import CHECKS, Finding, Severity

ROOT = Path(__file__).resolve().parents[1]
FAMILIES = {check.family for check in CHECKS.values()}


@pytest.fixture(name="report")
def _report(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from faults import report

    return report


def test_there_are_enough_cases_of_every_family(report: Any) -> None:
    families = Counter(case.family for case in report.FAULTS.values())

    assert sum(families.values()) >= 30
    assert set(families) == FAMILIES
    assert min(families.values()) >= 4
    assert len(report.HEALTHY) >= 20


def test_every_fault_expects_checks_that_exist_and_tells_its_story(report: Any) -> None:
    for case in report.FAULTS.values():
        assert case.expected, case.name
        assert case.expected <= set(CHECKS), case.name
        assert case.story, case.name


@pytest.mark.parametrize(
    ("found", "rank"),
    [
        ([("silence", "warn")], 1),
        ([("labels", "warn"), ("silence", "warn")], 2),
        ([("labels", "warn"), ("labels", "refuse"), ("silence", "warn")], 3),
        ([("validation", "note"), ("silence", "note")], None),  # a note is no problem
        ([], None),
    ],
)
def test_rank_counts_problems_only(report: Any, found: list[tuple[str, Severity]], rank: int | None) -> None:
    findings = tuple(Finding(check, severity, "subject", "what", "effect", "remedy") for check, severity in found)
    outcome = report.Outcome("dead microphone", findings, "", 0.0, 0.0)

    assert outcome.rank == rank
    assert outcome.found == (rank in (1, 2))


def test_a_missed_fault_stays_in_the_table(report: Any) -> None:
    missed = report.Outcome("dead microphone", (), "ValueError: x", 0.0, 0.5)

    table = report.fault_table([missed])

    assert "| dead microphone | data | silence | ValueError: x |  | missed | 0.5 |" in table
    assert "0 of 1 faults named as the first or second finding (0.0 %" in table


def test_false_alarms_are_counted_by_variant(report: Any) -> None:
    alarms = tuple(Finding("labels", "warn", str(place), "what", "effect", "remedy") for place in range(3))
    outcomes = [report.Outcome("corpus alone", alarms, "", 0.0, 0.0), report.Outcome("fsdd", (), "", 0.0, 0.0)]

    assert "among 2 healthy variants: 0 at refuse level, 1 at warn level" in report.healthy_table(outcomes)


def test_two_faults_of_a_corpus_are_found_and_the_corpus_is_healthy(report: Any, tmp_path: Path) -> None:
    names = ["dead microphone", "truncated copy of a speaker", "corpus alone"]

    silence, truncated, healthy = report.run(names, tmp_path)

    assert silence.found, silence
    assert truncated.found, truncated
    assert healthy.error == ""
    assert healthy.count("refuse") == healthy.count("warn") == 0, healthy


@pytest.mark.slow
def test_a_fault_in_training_is_found(report: Any, tmp_path: Path) -> None:
    (detached,) = report.run(["layers cut off by detach"], tmp_path)

    assert detached.found, detached
