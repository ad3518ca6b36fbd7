"""Predictions in, one `Scores` object out: what was recognised, how sure that is, and under which conditions.

Everything is counted per take, because microphone copies and seeds of one spoken realisation are not independent: a
study with 7 microphones that counts recordings reports standard errors 2.4 times too small. Intervals are 95 %
percentile bootstrap intervals (Efron & Tibshirani 1993, chapter 13) that resample whole takes; a group in which every
take is right (or wrong) gets an interval of no width, which says that no error was seen, not that none is possible.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import jiwer
import numpy as np
from pydantic import ConfigDict, TypeAdapter, ValidationError

from xded.corpus.manifest import BANDS
from xded.errors import ScoringError
from xded.tokenizer import normalise

NO_VALUE = "none"  # name of the group of predictions that have no band or word type
MOST_CONFUSIONS = 20
# What every score must say about itself; `decode` is free text such as "ctc greedy" or "decoder beam 8".
CONDITIONS: Final[Mapping[str, tuple[str, ...]]] = {
    "speakers": ("seen", "unseen", "mixed", "unknown"),
    "words": ("seen", "unseen", "mixed", "unknown"),
    "word_list": ("open", "closed"),
    "decode": (),
}


@dataclass(frozen=True)
class Prediction:
    """One line of predictions.jsonl: what one recording was heard as by the model of one seed."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    recording: str
    take: str
    speaker: str
    band: str | None
    word_type: str | None
    prompt: str
    reference: str
    hypothesis: str
    tokens: tuple[int, ...]
    seed: int = 0


@dataclass(frozen=True)
class Estimate:
    """A number and its 95 % interval; `low` and `high` are none where a single take (or speaker) gives no interval."""

    value: float
    low: float | None
    high: float | None

    def __str__(self) -> str:
        return f"{self.value:.1f}" + ("" if self.low is None else f" [{self.low:.1f}, {self.high:.1f}]")


@dataclass(frozen=True)
class Confusion:
    """A wrong output: the reference, what was written instead, in how many predictions and takes."""

    reference: str
    hypothesis: str
    predictions: int
    takes: int


@dataclass(frozen=True)
class Summary:
    """All numbers of one group of predictions. Intervals resample takes; the group's speakers are taken as given.

    Attributes:
        wra_percent: word recognition accuracy: the whole hypothesis equals the reference after normalisation.
        wer_percent: word errors over words of the references; above 100 when outputs are long.
        cer_percent: character errors over characters of the references.
        empty_percent: outputs without any text.
        listed_percent: outputs that are, as a whole, a word of the list; none without a list.
        distinct_outputs: number of different outputs; a model that always says the same has 1.
        confusions: the most frequent wrong outputs, at most `MOST_CONFUSIONS`.
    """

    predictions: int
    recordings: int
    takes: int
    wra_percent: Estimate
    wer_percent: Estimate
    cer_percent: Estimate
    empty_percent: Estimate
    listed_percent: Estimate | None
    words_per_output: Estimate
    distinct_outputs: int
    confusions: tuple[Confusion, ...]


@dataclass(frozen=True)
class TakeScore:
    """Right predictions of one take, and how many there are (microphones times seeds)."""

    right: int
    predictions: int


