"""Verdicts: intervals against thresholds, how much more would decide, Holm's correction, suspicion before all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest

from xded.findings import Finding
from xded.scoring import Estimate, Prediction
from xded.study.outcome import SNAPPED, Result, derived, snapped
from xded.study.plan import Hypothesis, Study, build
from xded.study.verdict import (
    Answer,
    answer_all,
    by_band,
    compare_all,
    holm,
    judgeable,
    judged,
    needed,
    next_step,
)

WORDS = ("yes", "no")
OPEN = "open"


def predictions(
    right: Sequence[float], *, seeds: int = 1, mics: int = 1, speaker: str = "t1", first: int = 0, prefix: str = ""
) -> list[Prediction]:
    """A take for each value: the share of seeds that recognise it (on all microphones)."""
    rows = []
    for place, share in enumerate(right, start=first):
        for seed in range(seeds):
            said = "yes" if seed < round(share * seeds) else "no"
            for mic in range(mics):
                name = f"{prefix}{speaker}_{place}"
                rows.append(
                    Prediction(f"{name}_{mic}", name, speaker, "low", None, "yes", "yes", said, (3,), seed)
                )  # fmt: skip
    return rows


def study_of(hypotheses: dict[str, Any], **more: Any) -> Study:
    attempts = {"a": {"include_held_out": True}, "b": {}}
    data = {"name": "s", "held_out": ["t1"], "seeds": [0], "attempts": attempts, "hypotheses": hypotheses}
    return build({**data, **more}, "x")


def result(system: str, rows: Sequence[Prediction], source: Any = "attempt", held_out: str = "t1") -> Result:
    return Result(system, source, (held_out,), {OPEN: rows}, tuple(Path(system) for _ in {p.seed for p in rows}))


def answer(hypothesis: dict[str, Any], *results: Result, **more: Any) -> Answer:
    (found,) = answer_all(study_of({"h": hypothesis}, **more), results, [], WORDS)
    return found


@pytest.mark.parametrize(
    ("bounds", "threshold", "verdict"),
    [
        ((61, 90), {"above": 60}, "supported"),
        ((60, 90), {"above": 60}, "undecided"),
        ((59, 61), {"above": 60}, "undecided"),
        ((10, 60), {"above": 60}, "rejected"),
        ((0, 9.9), {"below": 10}, "supported"),
        ((0, 10), {"below": 10}, "undecided"),
        ((10, 30), {"below": 10}, "rejected"),
        ((None, None), {"above": 60}, "undecided"),
    ],
)
def test_an_interval_that_crosses_the_threshold_is_undecided(bounds: Any, threshold: Any, verdict: str) -> None:
    assert judged(Estimate(50.0, *bounds), Hypothesis(attempt="a", **threshold)) == verdict


def test_the_answer_says_what_it_rests_on() -> None:
    found = answer({"attempt": "a", "above": 60}, result("a", predictions([1] * 38 + [0] * 2, seeds=2)))
    assert (found.verdict, found.takes, found.seeds) == ("supported", 40, 2)
    assert found.wra_percent is not None
    assert found.because == (
        f"WRA of 'a' is {found.wra_percent} % (40 takes, 2 seeds, open); asked: above 60."
    )  # fmt: skip


def test_few_takes_that_all_say_the_same_decide_little() -> None:
    """A bootstrap interval of 0 of 6 takes has no width; the exact one reaches to 46 %."""
    found = answer({"attempt": "a", "below": 10}, result("a", predictions([0] * 6)))
    assert found.verdict == "undecided"
    exact = binomtest(0, 6).proportion_ci()
    assert found.wra_percent is not None
    assert found.wra_percent.high == pytest.approx(100 * exact.high, abs=0.01)
    assert found.wra_percent.low == 0
    assert found.more_takes == 30  # with 36 takes it reaches to 9.7 %
    assert "About 30 more takes would decide it; one seed does not tell" in found.because
    assert answer({"attempt": "a", "below": 10}, result("a", predictions([0] * 36))).verdict == "supported"
    assert answer({"attempt": "a", "below": 10}, result("a", predictions([0] * 35))).verdict == "undecided"
    assert answer({"attempt": "a", "above": 60}, result("a", predictions([0] * 6))).verdict == "rejected"
    assert judgeable(Estimate(100.0, 100.0, 100.0), 6, 0.0).low == pytest.approx(
        100 * binomtest(6, 6).proportion_ci().low
    )
    assert judgeable(Estimate(0.0, 0.0, 0.0), 6, -100.0) == Estimate(
        0.0, pytest.approx(-45.9, abs=0.1), pytest.approx(45.9, abs=0.1)
    )


@pytest.mark.parametrize(("takes", "right"), [(20, 14), (40, 26), (60, 33)])
def test_the_named_number_of_takes_makes_half_of_the_intervals_decide(takes: int, right: int) -> None:
    rows = predictions([1] * right + [0] * (takes - right))
    hypothesis = Hypothesis(attempt="a", above=50)
    value = Estimate(100 * right / takes, None, None)
    more, _ = needed(value, hypothesis, [rows], "upper")
    assert more is not None
    random = np.random.default_rng(0)
    decided = []
    for _ in range(2000):
        n, p = takes + more, right / takes
        hits = random.binomial(n, p)
        # what a percentile bootstrap over n takes gives
        low, high = np.percentile(random.binomial(n, hits / n, 400), [2.5, 97.5]) * 100 / n
        decided.append(judged(Estimate(100 * hits / n, low, high), hypothesis) != "undecided")
    assert 0.35 < np.mean(decided) < 0.65


def test_the_named_number_of_seeds_makes_half_of_the_intervals_decide() -> None:
    """Takes are all alike: what differs is the seed, and more of them help."""
    random = np.random.default_rng(1)
    takes, seeds, p = 30, 2, 0.6

    def draw(seeds: int) -> list[float]:
        return (random.binomial(seeds, p, takes) / seeds).tolist()

    named = []
    for _ in range(200):
        right = draw(seeds)
        value = 100 * float(np.mean(right))
        _, more = needed(
            Estimate(value, None, None),
            Hypothesis(attempt="a", above=50),
            [predictions(right, seeds=seeds)],
            "upper",
        )
        named.append(more)
    known = [more for more in named if more is not None]
    assert len(known) > 100
    wanted = round((1.96 / 0.1) ** 2 * p * (1 - p) / takes)  # seeds for which 1.96 standard errors are 10 points
    assert abs(seeds + np.median(known) - wanted) <= 2


def test_microphones_are_no_takes_and_no_seeds() -> None:
    hypothesis = Hypothesis(attempt="a", above=50)
    right = [1] * 26 + [0] * 14
    value = Estimate(65.0, None, None)
    one = needed(value, hypothesis, [predictions(right, seeds=2)], "upper")
    assert needed(value, hypothesis, [predictions(right, seeds=2, mics=7)], "upper") == one


def test_a_gap_counts_takes_that_both_were_tested_on() -> None:
    tested = predictions([1] * 20 + [0] * 4, seeds=2)
    other = predictions([1] * 6 + [0] * 18, seeds=2) + predictions([1] * 24, seeds=2, first=24)  # the other half
    found = answer({"attempt": "a", "minus": "b", "above": 5}, result("a", tested), result("b", other))
    assert found.wra_percent is not None
    assert found.wra_percent.value == pytest.approx(100 * 14 / 24)
    assert (found.verdict, found.takes) == ("supported", 24)
    apart = predictions([1] * 5, first=100)
    found = answer({"attempt": "a", "minus": "b", "above": 5}, result("a", tested), result("b", apart))
    assert (found.verdict, found.because) == ("undecided", "The two attempts share no test take.")


THREE = {"attempts": {"a": {}, "b": {}, "c": {}}}


def of_three(*right: Sequence[float], threshold: dict[str, float], seeds: int = 1) -> Answer:
    """a, between b and c."""
    rows = [result(name, predictions(shares, seeds=seeds)) for name, shares in zip("abc", right, strict=True)]
    return answer({"attempt": "a", "between": ["b", "c"], **threshold}, *rows, **THREE)


def test_a_share_of_a_gap_is_what_an_attempt_makes_up_of_it() -> None:
    low, mid, high = [1] * 20 + [0] * 80, [1] * 65 + [0] * 35, [1] * 80 + [0] * 20
    found = of_three(mid, low, high, threshold={"above": 0.5})
    assert found.wra_percent is not None
    assert found.wra_percent.value == pytest.approx(100 * 45 / 60)
    assert (found.verdict, found.takes) == ("supported", 100)
    assert found.because.startswith("Of the way from 'b' to 'c', what 'a' makes is 75.0 [")
    assert found.because.endswith("asked: above 50.")
    assert of_three(mid, low, high, threshold={"above": 0.9}).verdict == "rejected"
    assert of_three(mid, low, high, threshold={"below": 0.9}).verdict == "supported"
    undecided = of_three(mid, low, high, threshold={"above": 0.7})
    assert undecided.verdict == "undecided"
    assert undecided.more_takes is not None
    assert undecided.more_takes > 100


def test_the_interval_of_a_share_is_paired() -> None:
    """Takes that all three recognise, or none of them, tell nothing of the share."""
    random = np.random.default_rng(0)
    blocks = random.integers(0, 2, 60)
    low, mid, high = [], [], []
    for easy in blocks:
        low += [easy] * 4 + [0, 0, 0, 0]
        mid += [easy] * 4 + [1, 1, 1, 0]
        high += [easy] * 4 + [1, 1, 1, 1]
    found = of_three(mid, low, high, threshold={"above": 0.5}).wra_percent
    assert found is not None
    assert found.low is not None
    assert found.high is not None
    unpaired = 100 * np.sqrt(3 * 0.25 / 480) / 0.5  # of three independent WRA
    paired = 100 * np.sqrt(0.75 * 0.25 / 240)  # of one share of 240 takes
    assert found.high - found.low == pytest.approx(2 * 1.96 * paired, rel=0.15)
    assert found.high - found.low < 2 * 1.96 * unpaired


def test_without_a_sure_gap_there_is_no_share_of_it() -> None:
    same = [1] * 20 + [0] * 20
    found = of_three(same, same, [1] * 21 + [0] * 19, threshold={"above": 0.5})
    assert (found.verdict, found.wra_percent) == ("undecided", None)
    assert "'c' is 2.5 [" in found.because
    assert "no gap that is sure" in found.because
    assert of_three(same, [1] * 30 + [0] * 10, same, threshold={"above": 0.5}).wra_percent is None  # upside down
    missing = answer({"attempt": "a", "between": ["b", "c"], "above": 0.5}, result("a", predictions(same)), **THREE)
    assert missing.because == "Attempt 'b' has no results."


@pytest.mark.parametrize(("takes", "right"), [(40, (10, 26, 34))])
def test_the_named_number_of_takes_for_a_share_makes_half_of_the_intervals_decide(
    takes: int, right: tuple[int, int, int]
) -> None:
    low, mid, high = ([1] * count + [0] * (takes - count) for count in right)
    found = of_three(mid, low, high, threshold={"above": 0.5})
    assert (found.verdict, found.wra_percent and round(found.wra_percent.value)) == ("undecided", 67)
    assert found.more_takes is not None
    random, decided = np.random.default_rng(0), 0
    for _ in range(60):
        drawn = random.integers(0, takes, takes + found.more_takes)
        rows = [[of[place] for place in drawn] for of in (mid, low, high)]
        decided += of_three(*rows, threshold={"above": 0.5}).verdict != "undecided"
    assert 18 < decided < 42


def test_bands_are_compared_apart_and_paired() -> None:
    def banded(right: Sequence[float], band: str, prefix: str) -> list[Prediction]:
        return [replace(p, band=band) for p in predictions(right, prefix=prefix)]

    study = study_of({"h": {"attempt": "a", "minus": "b", "above": 0}, "alone": {"attempt": "a", "above": 5}})
    a = result("a", banded([1] * 6, "very_low", "v") + banded([1, 0] * 5, "high", "h"))
    b = result("b", banded([1] * 2 + [0] * 4, "very_low", "v") + banded([0, 1] * 5, "high", "h"))
    found = by_band(study, [a, b, result("b", predictions([0] * 6), "imported")], WORDS)
    assert list(found) == ["h"]
    values = {band: [(other, c.difference_points.value, c.takes) for other, c in of] for band, of in found["h"].items()}
    assert values == {"very_low": [("b", pytest.approx(100 * 4 / 6), 6)], "high": [("b", 0.0, 10)]}


def test_variance_of_a_gap_is_that_of_the_paired_differences() -> None:
    """Takes that are hard for both say nothing about the gap: far fewer are needed than for either WRA."""
    hard = [1] * 15 + [0] * 15
    a, b = predictions(hard), predictions([1] * 12 + [0] * 18)
    more, seeds = needed(Estimate(10.0, None, None), Hypothesis(attempt="a", minus="b", above=0), [a, b], "upper")
    differences = np.array([0] * 12 + [100] * 3 + [0] * 15)
    assert more == max(1, int(np.ceil(differences.var(ddof=1) / (10 / 1.96) ** 2)) - 30)
    assert seeds is None


def test_what_no_number_decides_is_said() -> None:
    on_it = answer({"attempt": "a", "above": 50}, result("a", predictions([1] * 10 + [0] * 10)))
    assert on_it.verdict == "undecided"
    assert on_it.because.endswith("The value lies on the threshold: no number of takes would decide it.")
    steady = answer({"attempt": "a", "above": 50}, result("a", predictions([1] * 12 + [0] * 8, seeds=3)))
    assert steady.more_seeds is None
    assert steady.because.endswith("; more seeds alone would not.")
    one = answer({"attempt": "a", "above": 50}, result("a", predictions([1] * 2)))
    assert one.verdict == "undecided"


def test_missing_results_are_said() -> None:
    none = answer({"attempt": "a", "above": 60}, result("b", predictions([1] * 4)))
    assert (none.verdict, none.because) == ("undecided", "Attempt 'a' has no results.")
    some = answer({"attempt": "a", "above": 60}, result("a", predictions([1] * 40)), seeds=[0, 1])
    assert some.because.endswith(" Only 1 of 2 runs of 'a' are done.")
    imported = result("a", predictions([1] * 40), "imported")
    assert answer({"attempt": "a", "above": 60}, imported).because == "Attempt 'a' has no results."


def test_suspicion_comes_before_every_verdict() -> None:
    hypotheses = {"h": {"attempt": "a", "above": 60}, "g": {"attempt": "a", "below": 10}}
    rows = [
        {"when": {"h": "supported"}, "do": "go on"},
        {"when": {"evaluation": "suspect"}, "do": "mend"},
        {"when": {"h": "supported", "g": "rejected"}, "do": "never reached"},
    ]
    study, results = study_of(hypotheses, next=rows), [result("a", predictions([1] * 40))]
    finding = Finding("token-offset", "refuse", "run", "Ids are one off.", "All is void.", "Mend it.")
    answers = answer_all(study, results, [finding], WORDS)
    assert [a.verdict for a in answers] == ["suspect", "suspect"]
    assert all("Ids are one off." in a.because and a.wra_percent is None for a in answers)
    step = next_step(study, answers)
    assert step is not None
    assert step.do == "mend"
    step = next_step(study, answer_all(study, results, [], WORDS))
    assert step is not None
    assert step.do == "go on"


def test_the_first_row_of_which_all_holds_is_the_advice() -> None:
    hypotheses = {"h": {"attempt": "a", "above": 60}, "g": {"attempt": "a", "below": 10}}
    rows = [
        {"when": {"h": "rejected", "g": "supported"}, "do": "both"},
        {"when": {"h": "rejected"}, "do": "one"},
        {"when": {"g": "rejected"}, "do": "other"},
    ]
    study = study_of(hypotheses, next=rows)

    def advice(right: list[float]) -> str | None:
        step = next_step(study, answer_all(study, [result("a", predictions(right))], [], WORDS))
        return None if step is None else step.do

    assert advice([0] * 40) == "both"
    assert advice([1] * 12 + [0] * 28) == "one"
    assert advice([1] * 40) == "other"
    assert advice([1] * 2 + [0] * 2) is None


def test_holm_against_the_textbook() -> None:
    """R: p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm")."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def test_comparisons_are_paired_and_corrected_for_their_number() -> None:
    a = predictions([1] * 14 + [0] * 26)
    b = predictions([1] * 24 + [0] * 16)
    results = [result("a", a), result("b", b), result("c", b), result("d", predictions([1], speaker="t9"))]
    found = {(c.a, c.b): c for c in compare_all(results, ["a", "b", "c", "d"], "open", "upper", WORDS)}
    assert set(found) == {("a", "b"), ("a", "c"), ("b", "c")}  # d shares no take
    one = found["a", "b"].comparison
    assert one.difference_points.value == pytest.approx(-25)
    assert one.p_value == pytest.approx(2 * 0.5**10, abs=0.002)  # 10 takes differ, all in one direction
    assert found["a", "b"].p_corrected == pytest.approx(3 * one.p_value)
    assert found["b", "c"].p_corrected == 1.0


