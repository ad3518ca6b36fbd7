"""A study's tables: attempts by folds, baselines, paired comparisons, answers. Every number comes from predictions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from xded.corpus.manifest import BANDS
from xded.report.tables import Table, cell
from xded.scoring import Prediction, Scores
from xded.study.outcome import BEST_TEACHER, ORACLE, VOTE, Result
from xded.study.plan import MEAN_TEACHER, SOUP, TEACHER, ZERO_SHOT, DecodeName, Study
from xded.study.verdict import Answer, Paired, by_band, compare_all, pooled, scores_of

NOT_DONE = "-"
CHANCE = "chance"  # the row of
SUMMARY_COLUMNS = ("system", "all takes", "mean of speakers", "takes", "teachers")  # before one a fold
COMPARED_BASELINES = ("parent", VOTE, BEST_TEACHER)


@dataclass(frozen=True)
class StudyTables:
    """Tables of one decode mode."""

    decode: DecodeName
    main: Table
    bands: Table | None
    gaps: Table | None
    paired: Table
    teachers: Table | None
    comparisons: tuple[Paired, ...]
    scores: dict[str, Scores]


def teachers_of(results: Sequence[Result]) -> list[str]:
    """The study's own teachers; an imported result may be called like one."""
    return sorted({r.system for r in results if r.source == "baseline" and r.system.startswith(TEACHER)})


def systems_of(study: Study, results: Sequence[Result]) -> list[str]:
    """Rows: what was there before the students, then attempts in the file's order, then what was imported."""
    there = list(dict.fromkeys(r.system for r in results))
    teachers = teachers_of(results)
    derived = [r.system for r in results if r.source == "derived" and r.system not in (BEST_TEACHER, VOTE, ORACLE)]
    before = [ZERO_SHOT, "parent", SOUP, *dict.fromkeys(derived), *teachers, BEST_TEACHER, VOTE, ORACLE]
    attempts = [name for name in study.attempts if name in there]
    first = [s for s in before if s in there]
    return first + attempts + [s for s in there if s not in first and s not in attempts]


def tables_of(
    study: Study, results: Sequence[Result], words: Sequence[str], decode: DecodeName, words_heard: str
) -> StudyTables:
    """All tables of a decode mode; `words_heard` as in `Work`."""
    normaliser = study.base().tokenizer.normaliser
    folds = list(dict.fromkeys(r.held_out for r in results))
    systems = [s for s in systems_of(study, results) if pooled(results, s, decode)]
    scores = {s: scores_of(pooled(results, s, decode), decode, normaliser, words) for s in systems}
    compared = [s for s in systems if s in study.attempts or s in COMPARED_BASELINES]
    comparisons = compare_all(results, compared, decode, normaliser, words)
    return StudyTables(
        decode,
        _main(study, results, scores, folds, words, decode, words_heard),
        _bands(scores, decode),
        _gaps(study, results, folds, words, decode),
        _paired(comparisons, decode),
        _teachers(results, scores) if decode == "open" else None,
        tuple(comparisons),
        scores,
    )


def _main(
    study: Study, results: Sequence[Result], scores: dict[str, Scores], folds: Sequence[tuple[str, ...]],
    words: Sequence[str], decode: DecodeName, words_heard: str,
) -> Table:  # fmt: skip
    normaliser = study.base().tokenizer.normaliser
    columns = (*SUMMARY_COLUMNS, *("+".join(fold) for fold in folds))
    chance = f"{100 / len(words):.1f}" if decode == "word list" else "0.0"
    rows = [(CHANCE, chance, chance, "", NOT_DONE, *[chance] * len(folds))]
    for system, total in scores.items():
        attempt = study.attempts.get(system)
        cells = []
        for fold in folds:
            of: list[Prediction] = [
                p for r in results if r.system == system and r.held_out == fold for p in r.of(decode)
            ]
            cells.append(cell(scores_of(of, decode, normaliser, words).overall.wra_percent) if of else NOT_DONE)
        heard = " (heard half of the speaker)" if attempt is not None and attempt.include_held_out else ""
        seeds = f" x {len(total.seeds)}" if len(total.seeds) > 1 else ""
        rows.append(
            (system + heard, cell(total.overall.wra_percent), cell(total.speaker_mean_wra_percent),
             f"{total.overall.takes}{seeds}", _effective(results, system), *cells)
        )  # fmt: skip
    pretrained = any(study.config_of(name).model.pretrained for name in study.attempts)
    unknown = "; whom a pretrained encoder heard before is not on record" if pretrained else ""
    caption = (
        "WRA in per cent with 95 % bootstrap intervals: over takes, in 'mean of speakers' over speakers and takes. "
        "Takes x seeds. Teachers: effective number behind the targets, (sum w)^2 / sum w^2, mean over recordings. "
        f"{'Any text can come out' if decode == 'open' else f'The best of {len(words)} words'}. "
        f"Speakers unseen, but where a row says otherwise{unknown}; words {words_heard}. Normaliser {normaliser}. "
        "Teachers are never those of the held-out speakers; the best one is chosen after the fact, for each speaker."
    )
    return Table(f"Attempts and baselines ({decode})", columns, tuple(rows), caption)


