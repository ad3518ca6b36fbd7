"""One page about a study: verdict, tables, pictures, makers. It needs no other file, no script and no network."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.colors import to_hex

from xded import __version__
from xded.findings import CHECKS, Finding
from xded.report.pages import Drawing, Grid, data_uri, page
from xded.report.study_evidence import Bad, best_first, environments, learning_of, watched, worst
from xded.report.study_figures import (
    answers_drawing,
    attention_drawing,
    bars_drawing,
    learning_drawing,
    spectrogram_drawing,
)
from xded.report.study_tables import COMPARED_BASELINES, SUMMARY_COLUMNS, StudyTables
from xded.report.tables import Table
from xded.scoring import Estimate
from xded.study.outcome import Result
from xded.study.plan import Study
from xded.study.run import Outcome, to_yaml
from xded.training.status import now, write_atomically

if TYPE_CHECKING:  # report.study writes this page
    from xded.report.study import StudyReport

TEMPLATE = "study_page.html"
MOST_PANELS = 10  # attempts with pictures of their own: keeps the page small
CONFUSIONS_SHOWN = 8
TITLES_SHOWN = 20  # of pieces that are not done
JOULES_A_WH = 3600.0
SIGNIFICANT = 0.05
MEASURED = (
    "Wh: what whole processor packages and their memory used (RAPL counters), shared out by CPU time among all that "
    "ran meanwhile; pieces that could not be measured are left out, and so are GPUs."
)
INTERVAL = re.compile(r"^(?P<value>-?[\d.]+) (?P<interval>\[[^\]]+\])$")
STATES = {
    "running": "running",
    "killed": "not finished, and nobody works on it",
    "finished": "finished",
    "failed": "finished with failures",
}


@dataclass(frozen=True)
class Heat:
    """A table whose cells are coloured by their numbers: (text, background, ink) each, or none."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[tuple[str, str, str] | None, ...]], ...]