@dataclass(frozen=True)
class Scores:
    """Everything that a score says; `scores.json` holds exactly this.

    `speaker_mean_wra_percent` is the mean of the speakers' WRA; its interval resamples speakers and, within each, takes
    (none with a single speaker). `takes` is what a paired comparison needs.
    """

    conditions: dict[str, str]
    seeds: tuple[int, ...]
    overall: Summary
    speaker_mean_wra_percent: Estimate
    by_speaker: dict[str, Summary]
    by_band: dict[str, Summary]
    by_word_type: dict[str, Summary]
    takes: dict[str, TakeScore]

    @property
    def statement(self) -> str:
        """The conditions in one line, to be printed wherever a number is."""
        c = self.conditions
        extra = "".join(f", {k} {v}" for k, v in c.items() if k not in (*CONDITIONS, "normaliser"))
        return (
            f"speakers {c['speakers']}, words {c['words']}, {c['word_list']} word list, decode {c['decode']}, "
            f"normaliser {c['normaliser']}, {self.overall.takes} takes, {self.overall.recordings} recordings, "
            f"{len(self.seeds)} seed{'s' if len(self.seeds) > 1 else ''}{extra}"
        )

    def to_json(self) -> str:
        """The text of scores.json."""
        return TypeAdapter(Scores).dump_json(self, indent=1).decode()

    @classmethod
    def from_json(cls, text: str, source: str = "scores.json") -> Scores:
        """Reads `to_json`.

        Raises:
            ScoringError: for anything else.
        """
        try:
            return TypeAdapter(Scores).validate_json(text)
        except ValidationError as error:
            raise ScoringError(
                f"{source} holds no scores: {_first(error)}.", "Score the predictions.jsonl beside it again."
            ) from error


@dataclass(frozen=True)
class Comparison:
    """Two scores of the same takes."""

    takes: int
    a_wra_percent: float
    b_wra_percent: float
    difference_points: Estimate  # WRA of a minus WRA of b, percentage points; interval over takes
    p_value: float  # two-sided; a and b exchanged within takes
    differing: tuple[str, ...]  # conditions in which the two differ, "name: value of a / value of b"


def write_predictions(path: Path, predictions: Iterable[Prediction]) -> None:
    """Writes predictions.jsonl; a run that is killed meanwhile leaves the old file."""
    adapter = TypeAdapter(Prediction)
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        file.writelines(adapter.dump_json(prediction) + b"\n" for prediction in predictions)
    part.replace(path)


def read_predictions(path: Path) -> list[Prediction]:
    """Reads predictions.jsonl.

    Raises:
        ScoringError: missing file, or naming the line and the field that is wrong.
    """
    adapter = TypeAdapter(Prediction)
    predictions: list[Prediction] = []
    try:
        with path.open("rb") as file:
            for line in file:
                predictions.append(adapter.validate_json(line))
    except OSError as error:
        raise ScoringError(f"{path} cannot be read ({error.strerror}).", "Make it with xded evaluate.") from error
    except ValidationError as error:
        raise ScoringError(
            f"{path}, line {len(predictions) + 1}: {_first(error)}.", "Mend the line, or evaluate again."
        ) from error
    return predictions


def _first(error: ValidationError) -> str:
    """The first problem that pydantic found, and where."""
    item = error.errors()[0]
    place = ".".join(str(part) for part in item["loc"])
    return (f"'{place}': " if place else "") + item["msg"][:200]


@dataclass(frozen=True)
class _Counts:
    """Per prediction, in the order given: [N] each unless said otherwise."""

    recording: np.ndarray  # number of the recording
    take: np.ndarray  # number of the take
    right: np.ndarray
    errors: np.ndarray  # [N, 4]: word errors, words, character errors, characters (of the reference)
    empty: np.ndarray
    listed: np.ndarray | None
    output_words: np.ndarray
    pairs: list[tuple[str, str]]  # normalised reference and hypothesis


def is_right(prediction: Prediction, normaliser: str) -> bool:
    """The rule of WRA: the whole hypothesis equals the reference after normalisation."""
    return normalise(prediction.hypothesis, normaliser) == normalise(prediction.reference, normaliser)


