"""From results to an answer: every hypothesis supported, rejected or undecided, and what to do next."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np

from xded.corpus.manifest import BANDS
from xded.findings import Finding
from xded.scoring import Comparison, Estimate, Prediction, Scores, compare, is_right, score
from xded.study.outcome import Result
from xded.study.plan import EVALUATION, SUSPECT, DecodeName, Hypothesis, NextStep, Study, Verdict

Z = 1.96  # of a 95 % interval
TAIL = 0.025  # beyond either of its ends


@dataclass(frozen=True)
class Answer:
    """What became of a hypothesis.

    Attributes:
        verdict: `suspect` when the evaluation itself cannot be trusted.
        wra_percent: of the attempt, with `minus` the gap in points, or with `between` the share of the gap in per cent;
            with the interval that was judged (`judgeable`); none when it was not measured.
        takes, seeds: that it rests on.
        more_takes, more_seeds: how many more of either would decide it, were the value to stay as it is, in about half
            of all cases; none where that number is not known or no number would.
        because: one sentence.
    """

    hypothesis: str
    verdict: Verdict | Literal["suspect"]
    wra_percent: Estimate | None
    takes: int
    seeds: int
    more_takes: int | None
    more_seeds: int | None
    because: str


@dataclass(frozen=True)
class Paired:
    """Two systems on the same takes; `p_corrected` is Holm's (1979), for all pairs of the study and decode mode."""

    a: str
    b: str
    decode: DecodeName
    comparison: Comparison
    p_corrected: float


def pooled(results: Iterable[Result], system: str, decode: DecodeName) -> list[Prediction]:
    """A system's predictions of all folds."""
    return [p for result in results if result.system == system for p in result.of(decode)]


def scores_of(
    predictions: Sequence[Prediction],
    decode: DecodeName,
    normaliser: str,
    words: Sequence[str],
    *,
    resamples: int = 2000,
) -> Scores:
    """The scores of some rows; whom and which words training heard is said by the tables. `resamples` as in `score`."""
    conditions = {
        "speakers": "unknown",
        "words": "unknown",
        "word_list": "open" if decode == "open" else "closed",
        "decode": "as the config of each run says",
    }
    return score(predictions, normaliser=normaliser, word_list=words, conditions=conditions, resamples=resamples)


def on_common_takes(*systems: Sequence[Prediction]) -> list[list[Prediction]]:
    """Each without the takes that another lacks: who heard half of a speaker is tested on the other half."""
    common = set.intersection(*({p.take for p in predictions} for predictions in systems))
    return [[p for p in predictions if p.take in common] for predictions in systems]


def answer_all(
    study: Study, results: Sequence[Result], suspicions: Sequence[Finding], words: Sequence[str]
) -> list[Answer]:
    """Every hypothesis of a study.

    Args:
        results: of all folds; suspicions: findings that make the evaluation void; words: the listed words.
    """
    normaliser = study.base().tokenizer.normaliser
    own = [result for result in results if result.source == "attempt"]  # an imported row may have the same name
    answers = []
    for name, hypothesis in study.hypotheses.items():
        if suspicions:
            because = f"The evaluation is suspect: {suspicions[0].what}"
            answers.append(Answer(name, SUSPECT, None, 0, 0, None, None, because))
        else:
            answers.append(_answer(name, hypothesis, study, own, normaliser, words))
    return answers