def test_baselines_that_follow_from_the_others() -> None:
    one, two = predictions([1, 1, 0, 0]), predictions([1, 0, 1, 0])
    teachers = [
        Result(f"teacher t{n}", "baseline", ("t1",), {OPEN: rows, "word list": rows}, ())
        for n, rows in ((2, one), (3, two))
    ]
    parent = Result("parent", "baseline", ("t1",), {OPEN: [*one], "word list": []}, ())
    found = {r.system: r for r in derived([parent, *teachers], ("t1",), ["yes", "no"], "upper")}

    def right(system: str) -> int:
        return sum(p.hypothesis == p.reference for p in found[system].of(OPEN))

    assert right("any-teacher oracle") == 3
    assert right("best teacher") == 2
    assert right("vote of the teachers") == 2  # a tie goes to the first
    assert found[f"parent, {SNAPPED}"].of("word list")
    assert derived([parent], ("t1",), ["yes"], "upper")[0].system == f"parent, {SNAPPED}"


def test_snapping_takes_the_nearest_word_and_the_first_of_equals() -> None:
    said = ["yess", "nn", "", "yno"]
    rows = [Prediction(str(i), str(i), "t", None, None, "yes", "yes", text, ()) for i, text in enumerate(said)]
    assert [p.hypothesis for p in snapped(rows, ["yes", "no", "on"], "lower")] == ["yes", "no", "no", "no"]