def score(
    predictions: Sequence[Prediction],
    *,
    normaliser: str,
    word_list: Iterable[str] | None = None,
    conditions: Mapping[str, str],
    seed: int = 0,
    resamples: int = 2000,
) -> Scores:
    """Computes every number once.

    Args:
        predictions: one per recording and seed.
        normaliser: of `tokenizer.normalise`, applied to references, hypotheses and the word list.
        word_list: the words that outputs are looked up in.
        conditions: at least the keys of `CONDITIONS`, with one of the values there; other keys are kept.
        seed: of the resampling.
        resamples: bootstrap replicates of each interval; 0 leaves the intervals out.

    Raises:
        ScoringError: no predictions, a recording twice with the same seed, a reference of which nothing is left after
            normalisation, one take with two speakers, or conditions that are missing.
    """
    _check(predictions, conditions)
    counts = _count(predictions, normaliser, word_list)

    def grouped(field: str) -> dict[str, Summary]:
        rows: dict[str, list[int]] = defaultdict(list)
        for i, prediction in enumerate(predictions):
            rows[getattr(prediction, field) or NO_VALUE].append(i)
        if set(rows) == {NO_VALUE}:
            return {}
        order = {band: str(i) for i, band in enumerate(BANDS)}
        names = sorted(rows, key=lambda name: order.get(name, name))
        return {name: _summarise(counts, np.array(rows[name]), seed, resamples) for name in names}

    takes = sorted({p.take for p in predictions})
    right, total = (np.bincount(counts.take, weights) for weights in (counts.right, np.ones(len(predictions))))
    return Scores(
        conditions={**conditions, "normaliser": normaliser},
        seeds=tuple(sorted({p.seed for p in predictions})),
        overall=_summarise(counts, np.arange(len(predictions)), seed, resamples),
        speaker_mean_wra_percent=_speaker_mean(predictions, counts, np.random.default_rng(seed), resamples),
        by_speaker=grouped("speaker"),
        by_band=grouped("band"),
        by_word_type=grouped("word_type"),
        takes={take: TakeScore(int(right[i]), int(total[i])) for i, take in enumerate(takes)},
    )


def _check(predictions: Sequence[Prediction], conditions: Mapping[str, str]) -> None:
    if not predictions:
        raise ScoringError("There are no predictions to score.", "Check that the fold holds test recordings.")
    for key, values in CONDITIONS.items():
        given = conditions.get(key)
        if not given or (values and given not in values):
            raise ScoringError(
                f"The condition '{key}' of the scores is {given!r}.",
                f"Give {'one of ' + ', '.join(values) if values else 'the decode mode'}: a number needs it.",
            )
    met: set[tuple[str, int]] = set()
    speakers: dict[str, str] = {}
    for p in predictions:
        if (p.recording, p.seed) in met:
            raise ScoringError(f"Recording '{p.recording}' has two predictions of seed {p.seed}.", "Keep one of them.")
        met.add((p.recording, p.seed))
        if speakers.setdefault(p.take, p.speaker) != p.speaker:
            raise ScoringError(
                f"Take '{p.take}' belongs to the speakers '{speakers[p.take]}' and '{p.speaker}'.",
                "Give every spoken realisation its own take id in the manifest.",
            )


def _count(predictions: Sequence[Prediction], normaliser: str, word_list: Iterable[str] | None) -> _Counts:
    """Normalises and aligns; texts and pairs that come again are looked up."""
    raw = {text for p in predictions for text in (p.reference, p.hypothesis)}
    texts = {text: normalise(text, normaliser) for text in raw}
    for p in predictions:
        if not texts[p.reference]:
            raise ScoringError(
                f"Recording '{p.recording}': nothing is left of its reference '{p.reference}' with '{normaliser}'.",
                "Mend the text in the manifest, or use another normaliser (tokenizer.normaliser).",
            )
    pairs = [(texts[p.reference], texts[p.hypothesis]) for p in predictions]
    distinct = {pair: i for i, pair in enumerate(dict.fromkeys(pairs))}
    words = None if word_list is None else {normalise(word, normaliser) for word in word_list} - {""}
    return _Counts(
        recording=np.unique([p.recording for p in predictions], return_inverse=True)[1],
        take=np.unique([p.take for p in predictions], return_inverse=True)[1],
        right=np.array([is_right(p, normaliser) for p in predictions]),
        errors=np.array(_errors(list(distinct)))[[distinct[pair] for pair in pairs]],
        empty=np.array([not hypothesis for _, hypothesis in pairs]),
        listed=None if words is None else np.array([hypothesis in words for _, hypothesis in pairs]),
        output_words=np.array([len(hypothesis.split()) for _, hypothesis in pairs]),
        pairs=pairs,
    )


