"""Token ids and texts: are ids decoded without a shift and with the right tokenizer, can every prompt be written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from scipy.stats import binomtest

from xded.checks.readings import ALPHA, SHIFTS, Reading, as_stored, baseline_of, better, writer
from xded.errors import TokenizerError
from xded.evaluations import Evaluation
from xded.findings import Finding, Severity
from xded.tokenizer import NORMALISERS, Tokenizer, normalise

LISTED_SHARE: Final = 0.25  # of distinct outputs that are words of the list, for a reading without WRA to be believed
NOTABLE_POINTS: Final = 1.0  # WRA; below it a fault "changes nothing here"
GRAVE_POINTS: Final = 10.0  # WRA
AT_THE_CAP: Final = 0.25  # share of outputs of the greatest length from which a limit of the decoding is visible
NO_PUNCTUATION: Final = "_no_punctuation"  # of the names of normalisers
ROUNDING: Final = 0.01  # WRA, points
VARIED: Final = 0.5  # distinct outputs for each distinct beginning of a prompt, for outputs that were cut off
SPECIAL_SHARE: Final = 0.01  # of outputs with special ids; single ones come from untrained heads


def token_offset(evaluation: Evaluation, readings: Sequence[Reading]) -> list[Finding]:
    """Ids that are decoded with a shift, or that were trained with one.

    Args:
        evaluation: holds ids.
        readings: of `read_with`.
    """
    if not readings:
        return []
    baseline, wrote = baseline_of(readings), writer(readings)
    found = better(readings, baseline)
    if found is not None and wrote is not None and found.tokenizer != wrote.tokenizer:
        return []  # another tokenizer: `tokenizer_mismatch`
    if found is not None and not (found.shift == 0 and (wrote is None or wrote.shift == 0)):
        return [_offset(found, baseline, wrote, readings, "refuse")]
    if wrote is not None and wrote.shift != 0:
        right = next(r for r in readings if r.tokenizer == wrote.tokenizer and r.shift == 0)
        notable = right.wra - baseline.wra >= NOTABLE_POINTS
        return [_offset(right, baseline, wrote, readings, "warn" if notable else "note")]
    unshifted = next(r for r in readings if r.shift == 0 and (wrote is None or r.tokenizer == wrote.tokenizer))
    readable = max(readings, key=lambda r: r.listed_share)
    if readable.shift != 0 and _reads_better(unshifted, readable, len(readings) - 1):
        return [_offset(readable, baseline, wrote, readings, "warn")]
    return []


def _reads_better(before: Reading, after: Reading, comparisons: int) -> bool:
    """Whether distinct outputs become words of the list, each output counted once: a collapsed recogniser has few."""
    gained = sum(after.listed[ids] and not listed for ids, listed in before.listed.items())
    lost = sum(listed and not after.listed[ids] for ids, listed in before.listed.items())
    if after.listed_share < LISTED_SHARE or gained <= lost:
        return False
    return float(binomtest(gained, gained + lost, alternative="greater").pvalue) < ALPHA / comparisons


def _offset(
    right: Reading, baseline: Reading, wrote: Reading | None, readings: Sequence[Reading], severity: Severity
) -> Finding:
    evaluation, points = right.evaluation, right.wra - baseline.wra
    reported = evaluation.reported_wra
    now = f"WRA is {baseline.wra:.2f} % as stored" + ("" if reported is None else f" ({reported:.2f} % reported)")
    takes = len(evaluation.takes)
    interval = "" if severity == "note" else f"{right.interval()} over {takes} takes; "
    then = f"{right.wra:.2f} % ({interval}{right.first_word:.2f} % by the first word of each output)"
    listed = f"{100 * right.listed_share:.0f} % of the distinct outputs are words of the list"
    if wrote is not None and wrote.shift != 0:
        what = (
            f"Token ids were turned into text with a shift of {wrote.shift:+d}, which gives back "
            f"{100 * (wrote.reproduced or 0):.0f} % of the stored texts. {now} and {then} without the shift: {listed}."
        )
        remedy = "Decode the stored ids again without a shift (vocab_offset 0): nothing has to be trained again."
    else:
        what = f"The ids mean the pieces {right.shift:+d} places on. {now} and {then} when read like that: {listed}."
        remedy = "The labels were shifted when they were made: encode them again without a shift and train again."
    if severity == "note":
        effect = f"it changes nothing here: WRA is {right.wra:.2f} % without it, so the cause is another one"
        if points <= -NOTABLE_POINTS:
            effect = "none on this result: its texts are right; its ids need the shift wherever they are read again"
    else:
        effect = f"the texts and every metric computed from them are wrong, by {points:.2f} points of WRA"
    return Finding(
        "token-offset", severity, str(evaluation.path), what, effect, remedy,
        {
            "reported_wra": reported, "stored_wra": round(baseline.wra, 2), "recomputed_wra": round(right.wra, 2),
            "recomputed_first_word": round(right.first_word, 2), "takes": takes,
            "stored_shift": None if wrote is None else wrote.shift, "right_shift": right.shift,
            "stated_offset": evaluation.stated_offset, "readings": [r.row() for r in readings],
        },
        points=max(0.0, points) if severity != "note" else 0.0,
    )  # fmt: skip


def offset_without_tokenizer(evaluation: Evaluation, *, explained: bool = False) -> list[Finding]:
    """An offset that the file itself reveals: its outputs of one token say which text each id was given.

    If texts are decoded from id - 1, the text of id t + 1 is what id t stands for. Outputs whose ids are known in this
    way are read again; the rest counts as wrong, so that the recomputed WRA is a lower bound.
    """
    if evaluation.texts is None or not evaluation.has_tokens:
        return []
    baseline = as_stored(evaluation)
    assert baseline is not None
    text_of: dict[int, str] = {}
    for item in evaluation.items:
        if item.tokens and len(item.tokens) == 1:
            text_of.setdefault(item.tokens[0], item.hypothesis or "")
    shifts = [shift for shift in SHIFTS if shift]
    read = []
    for shift in shifts:
        ids = [item.tokens[0] + shift if item.tokens and len(item.tokens) == 1 else None for item in evaluation.items]
        texts = tuple("" if i is None else text_of.get(i, "") for i in ids)
        read.append(Reading(evaluation, "the file itself", shift, texts))
    best = max(read, key=lambda r: r.wra)
    alpha = ALPHA / len(shifts)
    if evaluation.gain(baseline.right, best.right)[2] < alpha and best.chance < alpha:
        covered = sum(bool(text) for text in best.texts)
        return [
            Finding(
                "token-offset", "refuse", str(evaluation.path),
                f"The file's own outputs of one token show that ids were turned into text with a shift of "
                f"{-best.shift:+d}: of {covered} outputs that can be read again with what they reveal "
                f"{int(best.right.sum())} are right, so that WRA is at least {best.wra:.2f} % and not "
                f"{baseline.wra:.2f} %.",
                "the texts and every metric computed from them are wrong",
                "Decode the stored ids again without a shift (vocab_offset 0), and give the tokenizer to "
                "'xded doctor' to see the whole WRA.",
                {
                    "stored_wra": round(baseline.wra, 2), "recomputed_wra_at_least": round(best.wra, 2),
                    "stored_shift": -best.shift, "read_again": covered, "stated_offset": evaluation.stated_offset,
                    "reported_wra": evaluation.reported_wra,
                },
                points=best.wra - baseline.wra,
            )
        ]  # fmt: skip
    if not evaluation.stated_offset:
        return []
    suspicious = baseline.wra < NOTABLE_POINTS and not explained
    return [
        Finding(
            "token-offset", "warn" if suspicious else "note", str(evaluation.path),
            f"WRA is {baseline.wra:.2f} %, and the file says that {evaluation.stated_offset} was taken away from every "
            "token id before it was decoded; without its tokenizer it cannot be seen whether that was right.",
            "if the heads were trained on the tokenizer's own ids, every text is wrong",
            "Give the tokenizer's .model file to 'xded doctor' too.",
            {"stated_offset": evaluation.stated_offset},
        )
    ]  # fmt: skip


def tokenizer_mismatch(evaluation: Evaluation, readings: Sequence[Reading]) -> list[Finding]:
    """Texts that were written with another tokenizer than the one that the ids belong to."""
    if not readings or evaluation.texts is None:
        return []
    baseline, wrote = baseline_of(readings), writer(readings)
    found = better(readings, baseline)
    subject, evidence = str(evaluation.path), {"readings": [r.row() for r in readings]}
    if found is not None and (wrote is None or wrote.tokenizer != found.tokenizer) and found.shift == 0:
        by = "another tokenizer than those given" if wrote is None else wrote.tokenizer
        return [
            Finding(
                "tokenizer-mismatch", "refuse", subject,
                f"The texts were written with {by}; read with {found.tokenizer}, the same ids give WRA "
                f"{found.interval()} % and not {baseline.wra:.2f} %.",
                "the texts and every metric computed from them are wrong",
                "Evaluate again with the tokenizer in the model's checkpoint ('xded evaluate' always does).",
                {**evidence, "stored_wra": round(baseline.wra, 2), "recomputed_wra": round(found.wra, 2)},
                points=found.wra - baseline.wra,
            )
        ]  # fmt: skip
    if found is not None or wrote is not None:
        return []
    names = sorted({r.tokenizer for r in readings})
    best = max(readings, key=lambda r: r.reproduced or 0.0)
    return [
        Finding(
            "tokenizer-mismatch", "warn" if len(names) == 1 else "note", subject,
            f"{' and '.join(names)} cannot have written these texts: at most {100 * (best.reproduced or 0):.0f} % of "
            f"them come back from their ids, with any shift from {SHIFTS[0]} to {SHIFTS[-1]:+d}.",
            "the ids cannot be read again, so that an offset would not be seen",
            "Give the tokenizer of the model that was evaluated; its checkpoint holds it.",
            evidence,
        )
    ]  # fmt: skip


def tokenizers_differ(tokenizers: Mapping[str, Tokenizer]) -> list[Finding]:
    """Tokenizers that load in each other's place without an error: same size, other pieces (or another order)."""
    findings = []
    names = list(tokenizers)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            a, b = tokenizers[first].pieces, tokenizers[second].pieces
            moved = sum(x != y for x, y in zip(a, b, strict=False))
            if len(a) != len(b) or not moved:
                continue
            order = "the same pieces in another order" if set(a) == set(b) else f"{len(set(a) - set(b))} other pieces"
            findings.append(
                Finding(
                    "tokenizer-mismatch", "warn", second,
                    f"{second} has the {len(a)} ids of {first} but {order}: {moved} ids mean something else.",
                    "a model or a target of one loads with the other without any error and writes other words",
                    "Use the tokenizer in the model's checkpoint everywhere; the fingerprints must be equal.",
                    {"size": len(a), "ids_that_differ": moved, "other": first},
                )
            )  # fmt: skip
    return findings


