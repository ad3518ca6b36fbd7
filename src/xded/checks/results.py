"""Result files against what they hold: metrics, rules, counts, names, copies."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np
from scipy.optimize import linear_sum_assignment

from xded.checks.readings import ALPHA, UNSTATED, Reading
from xded.corpus.uaspeech import BAND_OF, NAME
from xded.evaluations import PREDICTIONS, SCORES, Evaluation, with_takes
from xded.findings import Finding, Severity
from xded.scoring import score

ROUNDING: Final = 0.011  # percentage points, of a report with two decimals or more; with one decimal:
COARSE: Final = 0.051
NOTABLE_POINTS: Final = 1.0
NARROW: Final = 0.8  # width of an interval over that of the recomputed one; two bootstraps differ by 0.05
WRONG_OUTPUTS: Final = 20  # wrong outputs with different texts that two evaluations share before one is a copy
FOLDS: Final = 5  # of takes, to learn what words are called in one part and to test it on another
MOST_WORDS: Final = 1500  # the assignment takes cubic time
RENAMED_POINTS: Final = 10.0  # WRA; consistent slips between two words of a weak recogniser stay below
# per cent, with the new names: recognisers that had hardly learned anything, but slipped consistently, came to 45
RENAMED_WRA: Final = 60.0
RULES: Final = {
    "wra": "whole output",
    "first": "first word of the output",
    "raw": "whole output, case and punctuation counted",
    "wer": "100 - WER",
}
SPEAKER: Final = re.compile(r"C?[FM]\d\d")
# words in file names after which a speaker is not the tested one
OTHER_ROLE: Final = (
    "teacher",
    "donor",
    "model",
    "parent",
    "excl",
    "exclude",
    "excluded",
    "without",
    "wo",
    "no",
    "from",
)
NAMED_BY_MODEL: Final = ("crosstest", "teachers")  # folders whose files are named by the model
GENERIC: Final = (PREDICTIONS, SCORES)


# --- numbers ------------------------------------------------------------------------------------------------


def computed(reading: Reading) -> dict[str, float]:
    """What the texts give, in per cent, by the rules that go by the name of accuracy, and the error rates."""
    items = reading.evaluation.items
    return {
        "wra": reading.overall.wra_percent.value,
        "first": reading.first_word,
        "raw": 100 * float(np.mean([i.reference == text for i, text in zip(items, reading.texts, strict=True)])),
        "wer": reading.overall.wer_percent.value,
        "cer": reading.overall.cer_percent.value,
    }


def _possible(name: str, value: float) -> bool:
    """Error rates have no upper bound."""
    return value >= 0 and (value <= 100 + ROUNDING if name in ("wra", "accuracy", "ser") else math.isfinite(value))


def _json(numbers: Mapping[str, float]) -> dict[str, float | str]:
    """JSON has no NaN and no infinity."""
    return {name: value if math.isfinite(value) else str(value) for name, value in numbers.items()}


def out_of_range(evaluation: Evaluation) -> list[Finding]:
    """Metrics that cannot be."""
    impossible = {name: value for name, value in evaluation.reported.items() if not _possible(name, value)}
    if not impossible:
        return []
    listed = ", ".join(f"{name} {value:.2f} %" for name, value in impossible.items())
    wer = evaluation.reported.get("wer")
    accuracy = impossible.get("accuracy")
    is_rest = wer is not None and accuracy is not None and abs(accuracy + wer - 100) < ROUNDING
    return [
        Finding(
            "out-of-range", "warn", str(evaluation.path),
            f"The file reports {listed}: impossible." + (" It is 100 - WER, not an accuracy." if is_rest else ""),
            "averages and tables that take it up are meaningless",
            "Count whole outputs that equal their prompt (WRA) from the file's own outputs.",
            {"reported": _json(evaluation.reported), "impossible": sorted(impossible)},
        )
    ]  # fmt: skip


def other_rule(evaluation: Evaluation, reading: Reading) -> list[Finding]:
    """An accuracy that another rule than "the whole output equals the prompt" reproduces."""
    numbers = computed(reading)
    by_rule = _by_rule(numbers)
    for name, value in _accuracies(evaluation):
        rule = _rule(value, by_rule)
        if rule in (None, "wra"):
            continue
        points = value - numbers["wra"]
        severity: Severity = "warn" if abs(points) >= NOTABLE_POINTS else "note"
        shown = "WRA" if name == "wra" else name
        return [
            Finding(
                "other-rule", severity, str(evaluation.path),
                f"The reported {shown} of {value:.2f} % is by the rule '{RULES[rule or '']}'; whole outputs that equal "
                f"their prompt are {numbers['wra']:.2f} %.",
                f"it is not comparable with any WRA: {abs(points):.2f} points too {'high' if points > 0 else 'low'}",
                "Use the WRA of whole outputs.",
                {"reported": value, **{key: round(v, 2) for key, v in by_rule.items()}},
                points=abs(points),
            )
        ]  # fmt: skip
    return []


def _accuracies(evaluation: Evaluation) -> Iterator[tuple[str, float]]:
    """Reported accuracies in per cent that can be (for others see `out_of_range`); 100 - SER is one."""
    for name, value in evaluation.reported.items():
        if name in ("wra", "accuracy", "ser") and _possible(name, value):
            yield name, 100 - value if name == "ser" else value


def _by_rule(numbers: Mapping[str, float]) -> dict[str, float]:
    """Accuracies, the right rule first."""
    return {"wra": numbers["wra"], "first": numbers["first"], "raw": numbers["raw"], "wer": 100 - numbers["wer"]}


def _rule(value: float, by_rule: Mapping[str, float]) -> str | None:
    return next((rule for rule, own in by_rule.items() if _agree(value, own)), None)


def _agree(reported: float, own: float) -> bool:
    """Equal but for the rounding that the reported number shows."""
    return abs(reported - own) <= (COARSE if abs(reported - round(reported, 1)) < 1e-9 else ROUNDING)


def report_differs(evaluation: Evaluation, reading: Reading) -> list[Finding]:
    """Reported metrics that the file's own outputs do not give, and counts that do not fit."""
    numbers = computed(reading)
    allowed = {"wra": numbers["wra"]} if evaluation.scores else _by_rule(numbers)  # `other_rule` explains the others
    accuracies = {"wra" if name == "ser" else name: value for name, value in _accuracies(evaluation)}
    wrong = {name: (value, numbers["wra"]) for name, value in accuracies.items() if _rule(value, allowed) is None}
    worst = max((abs(a - b) for a, b in wrong.values()), default=0.0)
    for name in ("wer", "cer"):
        value = evaluation.reported.get(name, math.nan)
        if _possible(name, value) and not _agree(value, numbers[name]):
            wrong[name] = value, numbers[name]
    said, held = evaluation.stated_count, len(evaluation.items)
    counts = f"it says {said} outputs and holds {held}" if said is not None and said != held else ""
    if not wrong and not counts:
        return []
    of = f"{SCORES} beside it" if evaluation.scores else "report"
    listed = [f"{name} {a:.2f} % (its outputs give {b:.2f} %)" for name, (a, b) in wrong.items()]
    return [
        Finding(
            "report-differs", "refuse" if worst >= NOTABLE_POINTS else "warn", str(evaluation.path),
            f"The {of} does not say what the outputs say: {'; '.join([*listed, *([counts] if counts else [])])}.",
            "the numbers are those of other outputs, or were computed by a rule that nobody can repeat",
            "Compute them again from the outputs ('xded evaluate' writes both files together).",
            {"reported": _json(evaluation.reported), "recomputed": {k: round(v, 2) for k, v in numbers.items()},
             "stated_count": said, "count": held},
            points=worst,
        )
    ]  # fmt: skip


