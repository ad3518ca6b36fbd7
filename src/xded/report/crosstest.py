"""The cross-test of teachers from anywhere: one table, CSV and JSON from the same numbers."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from xded.errors import few
from xded.report.tables import Table
from xded.scoring import Estimate
from xded.teachers.crosstest import Tested

WITH_INTERVALS = 4  # tested speakers that fit beside each other with intervals in 80 columns
TIE_RULE = "of n tied outputs each counts 1/n, what a random choice gives on average"

# what stands below the teachers: name and number of each tested speaker
SUMMARY: tuple[tuple[str, Callable[[Tested], Estimate]], ...] = (
    ("mean teacher", lambda t: t.mean),
    ("best teacher", lambda t: t.scores[t.best].overall.wra_percent),
    ("vote", lambda t: t.vote.shared),
    ("vote, ties to the first name", lambda t: t.vote.first_name),
    ("vote, ties at their worst", lambda t: t.vote.worst),
    ("vote, ties at their best", lambda t: t.vote.best),
    ("any-teacher oracle", lambda t: t.oracle),
)


def rows_of(tested: Sequence[Tested]) -> list[tuple[str, list[Estimate | None]]]:
    """Teachers, then mean, best, vote and oracle; none where a teacher was not tested on a speaker."""
    teachers = sorted({name for t in tested for name in t.scores})
    rows: list[tuple[str, list[Estimate | None]]] = []
    for name in teachers:
        scores = (t.scores.get(name) for t in tested)
        rows.append((name, [None if s is None else s.overall.wra_percent for s in scores]))
    return rows + [(name, [number(t) for t in tested]) for name, number in SUMMARY]


def table_of(tested: Sequence[Tested], normaliser: str) -> Table:
    """Teachers in rows, tested speakers in columns; what was counted stands below."""
    wide = len(tested) > WITH_INTERVALS
    rows = [(name, *(_cell(value, wide) for value in values)) for name, values in rows_of(tested)]
    rows += [
        ("recordings with a tie", *(f"{t.vote.tied_percent:.1f}" for t in tested)),
        ("takes", *(f"{t.takes:,}" for t in tested)),
        ("recordings", *(f"{t.recordings:,}" for t in tested)),
        ("effective recordings", *(f"{_effective(t):.0f}" for t in tested)),
    ]
    best = "; ".join(f"{t.speaker}: {t.best}" for t in tested)
    caption = (
        f"WRA in per cent: the whole output equals the prompt after normalisation ('{normaliser}'). "
        + ("Intervals: --json. " if wide else "In brackets 95 % over takes. ")
        + "A speaker's own teacher has no part in what stands below the teachers. "
        + f"Best teacher, chosen after the fact: {best}. Vote: plurality of whole outputs, ties shared ({TIE_RULE}); "
        "ties at their worst and best: what any rule could give. Effective: independent recordings with the same "
        "standard error, mean over teachers; microphone copies of a take are right or wrong together."
    )
    return Table(
        "Cross-test: teacher (row) on speaker (column)", ("teacher", *(t.speaker for t in tested)), tuple(rows), caption
    )


def csv_of(tested: Sequence[Tested]) -> str:
    """The matrix with its intervals: for each speaker the columns SPEAKER, SPEAKER_low, SPEAKER_high, in per cent."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["teacher", *(f"{t.speaker}{end}" for t in tested for end in ("", "_low", "_high"))])
    for name, values in rows_of(tested):
        triples = ((v.value, v.low, v.high) if v else (None, None, None) for v in values)
        writer.writerow([name, *("" if n is None else f"{n:.2f}" for triple in triples for n in triple)])
    return file.getvalue()


def to_dict(tested: Sequence[Tested], normaliser: str) -> dict[str, Any]:
    """JSON-able."""
    speakers = {}
    for t in tested:
        teachers = {
            name: {
                "wra_percent": asdict(scores.overall.wra_percent),
                "wer_percent": asdict(scores.overall.wer_percent),
                "cer_percent": asdict(scores.overall.cer_percent),
                "effective_recordings": round(t.effective_recordings[name], 1),
            }
            for name, scores in t.scores.items()
        }
        speakers[t.speaker] = {
            "recordings": t.recordings,
            "takes": t.takes,
            "effective_recordings": round(_effective(t), 1),
            "teachers": teachers,
            "mean_teacher": asdict(t.mean),
            "best_teacher": {"name": t.best, **asdict(t.scores[t.best].overall.wra_percent)},
            "vote": {"tie_rule": f"ties shared: {TIE_RULE}", **asdict(t.vote)},
            "any_teacher_oracle": asdict(t.oracle),
            "lacking": {name: list(recordings) for name, recordings in t.lacking.items()},
            "disputed": list(t.disputed),
        }
    return {"normaliser": normaliser, "speakers": speakers}


def left_out(tested: Sequence[Tested]) -> list[str]:
    """One line for each teacher that lacks recordings of a speaker, and for references that disagree."""
    lines = []
    for t in tested:
        for name, recordings in t.lacking.items():
            lines.append(
                f"{t.speaker}: '{name}' lacks {len(recordings):,} recordings that other teachers have: "
                f"{few(recordings)}. All numbers are on the {t.recordings:,} that all of them have."
            )
        if t.disputed:
            lines.append(
                f"{t.speaker}: left out {len(t.disputed):,} recordings whose prompt differs between teachers: "
                f"{few(t.disputed)}."
            )
    return lines


def _effective(tested: Tested) -> float:
    return sum(tested.effective_recordings.values()) / len(tested.effective_recordings)


def _cell(value: Estimate | None, wide: bool) -> str:
    if value is None:
        return "-"
    between = "" if wide or value.low is None else f" [{value.low:.1f}-{value.high:.1f}]"
    return f"{value.value:.1f}{between}"