def special_ids(evaluation: Evaluation, name: str, tokenizer: Tokenizer) -> list[Finding]:
    """Ids outside the vocabulary, and special ids that were left in outputs."""
    ids = Counter(i for item in evaluation.items for i in item.tokens or ())
    outside = {i: times for i, times in ids.items() if not 0 <= i < tokenizer.size}
    subject, total = str(evaluation.path), sum(ids.values())
    if outside:
        worst = max(outside, key=abs)
        return [
            Finding(
                "special-ids", "refuse", subject,
                f"{sum(outside.values())} of {total} ids are outside {name}, which has {tokenizer.size} pieces "
                f"(such as id {worst}).",
                "the model's heads are not this tokenizer's: no id can be trusted to mean its piece",
                "Give the tokenizer of the model that was evaluated; its checkpoint holds it.",
                {"outside": sum(outside.values()), "ids": total, "example": worst, "size": tokenizer.size},
            )
        ]  # fmt: skip
    special = {"<unk> or blank": {tokenizer.unk, tokenizer.blank}, "<s>": {tokenizer.bos}, "</s>": {tokenizer.eos}}
    having = {what: sum(not i.isdisjoint(o.tokens or ()) for o in evaluation.items) for what, i in special.items()}
    share = max(having.values()) / max(1, len(evaluation.items))
    if share < SPECIAL_SHARE:
        return []
    listed = ", ".join(f"{what} in {count}" for what, count in having.items() if count)
    return [
        Finding(
            "special-ids", "note", subject,
            f"Special ids stand inside outputs: {listed} of {len(evaluation.items)}.",
            "a decoder that goes on after </s>, or blanks that were not removed; what follows them is no output",
            "Cut outputs at the first </s> and remove blanks before they are stored.",
            having,
        )
    ]  # fmt: skip