def _answer(
    name: str, hypothesis: Hypothesis, study: Study, results: Sequence[Result], normaliser: str, words: Sequence[str]
) -> Answer:
    decode = hypothesis.decode
    attempts = (hypothesis.attempt, *hypothesis.others)
    said = [pooled(results, attempt, decode) for attempt in attempts]
    for attempt, found in zip(attempts, said, strict=True):
        if not found:
            return Answer(name, "undecided", None, 0, 0, None, None, f"Attempt '{attempt}' has no results.")
    said = on_common_takes(*said)
    if not said[0]:
        how_many = "two" if len(said) == 2 else "three"
        return Answer(name, "undecided", None, 0, 0, None, None, f"The {how_many} attempts share no test take.")
    scores = [scores_of(found, decode, normaliser, words) for found in said]
    takes, seeds = scores[0].overall.takes, len(scores[0].seeds)
    missing = _missing(hypothesis, study, results)
    if hypothesis.between is not None:
        value = share_percent(*scores)
        if value is None:
            low, high = hypothesis.between
            gap = compare(scores[2], scores[1]).difference_points
            because = f"'{high}' is {gap} points above '{low}': no gap that is sure, so nothing is a share of it."
            return Answer(name, "undecided", None, takes, seeds, None, None, because + missing)
    elif hypothesis.minus is not None:
        value = judgeable(compare(*scores).difference_points, takes, -100.0)
    else:
        value = judgeable(scores[0].overall.wra_percent, takes, 0.0)
    verdict = judged(value, hypothesis)
    more = needed(value, hypothesis, said, normaliser) if verdict == "undecided" else (None, None)
    because = _because(value, hypothesis, verdict, takes, seeds, more) + missing
    return Answer(name, verdict, value, takes, seeds, *more, because)


