"""What a study has produced: predictions by system, fold and decode mode, read from finished pieces."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Literal

from rapidfuzz import process
from rapidfuzz.distance import Levenshtein

from xded.scoring import Prediction, read_predictions
from xded.study.engine import Progress
from xded.study.pieces import DECODES, EFFECTIVE
from xded.study.plan import BEST_TEACHER as BEST_TEACHER
from xded.study.plan import MEAN_TEACHER, PARENT, TEACHER, DecodeName
from xded.study.plan import ORACLE as ORACLE
from xded.study.plan import VOTE as VOTE
from xded.study.steps import Cell, Work
from xded.teachers.crosstest import best_by_speaker, oracle, vote
from xded.tokenizer import normalise
from xded.training.status import StatusError, read_status

SNAPPED = "nearest listed word"
Source = Literal["attempt", "baseline", "derived", "imported"]


@dataclass(frozen=True)
class Result:
    """A system in one fold: its predictions of all seeds, by decode mode, and the runs that they come from.

    Attributes:
        reported: WRA in per cent that an imported file claims for itself; nothing is ever computed from it.
        effective_teachers: that an attempt's targets amount to, mean over its runs; none where it has no targets.
        own_percent: WRA of a teacher on the validation takes of its own speaker, which chose its checkpoint.
    """

    system: str
    source: Source
    held_out: tuple[str, ...]
    predictions: Mapping[DecodeName, Sequence[Prediction]]
    runs: tuple[Path, ...]
    reported: float | None = None
    effective_teachers: float | None = None
    own_percent: float | None = None

    def of(self, decode: DecodeName) -> list[Prediction]:
        """Predictions of a decode mode (none: empty)."""
        return list(self.predictions.get(decode, ()))


def collect(work: Work, progress: Progress, words: Iterable[str], normaliser: str) -> list[Result]:
    """Results of everything that is done: attempts, parent and teachers, and what follows from the teachers.

    Args:
        work, progress: of the study; pieces that are not done have no result.
        words: the listed words; normaliser: of `tokenizer.normalise`.
    """
    results: list[Result] = []
    for held_out in work.folds:
        cells = [c for c in work.cells if c.held_out == held_out and progress.states[c.key] == "done"]
        names = dict.fromkeys(cell.attempt for cell in cells)
        results += [_attempt(name, held_out, [c for c in cells if c.attempt == name]) for name in names]
        there = [b for b in work.baselines if b.held_out == held_out and progress.states[b.key] == "done"]
        asked = [
            Result(
                b.system,
                "baseline",
                held_out,
                {d: read_predictions(b.predictions(d)) for d in DECODES},
                (b.folder,),
                own_percent=validated_percent(b.run) if b.run and b.system.startswith(TEACHER) else None,
            )
            for b in there
        ]
        results += asked + derived(asked, held_out, list(words), normaliser)
    return results


def _attempt(name: str, held_out: tuple[str, ...], cells: Sequence[Cell]) -> Result:
    predictions = {
        decode: [p for cell in cells for p in read_predictions(cell.predictions(decode))] for decode in DECODES
    }
    numbers = [number for cell in cells if cell.targets for number in _effective(cell.targets, cell.kinds)]
    effective = fmean(numbers) if numbers else None
    return Result(
        name, "attempt", held_out, predictions, tuple(cell.run for cell in cells), effective_teachers=effective
    )


def _effective(targets: Path, kinds: Collection[str]) -> list[float]:
    """Effective numbers of teachers of the kinds that a run learns from; empty where nobody has noted them."""
    try:
        noted = json.loads((targets / EFFECTIVE).read_text(encoding="utf-8"))
        return [number for kind, number in noted.items() if kind in kinds]
    except (OSError, ValueError):
        return []


def validated_percent(run: Path) -> float | None:
    """Validation WRA of a run's best checkpoint, per cent; none where it was never validated."""
    try:
        best = read_status(run).get("best") or {}
    except StatusError:
        return None
    return 100.0 * best["wra"] if "wra" in best else None


def derived(asked: Sequence[Result], held_out: tuple[str, ...], words: Sequence[str], normaliser: str) -> list[Result]:
    """Vote, oracle and best of the teachers, and the parent's output moved to the nearest listed word."""
    found = []
    teachers = [r for r in asked if r.system.startswith(TEACHER)]
    if teachers:
        made: dict[str, dict[DecodeName, list[Prediction]]] = {MEAN_TEACHER: {}, BEST_TEACHER: {}, VOTE: {}, ORACLE: {}}
        for decode in DECODES:
            said = {r.system: r.of(decode) for r in teachers}
            # each teacher in the place of a seed: what all say of a take stays together in the intervals
            made[MEAN_TEACHER][decode] = [
                replace(p, seed=number) for number, system in enumerate(sorted(said)) for p in said[system]
            ]
            made[BEST_TEACHER][decode] = best_by_speaker(said, normaliser)
            made[VOTE][decode] = vote(said)
            made[ORACLE][decode] = oracle(said, normaliser)
        runs = tuple(run for r in teachers for run in r.runs)
        found += [Result(name, "derived", held_out, by_decode, runs) for name, by_decode in made.items()]
    for result in asked:
        if result.system == PARENT:
            nearest = snapped(result.of("open"), words, normaliser)
            found.append(Result(f"{PARENT}, {SNAPPED}", "derived", held_out, {"word list": nearest}, result.runs))
    return found


def snapped(predictions: Sequence[Prediction], words: Sequence[str], normaliser: str) -> list[Prediction]:
    """Every output replaced by the listed word with the smallest edit distance (the first of equals)."""
    listed = [normalise(word, normaliser) for word in words]
    nearest: dict[str, str] = {}
    for prediction in predictions:
        text = normalise(prediction.hypothesis, normaliser)
        if text not in nearest:
            nearest[text] = process.extractOne(text, listed, scorer=Levenshtein.distance)[0]
    return [Prediction(**{**vars(p), "hypothesis": nearest[normalise(p.hypothesis, normaliser)]}) for p in predictions]