def visible_cap(evaluation: Evaluation, tokenizer: Tokenizer) -> int | None:
    """The limit of the decoding (tokens) that an evaluation shows: many outputs just that long, and none longer.

    CTC has none: its outputs are short because little was learned. Predictions of ours without their scores do not say
    how they were decoded.
    """
    lengths = [len(item.tokens) for item in evaluation.items if item.tokens]
    unsaid = "ctc" if evaluation.source == "predictions" else ""
    if not lengths or evaluation.conditions.get("decode", unsaid).startswith("ctc"):
        return None
    longest = max(lengths)
    needed = max(len(tokenizer.encode(text)) for text in evaluation.references)
    return longest if longest < needed and lengths.count(longest) >= AT_THE_CAP * len(lengths) else None


def unreachable_prompts(
    references: Sequence[str], name: str, tokenizer: Tokenizer, subject: str,
    *, max_length: int | None = None, reading: Reading | None = None,
) -> list[Finding]:  # fmt: skip
    """Prompts that no output can equal: they need <unk>, or more tokens than the decoding allows.

    Args:
        references: one for each take.
        name: of the tokenizer.
        tokenizer: whose own normaliser is used where it can write most of the references, else the best one.
        subject: what has these references.
        max_length: greatest number of tokens of an output; none: not known.
        reading: outputs for these references; they show what the limits cost.
    """
    normaliser = _fitting(references, tokenizer)
    fitted = tokenizer.with_normaliser(normaliser)
    ids = {text: fitted.encode(text) for text in set(references)}
    unknown = set(fitted.unspellable(references))
    long = {text for text, of_text in ids.items() if max_length is not None and len(of_text) > max_length}
    lost = sum(text in unknown or text in long for text in references) / len(references)
    if not lost:
        return []
    ceiling = 100 * (1 - lost)
    cost = 100 * lost if reading is None else _cost(reading, ids, unknown, long, max_length or 0)
    severity: Severity = "refuse" if cost >= GRAVE_POINTS else "warn" if cost >= NOTABLE_POINTS else "note"
    parts, remedies = [], []
    if unknown:
        parts.append(f"{_some(unknown)} cannot be written with {name} ({normaliser})")
        remedies.append(remedy(references, tokenizer))
    if long:
        parts.append(f"{_some(long)} need more than {max_length} token{'' if max_length == 1 else 's'}")
        remedies.append("Decode with a --max-length of at least the longest prompt's tokens.")
    return [
        Finding(
            "unreachable-prompts", severity, subject,
            f"Of {len(ids)} prompts {'; '.join(parts)}: WRA cannot be above {ceiling:.1f} %.",
            "these takes are wrong whatever the model learns" + ("" if reading is None else f"; here that costs about "
            f"{cost:.1f} points"),
            " ".join(remedies),
            {
                "unwritable": len(unknown), "too_long": len(long), "prompts": len(ids), "cost": round(cost, 2),
                "max_length": max_length, "ceiling_percent": round(ceiling, 2), "normaliser": normaliser,
            },
            points=cost,
        )
    ]  # fmt: skip