def copies_as_takes(evaluation: Evaluation, take_of: Mapping[str, str]) -> list[Finding]:
    """An interval of ours that counts microphone copies as independent.

    Args:
        evaluation: with its scores.
        take_of: recording -> take as the corpus or the naming scheme has it.
    """
    if not evaluation.items:
        return []
    real = with_takes(evaluation, take_of, {})
    stored = evaluation.scores.overall if evaluation.scores else None
    counted = stored.takes if stored else len(evaluation.takes)
    if counted <= len(real.takes):
        return []
    before, after = (
        score(e.predictions(), normaliser=e.normaliser, conditions=UNSTATED).overall.wra_percent
        for e in (evaluation, real)
    )
    before = stored.wra_percent if stored else before
    widths = [e.high - e.low for e in (before, after) if e.low is not None and e.high is not None]
    factor = widths[1] / widths[0] if len(widths) == 2 and widths[0] > 0 else (counted / len(real.takes)) ** 0.5
    narrow = factor > 1 / NARROW
    return [
        Finding(
            "copies-as-takes", "warn" if narrow else "note", str(evaluation.path),
            f"{counted} takes are counted where there are {len(real.takes)} (microphone copies of one take are not "
            f"independent): WRA {before} should be {after}, an error {factor:.1f} times as large.",
            "differences between models look more certain than they are",
            "Give microphone copies one take id in the manifest (importers do), and evaluate again.",
            {"counted": counted, "takes": len(real.takes), "factor": round(factor, 2)},
        )
    ]  # fmt: skip


