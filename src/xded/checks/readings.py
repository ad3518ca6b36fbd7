"""The ids of an evaluation read again: with every tokenizer given and with shifts, against the texts as stored.

Nothing is decided by a fixed gain. Two readings of the same ids are compared by a sign test over takes, and a reading
that is preferred must also be right more often than its outputs would be by chance: a recogniser that always says one
word is right whenever a shift turns that word into a frequent prompt.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np
from scipy.stats import binomtest

from xded.evaluations import Evaluation
from xded.scoring import CONDITIONS, Estimate, Summary, score
from xded.tokenizer import Tokenizer, normalise

SHIFTS: Final = (-2, -1, 0, 1, 2)  # every offset that special ids (blank, <unk>, <s>, </s>) have been seen to cause
# Of all comparisons made for one file together: with one tokenizer 7 takes must get right, and none wrong. A reading
# must also be beyond chance at this level; evaluations of 350 sound and 32 dead recognisers gave no false alarm.
ALPHA: Final = 0.05
# share of the stored texts that a reading must give back to be the one that wrote them: tools differ in what they do
# with special ids inside an output
WRITER: Final = 0.95
STORED: Final = "as stored"
UNSTATED: Final = {**dict.fromkeys(CONDITIONS, "unknown"), "word_list": "open"}


@dataclass(frozen=True)
class Reading:
    """The outputs of an evaluation as one tokenizer and shift read their ids (or as their texts are stored).

    Attributes:
        tokenizer: its name; `STORED` for the stored texts.
        shift: added to every id before it is decoded.
        reproduced: share of the stored texts (of outputs that have ids) that come out the same; none without texts.
    """

    evaluation: Evaluation
    tokenizer: str
    shift: int
    texts: tuple[str, ...]
    reproduced: float | None = None

    @cached_property
    def pairs(self) -> list[tuple[str, str]]:
        """Normalised reference and output, one for each recording."""
        known: dict[str, str] = {}
        for text in (*self.texts, *self.evaluation.references):
            if text not in known:
                known[text] = normalise(text, self.evaluation.normaliser)
        return [(known[i.reference], known[t]) for i, t in zip(self.evaluation.items, self.texts, strict=True)]

    @cached_property
    def right(self) -> np.ndarray:
        """Whole output equals reference, [N]."""
        return np.array([reference == text for reference, text in self.pairs])

    @cached_property
    def first_right(self) -> np.ndarray:
        """First word of the output equals the reference: the study's rule, [N]."""
        return np.array([text.split()[:1] == [reference] for reference, text in self.pairs])

    @property
    def wra(self) -> float:
        """Per cent of the outputs."""
        return 100 * float(self.right.mean())

    @property
    def first_word(self) -> float:
        """Per cent of the outputs."""
        return 100 * float(self.first_right.mean())

    @cached_property
    def listed(self) -> dict[tuple[int, ...], bool]:
        """For each distinct sequence of ids whether it is read as a word that some take has."""
        words = {reference for reference, _ in self.pairs}
        return {
            item.tokens: text in words
            for item, (_, text) in zip(self.evaluation.items, self.pairs, strict=True)
            if item.tokens
        }

    @property
    def listed_share(self) -> float:
        """Share of distinct outputs that are words of the list."""
        return float(np.mean(list(self.listed.values()))) if self.listed else 0.0

    @cached_property
    def chance(self) -> float:
        """p-value of being right as often as this if outputs had nothing to do with what was said, over takes."""
        references, outputs = (Counter(column) for column in zip(*self.pairs, strict=True))
        total = len(self.pairs)
        expected = sum(references[word] * outputs[word] for word in outputs.keys() & references.keys()) / total**2
        takes = self.evaluation.by_take(self.right)
        return float(binomtest(int(takes.sum() + 1e-9), len(takes), min(1.0, expected), "greater").pvalue)

    @cached_property
    def overall(self) -> Summary:
        """The scores of these texts, without intervals."""
        return self._score(resamples=0)

    def interval(self) -> Estimate:
        """WRA with its interval over takes."""
        return self._score(resamples=2000).wra_percent

    def _score(self, resamples: int) -> Summary:
        predictions, normaliser = self.evaluation.predictions(self.texts), self.evaluation.normaliser
        return score(predictions, normaliser=normaliser, conditions=UNSTATED, resamples=resamples).overall

    def row(self) -> dict[str, Any]:
        """What stands in the evidence."""
        return {
            "tokenizer": self.tokenizer,
            "shift": self.shift,
            "wra": round(self.wra, 2),
            "first_word": round(self.first_word, 2),
            "listed": round(100 * self.listed_share, 1),
            "texts_reproduced": None if self.reproduced is None else round(100 * self.reproduced, 1),
        }