def _effective(results: Sequence[Result], system: str) -> str:
    numbers = [r.effective_teachers for r in results if r.system == system and r.effective_teachers is not None]
    return f"{fmean(numbers):.1f}" if numbers else NOT_DONE


def _teachers(results: Sequence[Result], scores: dict[str, Scores]) -> Table | None:
    """What every teacher is worth on its own speaker, and on the others."""
    names = [name for name in teachers_of(results) if name in scores]
    own = {n: [r.own_percent for r in results if r.system == n and r.own_percent is not None] for n in names}
    rows = [
        (name, f"{fmean(own[name]):.1f}" if own[name] else NOT_DONE, cell(scores[name].overall.wra_percent),
         str(scores[name].overall.takes))
        for name in names
    ]  # fmt: skip
    if not rows:
        return None
    mine = [fmean(values) for values in own.values() if values]
    if MEAN_TEACHER in scores:
        others = cell(scores[MEAN_TEACHER].overall.wra_percent)
        rows.append((MEAN_TEACHER, f"{fmean(mine):.1f}" if mine else NOT_DONE, others, ""))
    caption = (
        "WRA in per cent. Own speaker: on the few takes kept from its training, which chose its checkpoint, so it is "
        "kind. Other speakers: on the folds' held-out speakers, with intervals over takes."
    )
    return Table(
        "Teachers (open)", ("teacher", "own speaker", "other speakers", "takes of others"), tuple(rows), caption
    )


def gains_by_band(study: Study, results: Sequence[Result], words: Sequence[str]) -> Table | None:
    """The differences that the hypotheses are about, for each intelligibility band apart."""
    found = by_band(study, results, words)
    bands = [band for band in BANDS if any(band in of for of in found.values())]
    if not bands:
        return None
    rows = []
    for name, of in found.items():
        for other in study.hypotheses[name].others:
            pairs = {band: compared for band in of for system, compared in of[band] if system == other}
            cells = (f"{c.difference_points} (p {_p(c.p_value)})" if (c := pairs.get(b)) else NOT_DONE for b in bands)
            rows.append((name, f"{study.hypotheses[name].attempt} - {other}", *cells))
    caption = (
        "Points of WRA with 95 % intervals over the band's takes, decoded as the hypothesis says; p: paired "
        "permutation test, two sided, uncorrected."
    )
    return Table("Hypotheses by intelligibility band", ("hypothesis", "a - b", *bands), tuple(rows), caption)


def _bands(scores: dict[str, Scores], decode: DecodeName) -> Table | None:
    bands = [b for b in BANDS if any(b in s.by_band for s in scores.values())]
    if not bands:
        return None
    rows = [
        (system, *(cell(s.by_band[b].wra_percent) if b in s.by_band else NOT_DONE for b in bands))
        for system, s in scores.items()
    ]
    return Table(f"By intelligibility band ({decode})", ("system", *bands), tuple(rows))


