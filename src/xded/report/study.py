"""What a study says: suspicions first, verdicts, what to do next, tables; as text, Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from xded.doctor.examine import examine_all
from xded.findings import Finding
from xded.report.study_page import JOULES_A_WH, write_study_page
from xded.report.study_tables import StudyTables, answers_table, claims_table, gains_by_band, tables_of
from xded.report.tables import Table
from xded.study.engine import Progress
from xded.study.pieces import DECODES
from xded.study.plan import NextStep
from xded.study.run import Outcome
from xded.study.steps import Work
from xded.study.verdict import Answer, answer_all, next_step, pooled, scores_of
from xded.training.status import write_atomically

# what makes an evaluation void; findings about how well a model learned are results, not suspicions
VOID = (
    "token-offset",
    "tokenizer-mismatch",
    "untrained-head",
    "report-differs",
    "leakage",
    "wrong-audio",
    "renamed-words",
)
RESULTS, MARKDOWN, PAGE = "results.json", "report.md", "report.html"


@dataclass(frozen=True)
class StudyReport:
    """Everything that a study says."""

    outcome: Outcome
    out: Path
    suspicions: tuple[Finding, ...]
    answers: tuple[Answer, ...]
    ladder: str
    advice: NextStep | None
    command: str
    tables: tuple[StudyTables, ...]

    def lines(self) -> list[str]:
        """Verdict, ladder, advice and what was not done, in words."""
        study, progress = self.outcome.study, self.outcome.progress
        lines = [f"{study.name}: {study.question}".rstrip(": ")]
        lines += [f"EVALUATION SUSPECT: {f.check} in {f.subject}: {f.what} {f.remedy}" for f in self.suspicions]
        lines += [f"{a.hypothesis}: {a.verdict.upper()}. {a.because}" for a in self.answers]
        if self.ladder:
            lines.append(self.ladder)
        if self.advice is not None:
            lines.append(f"Next: {self.advice.do}" + (f" Command: {self.command}" if self.command else ""))
        for state in ("failed", "left out"):
            titles = [s.title for s in self.outcome.work.steps if progress.states[s.key] == state]
            if titles:
                lines.append(f"{len(titles)} pieces {state}: {'; '.join(titles)}")
        lines += [f"  {title}: {error}" for title, error in self._errors().items()]
        return [*lines, self.cost()]

    def _errors(self) -> dict[str, str]:
        errors = self.outcome.progress.errors
        return {s.title: errors[s.key] for s in self.outcome.work.steps if s.key in errors}

    def cost(self) -> str:
        """Minutes of the last call, of all pieces, what sharing saved, and energy where it is known."""
        work, progress = self.outcome.work, self.outcome.progress
        spent = sum(progress.seconds.values()) / 60
        return (
            f"{self.outcome.minutes:.1f} minutes in the last call; all pieces together took {spent:.1f} minutes. "
            f"{len(work.steps)} pieces did the work of {work.single_runs}, which would have taken "
            f"{unshared_s(work, progress) / 60:.1f} minutes. {energy(progress)}"
        )

    @property
    def claims(self) -> Table | None:
        """Expected, reported and recomputed figures side by side, where there are any but the last."""
        return claims_table(self.outcome.study, self.outcome.results, self.tables)

    def all_tables(self) -> list[Table]:
        """In the order of reading."""
        tables = [answers_table(self.answers)] if self.answers else []
        tables += [gains] if (gains := self.gains) else []
        for of_mode in self.tables:
            of = (of_mode.main, of_mode.teachers, of_mode.bands, of_mode.gaps, of_mode.paired)
            tables += [t for t in of if t is not None]
        return [*tables, self.claims] if self.claims else tables

    @property
    def gains(self) -> Table | None:
        """What the hypotheses are about, by band."""
        return gains_by_band(self.outcome.study, self.outcome.results, self.outcome.corpus.texts)

    def text(self) -> str:
        """For the terminal."""
        console = Console(file=io.StringIO(), width=120)
        for table in self.all_tables()[1 if self.answers else 0 :]:
            console.print(table.rich(), end="\n\n")
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue() + "\n".join(
            [*self.lines(), *(str(self.out / name) for name in (PAGE, MARKDOWN))]
        )

    def markdown(self) -> str:
        """The text of report.md."""
        head = [f"# Study {self.outcome.study.name}", "", *(f"- {line}" for line in self.lines()), ""]
        return "\n".join(head) + "\n" + "\n".join(table.markdown() for table in self.all_tables())

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: verdicts, tables, and for each cell the runs it comes from."""
        return {
            "study": self.outcome.study.model_dump(mode="json"),
            "suspicions": [asdict(f) for f in self.suspicions],
            "answers": [asdict(a) for a in self.answers],
            "ladder": self.ladder,
            "next": {"do": self.advice.do, "command": self.command} if self.advice else None,
            "tables": [asdict(table) for table in self.all_tables()],
            "cells": [
                {"system": r.system, "source": r.source, "held_out": r.held_out, "runs": [str(p) for p in r.runs]}
                for r in self.outcome.results
            ],
            "cost": self.cost(),
        }