def _errors(pairs: Sequence[tuple[str, str]]) -> list[tuple[int, int, int, int]]:
    """Word errors, reference words, character errors and reference characters of each pair, aligned by jiwer."""
    references, hypotheses = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    outputs = jiwer.process_words(references, hypotheses), jiwer.process_characters(references, hypotheses)
    columns = []
    for output in outputs:
        columns.append([sum(_chunk_errors(chunk) for chunk in alignment) for alignment in output.alignments])
        columns.append([len(reference) for reference in output.references])
    return list(zip(*columns, strict=True))


def _chunk_errors(chunk: jiwer.AlignmentChunk) -> int:
    if chunk.type == "equal":
        return 0
    return max(chunk.ref_end_idx - chunk.ref_start_idx, chunk.hyp_end_idx - chunk.hyp_start_idx)


def _replicates(rows: np.ndarray, generator: np.random.Generator, resamples: int) -> np.ndarray:
    """Sums over resampled takes.

    Takes with equal rows are drawn together: how often each distinct row comes up among G draws is multinomial, which
    is the same bootstrap as drawing G takes and hundreds of times faster.

    Args:
        rows: one row of counts for each take, [G, C].
        generator: source of the draws.
        resamples: R.

    Returns:
        [R, C].
    """
    distinct, times = np.unique(rows, axis=0, return_counts=True)
    return generator.multinomial(len(rows), times / len(rows), size=resamples) @ distinct


def _by_take(take: np.ndarray, *columns: np.ndarray) -> np.ndarray:
    """Sums [N] columns over predictions of the same take: [G, C]."""
    _, group = np.unique(take, return_inverse=True)
    return np.stack([np.bincount(group, column) for column in columns], axis=1)


def _interval(value: float, replicates: np.ndarray, units: int) -> Estimate:
    """An estimate with its percentile interval, or without one (`resamples` 0, or fewer than two takes or speakers)."""
    if units < 2 or len(replicates) == 0:
        return Estimate(value, None, None)
    low, high = np.percentile(replicates, [2.5, 97.5])
    return Estimate(value, float(low), float(high))


def _summarise(counts: _Counts, rows: np.ndarray, seed: int, resamples: int) -> Summary:
    """Scores of the predictions `rows` (numbers of predictions); equal groups get equal intervals."""
    take, ones = counts.take[rows], np.ones(len(rows))
    word_errors, words, character_errors, characters = counts.errors[rows].T

    def ratio(above: np.ndarray, below: np.ndarray, scale: float = 100.0) -> Estimate:
        sums = _by_take(take, above, below)
        replicates = _replicates(sums, np.random.default_rng(seed), resamples)
        top, bottom = sums.sum(0)
        return _interval(float(scale * top / bottom), scale * replicates[:, 0] / replicates[:, 1], len(sums))

    return Summary(
        predictions=len(rows),
        recordings=len(np.unique(counts.recording[rows])),
        takes=len(np.unique(take)),
        wra_percent=ratio(counts.right[rows], ones),
        wer_percent=ratio(word_errors, words),
        cer_percent=ratio(character_errors, characters),
        empty_percent=ratio(counts.empty[rows], ones),
        listed_percent=None if counts.listed is None else ratio(counts.listed[rows], ones),
        words_per_output=ratio(counts.output_words[rows], ones, scale=1.0),
        distinct_outputs=len({counts.pairs[i][1] for i in rows}),
        confusions=_confusions(counts, rows),
    )