def copies_unstated(evaluations: Sequence[Evaluation]) -> list[Finding]:
    """One note on files that count recordings without saying how many takes there are."""
    counted = [e for e in evaluations if e.source not in ("predictions", "scores") and len(e.takes) < len(e.items)]
    if not counted:
        return []
    items, takes = (sum(len(x) for x in column) for column in zip(*((e.items, e.takes) for e in counted), strict=True))
    return [
        Finding(
            "copies-as-takes", "note",
            str(counted[0].path) if len(counted) == 1 else f"{len(counted)} files",
            f"{items} recordings are {takes} takes: microphone copies of one take stand or fall together.",
            f"an interval that takes recordings as independent is up to {(items / takes) ** 0.5:.1f} times too narrow",
            "Count takes: intervals and tests here do.",
            {"recordings": items, "takes": takes, "files": [str(e.path) for e in counted]},
        )
    ]  # fmt: skip


# --- names --------------------------------------------------------------------------------------------------


def same_file(evaluations: Sequence[Evaluation]) -> list[Finding]:
    """One result under two names: the same bytes, or the same outputs."""
    findings = []
    by_bytes: dict[tuple[str, str | None], Evaluation] = {}
    by_outputs: dict[int, Evaluation] = {}
    for evaluation in evaluations:
        search = evaluation.conditions.get("decode")  # two searches may well agree
        first = by_bytes.setdefault((evaluation.sha256, search), evaluation)
        bytes_too = first is not evaluation
        if not bytes_too and _telling(evaluation):
            said = sorted((i.recording, i.hypothesis or "", i.tokens or ()) for i in evaluation.items)
            first = by_outputs.setdefault(hash((tuple(said), search)), evaluation)
        if first is evaluation:
            continue
        same_name = _label(first.path) == _label(evaluation.path)
        how = "the same bytes" if bytes_too else f"the same {len(evaluation.items)} outputs"
        findings.append(
            Finding(
                "same-file", "note" if same_name else "warn", str(evaluation.path),
                f"It holds {how} as {first.path}.",
                "one result is counted twice" if same_name else "one of the two names is wrong, or an option that they "
                "are named after did nothing",
                "Keep one; evaluate the other again if it should differ.",
                {"same_as": str(first.path), "bytes": bytes_too},
            )
        )  # fmt: skip
    return findings


def _telling(evaluation: Evaluation) -> bool:
    """Whether equal outputs mean a copy: recognisers that are always right, or always say the same, agree anyway."""
    wrong = {(item.hypothesis, item.tokens) for item in evaluation.items if item.hypothesis != item.reference}
    return len(wrong) >= WRONG_OUTPUTS


def _label(path: Path) -> str:
    """What a file is called: its name, or its folder's where all files have the same name."""
    return path.parent.name if path.name in GENERIC else path.stem


def wrong_speaker(evaluation: Evaluation, known: Collection[str] = ()) -> list[Finding]:
    """A file whose recordings are another speaker's than the one that its name, its folder or its header says.

    Args:
        evaluation: any.
        known: names of speakers, beside those of UASpeech (where ids are UASpeech's).
    """
    inside = set(evaluation.speakers)
    if not inside:
        return []
    uaspeech = any(NAME.fullmatch(item.recording) for item in evaluation.items)
    named, where, severity = _named(evaluation, {*known, *(BAND_OF if uaspeech else ())}, uaspeech)
    findings = []
    if named and not named & inside:
        findings.append((", ".join(sorted(named)), where, severity, len(evaluation.items)))
    strangers = Counter(
        (item.speaker, match["speaker"])
        for item in evaluation.items
        if (match := NAME.fullmatch(item.recording)) and item.speaker != match["speaker"]
    )
    for (said, _), count in strangers.items():
        findings.append((said, "its lines", "refuse", count))
    who = ", ".join(sorted({m["speaker"] for i in evaluation.items if (m := NAME.fullmatch(i.recording))} or inside))
    return [
        Finding(
            "wrong-speaker", level, str(evaluation.path),
            f"By {place} it is about {said}, but {count} recordings in it are of {who}.",
            "the number stands for a speaker who was not tested",
            "Rename it to the speaker whose recordings it holds, and evaluate the other one.",
            {"named": said, "inside": who, "recordings": count},
        )
        for said, place, level, count in findings
    ]  # fmt: skip


