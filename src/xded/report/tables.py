"""Tables of results, on the terminal and as Markdown, from one description."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table as RichTable
from rich.text import Text

from xded.scoring import Estimate, Prediction, Scores, Summary
from xded.teachers.crosstest import matrix, oracle, vote, wra

NARROWEST_NAME = 11  # characters; with it 15 speakers fit into 80 columns


@dataclass(frozen=True)
class Table:
    """Columns and rows of text; the first column names the row. `caption` says what the numbers mean."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""

    def rich(self) -> Group:
        """For the terminal; where it is narrow, only the names are wrapped."""
        table = RichTable(box=SIMPLE_HEAD, padding=0, show_edge=False)
        first, *others = map(Text, self.columns)
        table.add_column(first, min_width=NARROWEST_NAME)
        for column in others:
            table.add_column(column, justify="right", no_wrap=True)
        for row in self.rows:
            table.add_row(*map(Text, row))
        return Group(Text(self.title, style="italic"), table, Text(self.caption, style="dim"))

    def markdown(self) -> str:
        """For reports."""
        lines = [f"**{self.title}**", "", "| " + " | ".join(self.columns) + " |"]
        lines.append("| --- |" + " ---: |" * (len(self.columns) - 1))
        lines += ["| " + " | ".join(row) + " |" for row in self.rows]
        return "\n".join(lines + (["", self.caption] if self.caption else [])) + "\n"


def cell(percent: Estimate) -> str:
    """A percentage and its interval, short enough for four bands in 80 columns: 62.5 [54-71]."""
    between = "" if percent.low is None else f" [{percent.low:.0f}-{percent.high:.0f}]"
    return f"{percent.value:.1f}{between}"


def crosstest_values(
    said: Mapping[str, Sequence[Prediction]], normaliser: str, held_out: Sequence[str]
) -> dict[str, dict[str, dict[str, float | None]]]:
    """WRA of every teacher on every speaker, and of vote and oracle: row -> column -> value, low, high (per cent).

    A teacher's row also has `own`, the speaker that it was made for, and `others`, all takes of everybody else.
    """
    everyone = {**said, "vote": vote(said), "any-teacher oracle": oracle(said, normaliser)}
    rows: dict[str, dict[str, Estimate]] = matrix(everyone, normaliser)
    for name, predictions in everyone.items():
        unheard = [p for p in predictions if p.speaker in held_out]
        if unheard:
            rows[name]["held out"] = wra(unheard, normaliser)
    for name in said:
        sides = {"own": [p for p in said[name] if p.speaker == name],
                 "others": [p for p in said[name] if p.speaker != name]}  # fmt: skip
        rows[name] |= {side: wra(predictions, normaliser) for side, predictions in sides.items() if predictions}
    return {name: {column: asdict(value) for column, value in row.items()} for name, row in rows.items()}


def crosstest_table(values: Mapping[str, Mapping[str, Mapping[str, float | None]]]) -> Group:
    """The cross-test matrix: teachers in rows, speakers in columns."""
    last = ("held out", "own", "others")
    columns = sorted({column for row in values.values() for column in row if column not in last})
    columns += [column for column in last if any(column in row for row in values.values())]
    rows = []
    for name, row in values.items():
        cells = (f"{row[c]['value']:.0f}" if c in row else "-" for c in columns)
        rows.append((name, *cells))
    caption = (
        "WRA in per cent on takes that nobody was trained on; own: the teacher's speaker (on the diagonal); others: "
        "everybody else. Intervals: crosstest.json."
    )
    return Table("Cross-test: teacher (row) on speaker (column)", ("teacher", *columns), tuple(rows), caption).rich()


def score_table(scores: Scores) -> RichTable:
    """One row for each group, for 80 columns; the caption holds the conditions. `scores.json` has all intervals."""
    view = RichTable(
        "", title="Scores", caption=Text(scores.statement), box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False
    )
    for heading in ("takes", "WRA % [95 %]", "WER %", "CER %", "empty", "distinct", "words", "listed"):
        view.add_column(heading, justify="right", no_wrap=True)

    def add(name: str, s: Summary, last: bool) -> None:
        wer, cer, empty = (f"{rate.value:.1f}" for rate in (s.wer_percent, s.cer_percent, s.empty_percent))
        words = f"{s.words_per_output.value:.2f}"
        listed = f"{s.listed_percent.value:.1f}" if s.listed_percent else "-"
        cells = (Text(name), str(s.takes), str(s.wra_percent), wer, cer, empty, str(s.distinct_outputs), words, listed)
        view.add_row(*cells, end_section=last)

    add("all", scores.overall, False)
    if len(scores.by_speaker) > 1:
        view.add_row("mean of speakers", "", str(scores.speaker_mean_wra_percent), end_section=True)
    for groups in (scores.by_speaker, scores.by_band, scores.by_word_type):
        for name, summary in groups.items():
            add(name, summary, name == list(groups)[-1])
    return view


def confusion_table(scores: Scores) -> RichTable:
    """The most frequent wrong outputs of all predictions."""
    view = RichTable("said", "heard as", "takes", "predictions", title="Confusions", caption=Text(scores.statement))
    for c in scores.overall.confusions:
        view.add_row(Text(c.reference), Text(c.hypothesis or "(nothing)"), str(c.takes), str(c.predictions))
    return view