def write_study_page(report: StudyReport, path: Path, *, embed_audio: bool = False) -> None:
    """Writes or replaces the page, in one step.

    Args:
        report: what the study says; path: of the page; links to runs are relative to it.
        embed_audio: also put the sound of the worst recordings into the page.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, render(report, path, embed_audio=embed_audio))


def render(report: StudyReport, path: Path, *, embed_audio: bool = False) -> str:
    """The page as HTML; every text is escaped."""
    outcome, study = report.outcome, report.outcome.study
    problems: list[str] = []
    learned = learning_of(outcome)
    best = best_first(report.tables, study.attempts)
    begun = [*best, *(one.attempt for one in learned if one.attempt not in best)]
    shown = begun[:MOST_PANELS]
    versions, commands = environments(outcome, problems)
    return page(
        TEMPLATE,
        report=report,
        study=study,
        state=STATES[outcome.state],
        counts=_counts(outcome),
        todo=_todo(outcome),
        suspicions=[_finding(f) for f in report.suspicions],
        answers_drawing=answers_drawing(report.answers, study.hypotheses),
        tables=_grids(report, path),
        paired=[(_differing(one), _grid(one.paired)) for one in report.tables],
        learning=[learning_drawing(one, f"learning{n}") for n, one in enumerate(learned) if one.attempt in shown],
        speakers=_speakers(report.tables, best, study),
        bands=_bands(report.tables, best, study),
        heats=[heat for one in report.tables if (heat := _heat(one))],
        confusions=_confusions(report.tables, best),
        attention=[
            (heard, attention_drawing(name, heard, f"attention{n}"))
            for n, (name, heard) in enumerate(watched(outcome, best, problems))
        ],
        worst=[_bad(bad, outcome, n) for n, bad in enumerate(worst(outcome, problems, audio=embed_audio))],
        audio=embed_audio,
        left_out=begun[MOST_PANELS:],
        versions=_versions(versions),
        commands=commands,
        study_file=to_yaml(study),
        costs=_costs(outcome),
        problems=problems,
        written=now(),
        version=__version__,
    )


# --- state and verdict ------------------------------------------------------------------------------------


def _counts(outcome: Outcome) -> str:
    work, progress = outcome.work, outcome.progress
    folds = "; ".join("+".join(fold) for fold in work.folds)
    seeds = ", ".join(map(str, outcome.study.seeds))
    return (
        f"{progress.count('done')} of {len(work.steps)} pieces of work are done. "
        f"{len(outcome.study.attempts)} attempts, held out: {folds}, seeds {seeds}."
    )


def _todo(outcome: Outcome) -> list[tuple[str, list[str]]]:
    """What is not done, by state, with the reasons that are known."""
    states, errors = outcome.progress.states, outcome.progress.errors
    found = []
    for state in dict.fromkeys(("failed", "left out", "running", *states.values())):
        steps = [step for step in outcome.work.steps if states[step.key] == state]
        if steps and state != "done":
            said = [step.title + (f": {errors[step.key]}" if step.key in errors else "") for step in steps]
            rest = [f"and {len(said) - TITLES_SHOWN} more"] if len(said) > TITLES_SHOWN else []
            found.append((f"{len(steps)} {state}", said[:TITLES_SHOWN] + rest))
    return found


def _finding(finding: Finding) -> dict[str, str]:
    title = CHECKS[finding.check].title if finding.check in CHECKS else finding.check
    keys = ("check", "severity", "subject", "what", "effect", "remedy")
    return {"title": title, **{key: str(getattr(finding, key)) for key in keys}}


# --- tables -----------------------------------------------------------------------------------------------


def _grid(table: Table) -> Grid:
    rows = tuple((row[0], *map(_value, row[1:])) for row in table.rows)
    return Grid(table.title, table.columns, rows, table.caption)


def _value(text: str) -> str:
    """A number and its interval as two pieces that stay whole where a line is short."""
    found = INTERVAL.match(text)
    if found is None:
        return text
    return Markup('<span class="whole">{value}</span> <span class="whole faint">{interval}</span>').format(
        **found.groupdict()
    )


def _grids(report: StudyReport, path: Path) -> list[Grid]:
    """All tables but the paired comparisons; in the first ones every number leads to its run."""
    tables = report.tables
    kinds = ([report.gains], [report.claims], *([t.teachers, t.gaps, t.bands] for t in tables))
    return [
        *(_linked(report.outcome, one, path) for one in tables),
        *(_grid(table) for kind in kinds for table in kind if table is not None),
    ]


def _differing(tables: StudyTables) -> str:
    """The paired comparisons in a sentence."""
    apart = sum(pair.p_corrected < SIGNIFICANT for pair in tables.comparisons)
    return (
        f"Paired comparisons ({tables.decode}): {apart} of {len(tables.comparisons)} differ "
        f"(p corrected below {SIGNIFICANT:g})"
    )


def _linked(outcome: Outcome, tables: StudyTables, path: Path) -> Grid:
    table = tables.main
    folds = list(dict.fromkeys(r.held_out for r in outcome.results))
    by_place = {(r.system, r.held_out): r for r in outcome.results}
    seeds, before = {cell.run: cell.seed for cell in outcome.work.cells}, len(SUMMARY_COLUMNS)
    rows = [tuple(map(_value, table.rows[0]))]  # chance has no run
    for row, system in zip(table.rows[1:], tables.scores, strict=True):
        cells = [
            _leading(_value(text), by_place.get((system, fold)), seeds, path)
            for text, fold in zip(row[before:], folds, strict=True)
        ]
        rows.append((row[0], *map(_value, row[1:before]), *cells))
    note = (
        f"{table.caption} A number leads to its run; vote, oracle and the like are computed from the rows above them."
    )
    return Grid(table.title, table.columns, tuple(rows), note)


def _leading(value: str, result: Result | None, seeds: Mapping[Path, int], path: Path) -> str:
    """A value with links to the runs that it comes from: itself the link, or a link a seed."""
    if result is None or result.source == "derived" or not result.runs:
        return value
    links = [
        Markup('<a href="{}">{}</a>').format(address(run, path), value if len(result.runs) == 1 else seeds.get(run, n))
        for n, run in enumerate(result.runs, start=1)
    ]
    if len(links) == 1:
        return links[0]
    return Markup('{} <span class="whole faint">seed {}</span>').format(value, Markup(" ").join(links))


def address(run: Path, path: Path) -> str:
    """A run's page, or its folder, seen from the page at `path`."""
    target = run / "report.html" if (run / "report.html").is_file() else run
    relative = Path(os.path.relpath(target, path.resolve().parent)).as_posix()
    return quote(relative) + ("/" if target.is_dir() else "")


def _confusions(tables: Sequence[StudyTables], best: Sequence[str]) -> list[Grid]:
    """The most frequent wrong outputs of each attempt, any text allowed."""
    grids = []
    for table in tables[:1]:
        for name in best[:MOST_PANELS]:
            rows = [
                (c.reference, c.hypothesis or "(nothing)", str(c.takes), str(c.predictions))
                for c in table.scores[name].overall.confusions[:CONFUSIONS_SHOWN]
            ]
            if rows:
                grids.append(Grid(f"{name} ({table.decode})", ("said", "heard as", "takes", "outputs"), tuple(rows)))
    return grids


def _versions(versions: Sequence[tuple[str, str, int]]) -> Grid:
    rows = tuple((what, version, str(runs)) for what, version, runs in versions)
    return Grid("Versions", ("what", "version", "runs made with it"), rows)