def read_with(evaluation: Evaluation, tokenizers: Mapping[str, Tokenizer]) -> list[Reading]:
    """Decodes the stored ids with every tokenizer (once for each set of pieces) and every shift."""
    if not evaluation.has_tokens:
        return []
    distinct: dict[tuple[str, ...], str] = {}
    for name, tokenizer in tokenizers.items():
        distinct.setdefault(tokenizer.pieces, name)
    return [_read(evaluation, name, tokenizers[name], shift) for name in distinct.values() for shift in SHIFTS]


def _read(evaluation: Evaluation, name: str, tokenizer: Tokenizer, shift: int) -> Reading:
    special = (tokenizer.unk, tokenizer.blank, tokenizer.bos, tokenizer.eos)
    known: dict[tuple[int, ...], str] = {(): ""}
    for item in evaluation.items:
        ids = item.tokens or ()
        if ids not in known:
            moved = (i + shift for i in ids if i not in special)
            known[ids] = tokenizer.decode(i for i in moved if 0 <= i < tokenizer.size)
    texts = tuple(known[item.tokens or ()] for item in evaluation.items)
    reproduced = None
    if evaluation.texts is not None:
        normal = {text: normalise(text, "upper") for text in {*evaluation.texts, *texts}}
        same = [
            normal[text] == normal[stored]
            for text, stored, item in zip(texts, evaluation.texts, evaluation.items, strict=True)
            if item.tokens
        ]
        reproduced = float(np.mean(same))
    return Reading(evaluation, name, shift, texts, reproduced)


def as_stored(evaluation: Evaluation) -> Reading | None:
    """The stored texts; none where the file holds ids only."""
    return None if evaluation.texts is None else Reading(evaluation, STORED, 0, evaluation.texts, 1.0)


def writer(readings: Sequence[Reading]) -> Reading | None:
    """The reading that wrote the stored texts; of several the one without a shift."""
    found = [r for r in readings if (r.reproduced or 0.0) >= WRITER]
    return min(found, key=lambda r: (abs(r.shift), -(r.reproduced or 0.0)), default=None)


def preferred(readings: Sequence[Reading]) -> Reading | None:
    """The reading to believe: the one that is significantly right, else the writer's tokenizer without a shift.

    Where none of them wrote the stored texts, these are to be believed; none only without readings.
    """
    if not readings:
        return None
    significant = better(readings, baseline_of(readings))
    if significant is not None:
        return significant
    wrote = writer(readings)
    stored = as_stored(readings[0].evaluation)
    if wrote is None and stored is not None:
        return stored
    unshifted = [r for r in readings if r.shift == 0 and (wrote is None or r.tokenizer == wrote.tokenizer)]
    return max(unshifted, key=lambda r: (r.wra, r.listed_share))


def baseline_of(readings: Sequence[Reading]) -> Reading:
    """What the file says its outputs are: the stored texts, or without them the ids as they are."""
    return as_stored(readings[0].evaluation) or next(r for r in readings if r.shift == 0)


def better(readings: Sequence[Reading], baseline: Reading) -> Reading | None:
    """The reading with the highest WRA, when takes say that it is better than the baseline and than chance."""
    wrote = writer(readings)
    if wrote is not None and wrote.shift != 0:  # the shift is proven by the texts: one comparison is left
        candidates = [r for r in readings if r.tokenizer == wrote.tokenizer and r.shift == 0]
    else:
        # one thing went wrong: the shift or the tokenizer
        other = [r for r in readings if wrote is None or r.tokenizer == wrote.tokenizer or r.shift == 0]
        candidates = [r for r in other if r.texts != baseline.texts]
    best = max(candidates, key=lambda r: r.wra, default=None)
    if best is None:
        return None
    alpha = ALPHA / len(candidates)
    p_value = best.evaluation.gain(baseline.right, best.right)[2]
    return best if p_value < alpha and best.chance < alpha else None