def _confusions(counts: _Counts, rows: np.ndarray) -> tuple[Confusion, ...]:
    wrong = rows[~counts.right[rows]]
    predictions = Counter(counts.pairs[i] for i in wrong)
    takes = Counter(pair for pair, _ in {(counts.pairs[i], counts.take[i]) for i in wrong})
    order = sorted(predictions, key=lambda pair: (-takes[pair], -predictions[pair], pair))
    return tuple(Confusion(pair[0], pair[1], predictions[pair], takes[pair]) for pair in order[:MOST_CONFUSIONS])


def _speaker_mean(
    predictions: Sequence[Prediction], counts: _Counts, generator: np.random.Generator, resamples: int
) -> Estimate:
    """Mean of the speakers' WRA, percent; speakers are resampled, and the takes of each drawn speaker."""
    names = np.array([p.speaker for p in predictions])
    values, pools = [], []
    for name in np.unique(names):
        of = names == name
        sums = _by_take(counts.take[of], counts.right[of], np.ones(of.sum()))
        values.append(sums[:, 0].sum() / sums[:, 1].sum())
        replicates = _replicates(sums, generator, resamples)
        pools.append(replicates[:, 0] / replicates[:, 1])
    # a speaker drawn twice brings two different resamples of the takes, hence the second index
    drawn = generator.integers(len(values), size=(resamples, len(values)))
    which = generator.integers(resamples, size=drawn.shape)
    return _interval(100 * float(np.mean(values)), 100 * np.array(pools)[drawn, which].mean(1), len(values))


def compare(a: Scores, b: Scores, *, seed: int = 0, resamples: int = 2000, permutations: int = 10_000) -> Comparison:
    """Compares two models on the same takes.

    The interval resamples takes with both models' outputs; the p-value exchanges the models within takes
    (paired permutation test; Good 2005, "Permutation, Parametric and Bootstrap Tests") and counts the observed one in.

    Raises:
        ScoringError: when the two do not hold the same takes, or normalise differently.
    """
    if a.takes.keys() != b.takes.keys():
        odd = sorted(a.takes.keys() ^ b.takes.keys())
        raise ScoringError(
            f"The two scores hold different takes: {len(odd)} are only in one of them, such as '{odd[0]}'.",
            "Evaluate both models on the same test recordings.",
        )
    if a.conditions["normaliser"] != b.conditions["normaliser"]:
        raise ScoringError(
            f"The two scores use the normalisers '{a.conditions['normaliser']}' and '{b.conditions['normaliser']}'.",
            "Score models that were trained with the same tokenizer.normaliser.",
        )
    rows = np.array([[s.takes[t].right for s in (a, b)] + [s.takes[t].predictions for s in (a, b)] for t in a.takes])
    generator = np.random.default_rng(seed)
    observed = float(_difference(rows.sum(0)))
    replicates = _difference(_replicates(rows, generator, resamples))

    distinct, times = np.unique(rows, axis=0, return_counts=True)
    exchanged = generator.binomial(times, 0.5, size=(permutations, len(times)))  # of each kind of take
    swapped = distinct[:, [1, 0, 3, 2]]
    chance = _difference((times - exchanged) @ distinct + exchanged @ swapped)
    as_far = int((np.abs(chance) >= abs(observed) - 1e-9).sum())  # 1e-9: equal but for rounding
    names = sorted(a.conditions.keys() | b.conditions.keys())
    pairs = [(name, *(s.conditions.get(name, "not given") for s in (a, b))) for name in names]
    return Comparison(
        takes=len(rows),
        a_wra_percent=a.overall.wra_percent.value,
        b_wra_percent=b.overall.wra_percent.value,
        difference_points=_interval(observed, replicates, len(rows)),
        p_value=(1 + as_far) / (1 + permutations),
        differing=tuple(f"{key}: {of_a} / {of_b}" for key, of_a, of_b in pairs if of_a != of_b),
    )


def _difference(sums: np.ndarray) -> np.ndarray:
    """WRA of a minus WRA of b, points, from sums of (right a, right b, predictions a, predictions b): [..., 4]."""
    return 100 * (sums[..., 0] / sums[..., 2] - sums[..., 1] / sums[..., 3])