def gap_pairs(study: Study) -> list[tuple[str, str]]:
    """Attempts that differ only in whether the held-out speakers train too: (included, held out)."""

    def rest(name: str) -> tuple[object, ...]:
        attempt, config = study.attempts[name], study.config_of(name)
        same = config.model_copy(update={"fold": config.fold.model_copy(update={"include_held_out": False})})
        return same.model_dump(mode="json"), attempt.start, attempt.teachers, attempt.recordings

    heard = [name for name, attempt in study.attempts.items() if attempt.include_held_out]
    others = [name for name in study.attempts if name not in heard]
    return [(a, b) for a in heard for b in others if rest(a) == rest(b)]


def _gaps(
    study: Study, results: Sequence[Result], folds: Sequence[tuple[str, ...]], words: Sequence[str], decode: DecodeName
) -> Table | None:
    """What is lost when a speaker is not heard in training."""
    normaliser = study.base().tokenizer.normaliser
    rows = []
    for pair in gap_pairs(study):
        places = [*([r for r in results if r.held_out == fold] for fold in folds), results]
        compared = [compare_all(place, pair, decode, normaliser, words) for place in places]
        if compared[-1]:
            *cells, total = (str(c[0].comparison.difference_points) if c else NOT_DONE for c in compared)
            overall = compared[-1][0].comparison
            rows.append((f"{pair[0]} - {pair[1]}", total, _p(overall.p_value), str(overall.takes), *cells))
    if not rows:
        return None
    columns = ("included - held out", "all takes", "p", "takes", *("+".join(fold) for fold in folds))
    caption = (
        "Points of WRA that an attempt gains when it hears half of the held-out speaker's takes, on the other half, "
        "with 95 % intervals over takes; everything else is the same in both. p: paired permutation test, uncorrected."
    )
    return Table(f"Domain-shift gap ({decode})", columns, tuple(rows), caption)


def claims_table(study: Study, results: Sequence[Result], tables: Sequence[StudyTables]) -> Table | None:
    """Figures of three origins side by side, never mixed: hoped for, claimed by an imported file, computed here."""
    columns = (
        "system",
        "fold",
        "expected WRA %",
        "reported WRA %",
        *(f"recomputed WRA % ({t.decode})" for t in tables),
    )
    scores = [t.scores for t in tables]
    rows = [
        (name, "all", f"{attempt.expected:g}", NOT_DONE,
         *(cell(s[name].overall.wra_percent) if name in s else NOT_DONE for s in scores))
        for name, attempt in study.attempts.items()
        if attempt.expected is not None
    ]  # fmt: skip
    normaliser = study.base().tokenizer.normaliser
    for result in results:
        if result.reported is None:
            continue
        own = [scores_of(result.of(t.decode), t.decode, normaliser, ()) if result.of(t.decode) else None
               for t in tables]  # fmt: skip
        rows.append(
            (result.system, "+".join(result.held_out), NOT_DONE, f"{result.reported:.2f}",
             *(cell(s.overall.wra_percent) if s else NOT_DONE for s in own))
        )  # fmt: skip
    if not rows:
        return None
    caption = (
        "Expected: what the study file hoped for. Reported: what an imported file says of itself. Recomputed: from the "
        "outputs, here, by the rule of all other tables. No number is computed from an expected or reported one."
    )
    return Table("Expected, reported and recomputed", columns, tuple(rows), caption)


def _paired(comparisons: Sequence[Paired], decode: DecodeName) -> Table:
    rows = [
        (f"{c.a} - {c.b}", str(c.comparison.difference_points), _p(c.comparison.p_value), _p(c.p_corrected),
         str(c.comparison.takes))
        for c in comparisons
    ]  # fmt: skip
    caption = (
        "Differences in points of WRA with 95 % intervals over takes; p: paired permutation test on common takes, two "
        f"sided; corrected: Holm, for {len(comparisons)} comparisons."
    )
    return Table(
        f"Paired comparisons ({decode})", ("a - b", "points", "p", "p corrected", "takes"), tuple(rows), caption
    )


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def answers_table(answers: Sequence[Answer]) -> Table:
    """The verdicts."""
    rows = [(a.hypothesis, a.verdict, str(a.wra_percent or NOT_DONE), a.because) for a in answers]
    return Table("Hypotheses", ("hypothesis", "verdict", "WRA", "because"), tuple(rows))
