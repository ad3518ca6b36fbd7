"""The main job's table and what it says in words. Every number comes from predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from xded.config import DecodeConfig
from xded.corpus.manifest import BANDS
from xded.report.tables import Table, cell
from xded.scoring import Comparison, Estimate, Prediction, Scores, compare, score
from xded.study.plan import BEST_TEACHER, ORACLE, VOTE
from xded.training.evaluation import decoded_how

CHANCE = "chance"
SIGNIFICANT = 0.05

Results = Mapping[str, Mapping[str, Sequence[Prediction]]]


def scores_of(
    results: Results, normaliser: str, words: Sequence[str], decodes: Mapping[str, DecodeConfig], words_heard: str
) -> dict[str, dict[str, Scores]]:
    """Scores of every system and decode mode; the folds' guards saw to it that no tested speaker was heard."""
    return {
        system: {
            decode: score(
                predictions,
                normaliser=normaliser,
                word_list=words,
                conditions={"speakers": "unseen", "words": words_heard, **decoded_how(decodes[decode])},
            )
            for decode, predictions in by_decode.items()
        }
        for system, by_decode in results.items()
    }


def in_order(systems: Sequence[str]) -> list[str]:
    """Rows as a reader needs them: what is there before students, then students."""
    teachers = sorted(s for s in systems if s.startswith("teacher "))
    first = ["parent", *teachers, BEST_TEACHER, VOTE, ORACLE]
    return [s for s in first if s in systems] + [s for s in systems if s not in first]


def main_table(scores: Mapping[str, Mapping[str, Scores]], words: int, title: str) -> Table:
    """One row a system, one column a decode mode: WRA in per cent with its interval over takes."""
    decodes = list(next(iter(scores.values())))
    rows = [(CHANCE, *(f"{100 / words:.1f}" if decode == "word list" else "0.0" for decode in decodes), "")]
    for system in in_order(list(scores)):
        by_decode = scores[system]
        summary = next(iter(by_decode.values()))
        tested = (
            f"{summary.overall.takes} x {len(summary.seeds)}" if len(summary.seeds) > 1 else str(summary.overall.takes)
        )
        rows.append((system, *(cell(by_decode[d].overall.wra_percent) for d in decodes), tested))
    open_scores = next(iter(scores.values()))[decodes[0]]
    caption = (
        "WRA in per cent with 95 % bootstrap intervals over takes (x seeds). Speakers unseen, "
        f"words {open_scores.conditions['words']}. "
        f"open: CTC greedy, any text can come out; word list: the best of {words} words by both heads. "
        f"Normaliser {open_scores.conditions['normaliser']}. Each teacher is tested on the folds that hold out others; "
        "the best one is chosen after the fact, for each speaker; the oracle counts a take that any of them got right."
    )
    return Table(title, ("system", *decodes, "takes"), tuple(rows), caption)


def band_table(scores: Mapping[str, Mapping[str, Scores]], decode: str) -> Table | None:
    """WRA by intelligibility band, when the corpus has bands."""
    bands = [b for b in BANDS if any(b in s[decode].by_band for s in scores.values())]
    if not bands:
        return None
    rows = []
    for system in in_order(list(scores)):
        by_band = scores[system][decode].by_band
        rows.append((system, *(cell(by_band[b].wra_percent) if b in by_band else "-" for b in bands)))
    return Table(f"By intelligibility band ({decode})", ("system", *bands), tuple(rows))


def sentence(comparison: Comparison, student: str, other: str) -> str:
    """What a paired comparison says; the interval is that of the difference, seen from whoever is ahead."""
    points: Estimate = comparison.difference_points
    p = "p < 0.001" if comparison.p_value < 0.001 else f"p = {comparison.p_value:.3f}"
    apart = comparison.p_value < SIGNIFICANT
    sign = -1.0 if apart and points.value < 0 else 1.0
    between = ""
    if points.low is not None and points.high is not None:
        low, high = sorted((sign * points.low, sign * points.high))
        between = f" [{low:.1f} to {high:.1f}]"
    numbers = f"{sign * points.value:.1f} points{between}, {p}, {comparison.takes} takes"
    if not apart:
        return f"{student} and {other} cannot be told apart: {numbers}."
    return f"{student} {'beats' if sign > 0 else 'LOSES to'} {other} by {numbers}."


def in_words(scores: Mapping[str, Mapping[str, Scores]]) -> list[str]:
    """Paired comparisons of the distilled students with everything that they have to beat, for each decode mode."""
    pairs = (
        ("student", "supervised from scratch"),
        ("student", "supervised from scratch, with control speech"),
        ("student", "supervised from the parent"),
        ("student", VOTE),
        ("student from the parent", "supervised from the parent"),
        ("student from the parent", VOTE),
    )
    said = []
    for decode in next(iter(scores.values())):
        for student, other in pairs:
            if student in scores and other in scores:
                comparison = compare(scores[student][decode], scores[other][decode])
                said.append(f"{decode}: " + sentence(comparison, student, other))
    return said