def _costs(outcome: Outcome) -> list[Grid]:
    """Minutes, and energy where any is known, by kind of work and by attempt."""
    states, seconds, joules = outcome.progress.states, outcome.progress.seconds, outcome.progress.joules

    def row(name: str, keys: Sequence[str]) -> tuple[str, ...]:
        spent = [seconds[key] / 60 for key in keys if states[key] == "done"]
        used = [joules[key] / JOULES_A_WH for key in keys if key in joules]
        mean = f"{sum(spent) / len(spent):.2f}" if spent else "-"
        energy = (f"{sum(used):.2f}" if used else "-",) if joules else ()
        return (name, str(len(keys)), str(len(spent)), f"{sum(spent):.1f}", mean, *energy)

    work = outcome.work
    kinds = dict.fromkeys(step.kind for step in work.steps)
    by_kind = [row(kind, [s.key for s in work.steps if s.kind == kind]) for kind in kinds]
    by_kind.append(row("all", [s.key for s in work.steps]))
    by_attempt = [row(a, [c.key for c in work.cells if c.attempt == a]) for a in outcome.study.attempts]
    columns = ("pieces", "done", "minutes", "minutes each", *(("Wh",) if joules else ()))
    return [Grid("By kind of work", ("kind", *columns), tuple(by_kind), MEASURED if joules else ""),
            Grid("By attempt (training and test)", ("attempt", *columns), tuple(by_attempt))]  # fmt: skip


# --- pictures ---------------------------------------------------------------------------------------------


def _heard(name: str, study: Study) -> str:
    """An attempt's name with a mark when it has heard the speakers that it is tested on."""
    attempt = study.attempts.get(name)
    return f"{name} (heard)" if attempt is not None and attempt.include_held_out else name


def _speakers(tables: Sequence[StudyTables], best: Sequence[str], study: Study) -> list[Drawing]:
    """A picture an attempt, and one of the parent: WRA of every tested speaker."""
    found = []
    for number, name in enumerate([*best[:MOST_PANELS], "parent"]):
        scores = {t.decode: t.scores[name].by_speaker for t in tables if name in t.scores}
        if scores:
            bars = {decode: {s: v.wra_percent for s, v in of.items()} for decode, of in scores.items()}
            found.append(bars_drawing(f"speakers{number}", _heard(name, study), "speaker", bars))
    return found


def _bands(tables: Sequence[StudyTables], best: Sequence[str], study: Study) -> list[Drawing]:
    """A picture a band: WRA of every attempt and of what was there before."""
    systems = [*best[:MOST_PANELS], *COMPARED_BASELINES]
    names = dict.fromkeys(band for t in tables for scores in t.scores.values() for band in scores.by_band)
    found = []
    for band in names:
        bars: dict[Any, dict[str, Estimate]] = {
            t.decode: {_heard(s, study): t.scores[s].by_band[band].wra_percent for s in systems
                       if s in t.scores and band in t.scores[s].by_band}
            for t in tables
        }  # fmt: skip
        bars = {decode: of for decode, of in bars.items() if of}
        if bars:
            found.append(bars_drawing(f"band_{band}", f"band {band.replace('_', ' ')}", "system", bars))
    return found


def _heat(tables: StudyTables) -> Heat | None:
    """WRA of every teacher (row) on every speaker that it was asked about (column)."""
    teachers = {name: s.by_speaker for name, s in tables.scores.items() if name.startswith("teacher ")}
    speakers = sorted({speaker for by_speaker in teachers.values() for speaker in by_speaker})
    if not teachers:
        return None
    values = {
        name.removeprefix("teacher "): [of[s].wra_percent.value if s in of else None for s in speakers]
        for name, of in teachers.items()
    }
    columns = list(zip(*values.values(), strict=True))
    values["mean of the teachers"] = [_mean([v for v in column if v is not None]) for column in columns]
    rows = tuple(
        (name, tuple(map(_heated, [*row, _mean([v for v in row if v is not None])]))) for name, row in values.items()
    )
    return Heat(f"WRA in per cent ({tables.decode})", ("teacher", *speakers, "mean"), rows)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _heated(percent: float | None) -> tuple[str, str, str] | None:
    if percent is None:
        return None
    colour = mpl.colormaps["cividis"](percent / 100)
    light = sum(share * (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4)
                for share, c in zip((0.2126, 0.7152, 0.0722), colour, strict=False))  # fmt: skip
    # WCAG 2: the ink with the higher contrast, at least 4.5 : 1
    return f"{percent:.0f}", to_hex(colour), "#000000" if light > 0.179 else "#ffffff"


def _counted(said: Counter[str]) -> str:
    """Outputs, the most frequent first."""
    return ", ".join(text + (f" ({count} times)" if count > 1 else "") for text, count in said.most_common())


def _bad(bad: Bad, outcome: Outcome, number: int) -> dict[str, Any]:
    """A recording of the page's last pictures."""
    recording, config = bad.recording, outcome.study.base().features
    decodes = list(dict.fromkeys(decode for said in bad.outputs.values() for decode in said))
    rows = tuple(
        (attempt, *(_counted(said[d]) if d in said else "-"
                    for d in decodes))
        for attempt, said in bad.outputs.items()
    )  # fmt: skip
    return {
        "recording": recording,
        "right": f"{bad.right} of {bad.asked} outputs right",
        "drawing": spectrogram_drawing(bad, config, f"worst{number}"),
        "outputs": Grid(f"What was heard for “{recording.text}”", ("attempt", *decodes), rows),
        "audio": data_uri(bad.audio, "audio/flac") if bad.audio else None,
    }