def share_percent(
    attempt: Scores, low: Scores, high: Scores, *, seed: int = 0, resamples: int = 2000
) -> Estimate | None:
    """Share of the gap between two systems that a third makes up, (attempt - low) / (high - low), in per cent.

    All three are resampled by the same takes, so that a take's difficulty cancels out (Efron & Tibshirani 1993, "An
    Introduction to the Bootstrap", chapter 10.5). A resample without a gap says nothing of the share: it counts as
    smaller than all others at the interval's lower end, and as larger at its upper end.

    Returns:
        None where one resample in 40 has no gap: the interval would have no end.
    """
    three = (attempt, low, high)
    rows = np.array([[s.takes[t].right for s in three] + [s.takes[t].predictions for s in three] for t in low.takes])
    drawn = np.random.default_rng(seed).multinomial(len(rows), np.full(len(rows), 1 / len(rows)), size=resamples) @ rows

    def parts(sums: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        wra = sums[..., :3] / sums[..., 3:]
        return wra[..., 0] - wra[..., 1], wra[..., 2] - wra[..., 1]

    won, gap = parts(drawn)
    void = gap <= 1e-9
    won_here, gap_here = parts(rows.sum(0))
    if len(rows) < 2 or void.mean() >= TAIL or gap_here <= 1e-9:
        return None
    shares = won / np.where(void, 1.0, gap)
    ends = [
        float(np.percentile(np.where(void, beyond, shares), place, method="inverted_cdf"))
        for beyond, place in ((-np.inf, 100 * TAIL), (np.inf, 100 * (1 - TAIL)))
    ]
    return Estimate(100 * float(won_here / gap_here), 100 * ends[0], 100 * ends[1])


def judgeable(value: Estimate, takes: int, least: float) -> Estimate:
    """An estimate whose interval says what could still come.

    When all takes say the same, a bootstrap interval has no width, however few they are. In its place comes the exact
    one (Clopper & Pearson 1934): of `takes` takes none was different, so up to 1 - 0.025^(1/takes) of all may be.

    Args:
        value: per cent, with its bootstrap interval over takes.
        least: lowest possible value: 0 for a WRA, -100 for a gap.
    """
    if value.low is None or value.high is None or value.high - value.low > 1e-9:
        return value
    different = 1.0 - TAIL ** (1.0 / takes)
    return Estimate(
        value.value,
        value.value - different * (value.value - least),
        value.value + different * (100.0 - value.value),
    )


def judged(value: Estimate, hypothesis: Hypothesis) -> Verdict:
    """Supported or rejected when the whole interval lies on one side of the threshold."""
    low, high = (value.low, value.high) if value.low is not None else (-math.inf, math.inf)
    assert high is not None
    threshold = hypothesis.threshold
    if hypothesis.above is not None:
        return "supported" if low > threshold else "rejected" if high <= threshold else "undecided"
    return "supported" if high < threshold else "rejected" if low >= threshold else "undecided"


def needed(
    value: Estimate, hypothesis: Hypothesis, said: Sequence[Sequence[Prediction]], normaliser: str
) -> tuple[int | None, int | None]:
    """Takes and seeds that are missing for an interval that reaches just up to the threshold.

    The variance of the mean is (between takes + within takes / seeds) / takes, in points of WRA; more seeds shrink only
    the second part.

    Args:
        said: what the attempt said, then each of `hypothesis.others`, on common takes.
    """
    share = hypothesis.threshold / 100
    # a share is above s where attempt - (1 - s) low - s high is above 0
    weights = (1.0, share - 1.0, -share) if hypothesis.between is not None else (1.0, -1.0)[: len(said)]
    between, within, means, seeds = _variances(weights, said, normaliser)
    takes = len(means)
    distance = abs(float(np.mean(means)) if hypothesis.between is not None else value.value - hypothesis.threshold)
    if distance < 1e-9:
        return None, None
    if between + (within or 0.0) < 1e-9:  # all takes say the same: see `judgeable`
        least = -100.0 if hypothesis.others else 0.0
        room = 100.0 - value.value if hypothesis.threshold > value.value else value.value - least
        if distance >= room:
            return None, None
        return max(1, math.ceil(math.log(TAIL) / math.log(1.0 - distance / room)) - takes), None
    wanted = (distance / Z) ** 2
    more_takes = max(1, math.ceil((between + (within or 0.0) / seeds) / wanted) - takes)
    left = wanted * takes - between
    more_seeds = max(1, math.ceil(within / left) - seeds) if left > 0 and within else None
    return more_takes, more_seeds


def _variances(
    weights: Sequence[float], said: Sequence[Sequence[Prediction]], normaliser: str
) -> tuple[float, float | None, list[float], int]:
    """Of the weighted sum of several systems' WRA in points: variance between takes and within takes (over seeds; none
    with a single one), value of each take, number of seeds. A take's value with a seed is the mean over its recordings;
    seeds of two systems are independent.
    """
    means: dict[str, float] = defaultdict(float)
    withins: dict[str, list[float]] = defaultdict(list)
    seeds = 1
    for weight, predictions in zip(weights, said, strict=True):
        by_take: dict[str, dict[int, list[bool]]] = defaultdict(lambda: defaultdict(list))
        for p in predictions:
            by_take[p.take][p.seed].append(is_right(p, normaliser))
        for take, by_seed in by_take.items():
            values = 100.0 * weight * np.array([np.mean(right) for right in by_seed.values()])
            means[take] += float(values.mean())
            seeds = max(seeds, len(values))
            if len(values) > 1:
                withins[take].append(float(values.var(ddof=1)))
    spread = float(np.var(list(means.values()), ddof=1)) if len(means) > 1 else 0.0
    if not withins:
        return spread, None, list(means.values()), seeds
    within = float(np.mean([sum(found) for found in withins.values()]))
    return max(0.0, spread - within / seeds), within, list(means.values()), seeds


def _because(
    value: Estimate, hypothesis: Hypothesis, verdict: str, takes: int, seeds: int, more: tuple[int | None, int | None]
) -> str:
    what = f"WRA of '{hypothesis.attempt}'" + (f" minus '{hypothesis.minus}'" if hypothesis.minus else "")
    unit = "points" if hypothesis.minus else "%"
    if hypothesis.between is not None:
        low, high = hypothesis.between
        what, unit = f"Of the way from '{low}' to '{high}', what '{hypothesis.attempt}' makes", "%"
    side = "above" if hypothesis.above is not None else "below"
    text = (
        f"{what} is {value} {unit} ({_count(takes, 'take')}, {_count(seeds, 'seed')}, {hypothesis.decode}); "
        f"asked: {side} {hypothesis.threshold:g}."
    )
    if verdict != "undecided":
        return text
    more_takes, more_seeds = more
    if more_takes is None:
        return f"{text} The value lies on the threshold: no number of takes would decide it."
    text += f" About {_count(more_takes, 'more take')} would decide it"
    if more_seeds is not None:
        return f"{text}, or {_count(more_seeds, 'more seed')}."
    return f"{text}; {'one seed does not tell what more would do' if seeds == 1 else 'more seeds alone would not'}."


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _missing(hypothesis: Hypothesis, study: Study, results: Sequence[Result]) -> str:
    """Says when an answer rests on fewer runs than the study asks for."""
    folds = len({result.held_out for result in results}) if study.held_out == "all" else len(study.held_out)
    asked = folds * len(study.seeds)
    said = []
    for attempt in (hypothesis.attempt, *hypothesis.others):
        there = sum(len(result.runs) for result in results if result.system == attempt)
        if there < asked:
            said.append(f" Only {there} of {asked} runs of '{attempt}' are done.")
    return "".join(said)


def compare_all(
    results: Sequence[Result], systems: Sequence[str], decode: DecodeName, normaliser: str, words: Sequence[str]
) -> list[Paired]:
    """Paired permutation tests of every two systems on their common takes, corrected by Holm's method."""
    found = []
    for a, b in combinations(systems, 2):
        left, right = on_common_takes(pooled(results, a, decode), pooled(results, b, decode))
        if left and right:
            # `compare` resamples by itself
            pair = [scores_of(side, decode, normaliser, words, resamples=0) for side in (left, right)]
            found.append((a, b, compare(*pair)))
    corrected = holm([comparison.p_value for _, _, comparison in found])
    return [Paired(a, b, decode, c, p) for (a, b, c), p in zip(found, corrected, strict=True)]


def by_band(
    study: Study, results: Sequence[Result], words: Sequence[str]
) -> dict[str, dict[str, list[tuple[str, Comparison]]]]:
    """Every hypothesis that holds attempts against each other: hypothesis -> band -> the other attempt, and the paired
    comparison with it on the band's takes. The p-values are not corrected.
    """
    normaliser, own = study.base().tokenizer.normaliser, [r for r in results if r.source == "attempt"]
    found: dict[str, dict[str, list[tuple[str, Comparison]]]] = {}
    for name, hypothesis in study.hypotheses.items():
        for other in hypothesis.others:
            for band in BANDS:
                pair = [
                    [p for p in pooled(own, system, hypothesis.decode) if p.band == band]
                    for system in (hypothesis.attempt, other)
                ]
                a, b = on_common_takes(*pair)
                if a and b:
                    scores = [scores_of(s, hypothesis.decode, normaliser, words, resamples=0) for s in (a, b)]
                    found.setdefault(name, {}).setdefault(band, []).append((other, compare(*scores)))
    return found


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction (Scandinavian Journal of Statistics 6, 1979) in the order given."""
    order = np.argsort(p_values, kind="stable")
    corrected = np.empty(len(p_values))
    highest = 0.0
    for place, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - place) * p_values[index]))
        corrected[index] = highest
    return corrected.tolist()


def next_step(study: Study, answers: Sequence[Answer]) -> NextStep | None:
    """The first row of the decision table of which every verdict holds."""
    verdicts: Mapping[str, str] = {a.hypothesis: a.verdict for a in answers}
    suspect = any(a.verdict == SUSPECT for a in answers)
    for row in study.next:
        wanted = dict(row.when)
        if wanted.pop(EVALUATION, None) == SUSPECT and not suspect:
            continue
        if all(verdicts.get(name) == verdict for name, verdict in wanted.items()):
            return row
    return None