def _named(evaluation: Evaluation, known: Collection[str], uaspeech: bool) -> tuple[set[str], str, Severity]:
    """Speakers that are said to be tested, where that is said, and how much weight that has."""
    if evaluation.stated_speaker in known:
        return {str(evaluation.stated_speaker)}, "what it says itself", "refuse"
    path = evaluation.path
    folders = [path.parent.name, path.parent.parent.name]
    if path.name not in GENERIC and not set(folders) & set(NAMED_BY_MODEL):
        parts = [part for part in re.split(r"[^A-Za-z0-9]+", path.stem) if part]
        stems = {
            part
            for before, part in zip(["", *parts], parts, strict=False)
            if (part in known or (uaspeech and SPEAKER.fullmatch(part))) and before.lower() not in OTHER_ROLE
        }
        if stems:
            return stems, "its name", "refuse"
    folder = folders[0]
    if folder in known and folders[1] not in NAMED_BY_MODEL:
        return {folder}, "its folder", "note"  # folders may also be named by the model
    return set(), "", "note"


# --- words --------------------------------------------------------------------------------------------------


def renamed_words(evaluation: Evaluation, reading: Reading) -> list[Finding]:
    """Outputs that are, consistently and one to one, other prompts: the model learned permuted labels.

    Which word is called what is learned on some takes and tested on others of the same words, so that chance slips
    gain nothing; a mapping of the references onto themselves, so that a recogniser of few words gains nothing either.
    """
    words = sorted({reference for reference, _ in reading.pairs})
    fold = _folds(evaluation, reading)
    if fold is None or len(words) > MOST_WORDS:
        return []
    number = {word: i for i, word in enumerate(words)}
    said = np.array([[number[reference], number.get(text, -1)] for reference, text in reading.pairs])
    right = np.zeros(len(fold), bool)
    names: Counter[tuple[str, str]] = Counter()
    for part in range(FOLDS):
        counts = 1e-6 * np.eye(len(words))  # nothing known: a word is called what it is
        learned, tested = said[(fold != part) & (said[:, 1] >= 0)], fold == part
        np.add.at(counts, (learned[:, 0], learned[:, 1]), 1)
        mapping = linear_sum_assignment(counts, maximize=True)[1]
        right[tested] = mapping[said[tested, 0]] == said[tested, 1]
        moved = said[tested & right & (said[:, 0] != said[:, 1])]
        names.update((words[reference], words[text]) for reference, text in moved)
    points = 100 * float(right.mean()) - reading.wra
    if points < RENAMED_POINTS or evaluation.gain(reading.right, right)[2] >= ALPHA or len(names) < 2:
        return []
    sure = reading.wra + points >= RENAMED_WRA
    examples = ", ".join(f"{reference} -> {output}" for (reference, output), _ in names.most_common(3))
    return [
        Finding(
            "renamed-words", "refuse" if sure else "note", str(evaluation.path),
            f"{len(names)} of {len(words)} words are consistently written as another prompt ({examples}): with the "
            f"names learned on other takes, {reading.wra + points:.1f} % of the outputs are right instead of "
            f"{reading.wra:.1f} %.",
            "the model recognises words but was taught wrong names: labels and audio were paired wrongly" if sure else
            "labels and audio may have been paired wrongly; a model that has learned little slips like that, too",
            "Compare the training manifest's texts with its audio (a sort, a shift, a wrong join), mend it, train "
            "again.",
            {"wra": round(reading.wra, 2), "renamed_wra": round(reading.wra + points, 2), "words": len(names)},
            points=points,
        )
    ]  # fmt: skip


def _folds(evaluation: Evaluation, reading: Reading) -> np.ndarray | None:
    """Spreads the takes of each word over the folds, [N]; none unless two words or more have several takes."""
    takes: dict[str, dict[str, int]] = defaultdict(dict)
    fold = []
    for (reference, _), item in zip(reading.pairs, evaluation.items, strict=True):
        of_word = takes[reference]
        fold.append(of_word.setdefault(item.take, len(of_word)) % FOLDS)
    return np.array(fold) if sum(len(of_word) > 1 for of_word in takes.values()) > 1 else None