def unshared_s(work: Work, progress: Progress) -> float:
    """Seconds of all pieces, were those that several attempts need done for each of them again (`single_runs`)."""
    steps = {step.key: step for step in work.steps}
    needed: dict[str, set[str]] = {}
    for step in work.steps:  # in an order that satisfies their needs
        needed[step.key] = {step.key}.union(*(needed[need] for need in steps[step.key].needs))
    alone = [key for cell in work.cells for key in needed[cell.key]] + [baseline.key for baseline in work.baselines]
    return sum(progress.seconds.get(key, 0.0) for key in alone)


def energy(progress: Progress) -> str:
    """What all pieces used together, in a sentence."""
    done, known = progress.count("done"), progress.joules
    if not known:
        return "Energy not known on this machine (no readable counter)."
    of = "" if len(known) == done else f", of {len(known)} of {done} pieces"
    return (
        f"Energy {sum(known.values()) / JOULES_A_WH:.1f} Wh{of}: of whole processor packages and memory, shared out by "
        "CPU time; without GPUs."
    )


def finish(outcome: Outcome, out: Path, study_argument: str) -> StudyReport:
    """Examines, answers and writes report.html, report.md, results.json and a CSV a table into the study's folder."""
    report = report_of(outcome, out, study_argument)
    write_study_page(report, out / PAGE)
    write_atomically(out / MARKDOWN, report.markdown())
    write_atomically(out / RESULTS, json.dumps(report.to_dict(), indent=1))
    folder = out / "tables"
    folder.mkdir(exist_ok=True)
    for table in report.all_tables():
        write_atomically(folder / f"{file_name(table.title)}.csv", to_csv(table))
    return report


def report_of(outcome: Outcome, out: Path, study_argument: str) -> StudyReport:
    """Everything that follows from the results."""
    study, words = outcome.study, outcome.corpus.texts
    suspicions = suspicions_of(outcome)
    answers = answer_all(study, outcome.results, suspicions, words)
    advice = next_step(study, answers)
    attempts = [r for r in outcome.results if r.source == "attempt"]
    tables = (
        tuple(tables_of(study, outcome.results, words, decode, outcome.work.words_heard) for decode in DECODES)
        if attempts
        else ()
    )
    return StudyReport(
        outcome, out, tuple(suspicions), tuple(answers), _ladder(outcome, bool(suspicions)), advice,
        _command(advice, outcome, out, study_argument), tables,
    )  # fmt: skip


def suspicions_of(outcome: Outcome) -> list[Finding]:
    """Findings on the attempts' runs that make their evaluation void."""
    runs = dict.fromkeys(run for r in outcome.results if r.source == "attempt" for run in r.runs)
    if not runs:
        return []
    return [f for f in examine_all(list(runs)).at_least("refuse") if f.check in VOID]


def _ladder(outcome: Outcome, suspect: bool) -> str:
    ladder = outcome.study.ladder
    if ladder is None or suspect:
        return ""
    predictions = pooled(outcome.results, ladder.attempt, ladder.decode)
    if not predictions:
        return f"Attempt '{ladder.attempt}' has no results: the ladder says nothing."
    normaliser = outcome.study.base().tokenizer.normaliser
    wra = scores_of(predictions, ladder.decode, normaliser, outcome.corpus.texts).overall.wra_percent
    ends = {ladder.says(v) for v in (wra.low, wra.high) if v is not None}
    sure = (
        ""
        if len(ends) <= 1
        else f" (its interval reaches from '{ladder.says(wra.low or 0)}' to '{ladder.says(wra.high or 0)}')"
    )
    return f"Ladder: {wra} % WRA of '{ladder.attempt}' says: {ladder.says(wra.value)}{sure}."


def _command(advice: NextStep | None, outcome: Outcome, out: Path, study_argument: str) -> str:
    if advice is None or not advice.command:
        return ""
    study = outcome.study
    named = study.ladder.attempt if study.ladder else next(iter(study.attempts))
    cells = [c for c in outcome.work.cells if c.attempt == named]
    run = str(cells[0].run) if cells else str(out)
    held_out = " ".join(f"--held-out {s}" for fold in outcome.work.folds for s in fold)
    return advice.command.format(study=study_argument, out=out, run=run, held_out=held_out)


def to_csv(table: Table) -> str:
    """A table's rows as CSV."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(table.columns)
    writer.writerows(table.rows)
    return text.getvalue()


def file_name(title: str) -> str:
    """A title as part of a file name."""
    return "".join(c if c.isalnum() else "_" for c in title.lower()).strip("_")