@dataclass(frozen=True)
class Reach:
    """What a tokenizer can write behind one normaliser.

    Attributes:
        unspellable: prompts that no output can equal, and why.
        lost_takes: takes of these prompts; takes, prompts: of the corpus.
    """

    normaliser: str
    unspellable: Mapping[str, str]
    lost_takes: int
    takes: int
    prompts: int

    @property
    def best_wra(self) -> float:
        """The highest WRA that a recogniser with this tokenizer can reach: %."""
        return 100 * (1 - self.lost_takes / self.takes)


def reach(references: Sequence[str], tokenizer: Tokenizer, normaliser: str) -> Reach:
    """Which prompts can be written behind a normaliser; references: one for each take, at least one."""
    lost = tokenizer.with_normaliser(normaliser).unspellable(references)
    return Reach(normaliser, lost, sum(t in lost for t in references), len(references), len(set(references)))


def remedy(references: Sequence[str], tokenizer: Tokenizer) -> str:
    """What lets a recogniser write prompts that its tokenizer cannot."""
    others = tokenizer.normalisers_for(references)
    if others:
        return f"Use --set tokenizer.normaliser={others[0]}."
    return "Use a tokenizer that has these characters (xded trains one on the prompts)."


def _cost(
    reading: Reading, ids: Mapping[str, Sequence[int]], unknown: set[str], long: set[str], max_length: int
) -> float:
    """WRA, points: outputs that are right up to the limit, and what cannot be written, at the WRA of the rest.

    Short outputs alone prove nothing: a recogniser that has learned little writes short ones, and few.
    """
    items = reading.evaluation.items
    said = [tuple(i + reading.shift for i in item.tokens or ()) for item in items]
    starts = {text: tuple(ids[text][:max_length]) for text in long}
    varied = len(set(said)) >= VARIED * len(set(starts.values()))
    cut = [varied and starts.get(item.reference) == tokens for item, tokens in zip(items, said, strict=True)]
    unwritten = [item.reference in unknown for item in items]
    rest = [right for right, lost in zip(reading.right, unwritten, strict=True) if not lost]
    return 100 * float(np.mean(cut) + np.mean(unwritten) * (np.mean(rest) if rest else 1.0))


def _some(texts: set[str]) -> str:
    listed = ", ".join(sorted(texts)[:3])
    return f"{len(texts)} ({listed}{' ...' if len(texts) > 3 else ''})"


def _unwritable(references: Sequence[str], tokenizer: Tokenizer, normaliser: str) -> int:
    return len(tokenizer.with_normaliser(normaliser).unspellable(references))


def _fitting(references: Sequence[str], tokenizer: Tokenizer) -> str:
    """The tokenizer's own normaliser, unless most references cannot be written with it and more can with another."""
    own = _unwritable(references, tokenizer, tokenizer.normaliser)
    if 2 * own <= len(set(references)):
        return tokenizer.normaliser
    return min(NORMALISERS, key=lambda n: (_unwritable(references, tokenizer, n), n != tokenizer.normaliser))


def normaliser_mismatch(evaluation: Evaluation, reading: Reading) -> list[Finding]:
    """Outputs that equal their references under another normaliser (case, hyphens).

    Args:
        evaluation: any.
        reading: its outputs.
    """
    raw = np.array([i.reference.strip() == t.strip() for i, t in zip(evaluation.items, reading.texts, strict=True)])
    case = evaluation.normaliser.removesuffix(NO_PUNCTUATION)
    variants = {name: _right_under(evaluation, reading.texts, name) for name in (case, case + NO_PUNCTUATION)}
    wra = {"as written": 100 * raw.mean(), **{name: 100 * right.mean() for name, right in variants.items()}}
    reported = evaluation.reported_wra
    # a report that only the untouched texts, as they are stored, reproduce was made without any normalisation
    untouched = reported is not None and abs(reported - wra["as written"]) < ROUNDING <= abs(reported - reading.wra)
    used = raw if untouched and reading.texts == evaluation.texts else reading.right
    best = max(variants, key=lambda name: wra[name])
    gained, lost, p_value = evaluation.gain(used, variants[best])
    points = wra[best] - 100 * float(used.mean())
    if gained <= lost or points < NOTABLE_POINTS:
        return []
    strong = p_value < ALPHA
    severity: Severity = "note" if not strong else "refuse" if points >= GRAVE_POINTS else "warn"
    example = next(i for i in np.flatnonzero(variants[best] & ~used))
    return [
        Finding(
            "normaliser-mismatch", severity, str(evaluation.path),
            f"With the normaliser '{best}' WRA is {wra[best]:.2f} % instead of {100 * used.mean():.2f} %: {gained} of "
            f"{len(evaluation.takes)} takes differ from their prompt only in case or punctuation "
            f"('{evaluation.items[example].reference}', '{reading.texts[example]}').",
            "right outputs count as wrong",
            f"Score with that normaliser (--set tokenizer.normaliser={best} when the model is trained).",
            {"wra_by_normaliser": {name: round(float(value), 2) for name, value in wra.items()}, "takes": gained},
            points=float(points),
        )
    ]  # fmt: skip


def _right_under(evaluation: Evaluation, texts: Sequence[str], normaliser: str) -> np.ndarray:
    known = {text: normalise(text, normaliser) for text in {*texts, *evaluation.references}}
    return np.array([known[i.reference] == known[text] for i, text in zip(evaluation.items, texts, strict=True)])


def model_file(data: bytes, subject: str) -> list[Finding]:
    """A file that is no tokenizer, or a SentencePiece model that does not say which id its recogniser calls blank.

    Two habits are known: <unk> 0, <s> 1, </s> 2 and the blank shared with <unk> (SpeechBrain), and the blank behind the
    last piece of a model without <s> and </s> (NeMo).
    """
    try:
        tokenizer = Tokenizer(data, NORMALISERS[0], subject)
    except TokenizerError as error:
        return [
            Finding(
                "special-ids", "refuse", subject, error.problem,
                "without its tokenizer no id can be read", error.remedy,
            )
        ]  # fmt: skip
    habitual = tokenizer.blank == tokenizer.unk or tokenizer.blank == len(tokenizer.pieces) - tokenizer.appended
    if tokenizer.kind != "sentencepiece" or habitual:
        return []
    ids = {"unk": tokenizer.unk, "blank": tokenizer.blank, "bos": tokenizer.bos, "eos": tokenizer.eos}
    listed = ", ".join(f"{what} {i}" for what, i in ids.items())
    return [
        Finding(
            "special-ids", "warn", subject,
            f"{subject} does not have its special ids where SpeechBrain and NeMo have them ({listed}); that its "
            f"'{tokenizer.pieces[tokenizer.blank]}' is the CTC blank is a guess.",
            "if its recogniser was trained with another blank, blanks stand among the words of every CTC output",
            "Look up the blank of that recogniser, or train a tokenizer with --unk_id=0 --bos_id=1 --eos_id=2.",
            {**ids, "size": tokenizer.size},
        )
    ]  # fmt: skip
