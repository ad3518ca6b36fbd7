"""Recordings that are missing in a row, silent, clipped, damaged, or at another rate than the rest."""

from __future__ import annotations

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Final

from xded.checks.data import NAMES_SHOWN, Named, few, severity_of
from xded.corpus.checks import Row
from xded.corpus.describe import name_of
from xded.corpus.folds import Key
from xded.corpus.manifest import Recording
from xded.corpus.uaspeech import NAME
from xded.findings import Finding, Severity

# a run this improbable among missing prompts is no accident; over all speakers who lack prompts
CHANCE = 0.01
SHORTEST_RUN = 3  # prompts: two neighbours are lost by a page break
# of recordings opened: a few damaged ones are a slip, more are a fault of the recording or of the copy
BAD_SHARE = 0.05
# clipping harms less than the rest: one recording in ten, or half of somebody's
CLIPPED_SHARE = 0.1


def truncated_copy(rows: Sequence[Named]) -> list[Finding]:
    """Speakers of whom an alphabetical run of prompts is missing: a copy cut short, or unreadable files dropped.

    A speaker is expected to have the prompts that at least half of the others have, through the microphones that he
    or she has at all; where nobody else is there, UASpeech's word list. Microphone copies are lost together, so
    prompts are counted. If m of n prompts were lost independently of their names, the chance that r of them fill
    one given stretch of the sorted file list is C(n-r, m-r) / C(n, m); it is multiplied by the 2 places (head or
    tail) or n-r+1 places (middle) where it may be, and by the number of speakers who lack prompts (Bonferroni).
    For the study's F03 (24 of 255 prompts, all at the head) it is 7e-34. Whole word types or blocks that were never
    recorded, and runs that another speaker lacks as well, are no accident of copying.
    """
    counts: dict[str, Counter[Key]] = defaultdict(Counter)
    types: dict[Key, str] = {}
    for row in rows:
        counts[row.speaker][row.block or "", row.prompt, row.mic or ""] += 1
        types[row.block or "", row.prompt, ""] = row.word_type or ""
    prompts = {who: {(block, prompt, "") for block, prompt, _ in count} for who, count in counts.items()}
    expected = {who: own | _expected(who, prompts, rows, types) for who, own in prompts.items()}
    lacking = {who: expected[who] - own for who, own in prompts.items() if expected[who] - own}
    findings = []
    for who, missing in sorted(lacking.items()):
        run, place = _longest_run(missing, expected[who])
        groups = {(key[0], types[key]) for key in run}
        whole = run == {key for key in expected[who] if (key[0], types[key]) in groups}
        shared = any(run <= other for name, other in lacking.items() if name != who)
        chance = _chance(len(run), len(missing), len(expected[who]), place) * len(lacking)
        if len(run) >= SHORTEST_RUN and not whole and not shared and chance < CHANCE:
            findings.append(_truncated(who, run, place, missing, expected[who], counts, chance))
    return findings


def _expected(who: str, prompts: Mapping[str, set[Key]], rows: Sequence[Named], types: dict[Key, str]) -> set[Key]:
    """Prompts that at least half of the others have; UASpeech's own list where there are no others."""
    others = [own for name, own in prompts.items() if name != who]
    if others:
        counts = Counter(key for own in others for key in own)
        return {key for key, count in counts.items() if 2 * count >= len(others)}
    if not all(NAME.fullmatch(row.recording) for row in rows):
        return set()
    listed = {
        "D": [f"D{n}" for n in range(10)], "L": [f"L{chr(letter)}" for letter in range(ord("A"), ord("Z") + 1)],
        "C": [f"C{n}" for n in range(1, 20)], "CW": [f"CW{n}" for n in range(1, 101)],
    }  # fmt: skip
    for block in {row.block or "" for row in rows}:
        words = {**listed, "UW": [f"{block}_UW{n}" for n in range(1, 101)]}
        types.update({(block, word, ""): kind for kind, names in words.items() for word in names})
    return set(types)


def _longest_run(missing: Collection[Key], expected: Collection[Key]) -> tuple[set[Key], str]:
    """The longest stretch of a sorted file list that is missing, and where: head, tail or middle."""
    files = sorted(expected, key=lambda key: name_of(key) + "_")  # file names go on: CW100_M2, CW10_M2, CW1_M2
    best: tuple[int, int] = (0, 0)
    start = 0
    for end in range(len(files) + 1):
        if end < len(files) and files[end] in missing:
            continue
        best = max(best, (start, end), key=lambda span: span[1] - span[0])
        start = end + 1
    place = "head" if best[0] == 0 else "tail" if best[1] == len(files) else "middle"
    return set(files[best[0] : best[1]]), place


def _chance(run: int, missing: int, expected: int, place: str) -> float:
    """Chance of a run of this length somewhere (see `truncated_copy`)."""
    places = expected - run + 1 if place == "middle" else 2
    return min(1.0, places * math.comb(expected - run, missing - run) / math.comb(expected, missing))


def _truncated(
    who: str, run: set[Key], place: str, missing: set[Key], expected: set[Key],
    counts: Mapping[str, Counter[Key]], chance: float,
) -> Finding:  # fmt: skip
    """The finding, with the run widened by the copies of the prompt in which it ends."""
    mics = {mic for _, _, mic in counts[who]}
    files = sorted(((*key[:2], mic) for key in expected for mic in mics), key=name_of)
    gone = [place for place, key in enumerate(files) if (*key[:2], "") in run]
    first, last = gone[0], gone[-1]
    while first > 0 and not counts[who][files[first - 1]]:
        first -= 1
    while last + 1 < len(files) and not counts[who][files[last + 1]]:
        last += 1
    others = [count for name, count in counts.items() if name != who]
    typical = {key: statistics.median_low([c[key] for c in others if c[key]] or [1]) for key in files}
    lost = sum(typical[key] for key in files[first : last + 1])
    share = lost / sum(typical.values())
    names = name_of(files[first]), name_of(files[last])
    return Finding(
        "truncated-copy", "warn", who,
        f"{who} lacks {lost:,} of {sum(typical.values()):,} recordings in one run, {names[0]} to {names[1]}, at the "
        f"{place} of the alphabetical file list ({len(run)} of {len(expected)} prompts; by chance: {chance:.0e}).",
        "The copy was cut short, or unreadable files were dropped: whole kinds of words are missing, which biases "
        "accuracy by word type and comparisons between speakers.",
        f"Copy {who}'s recordings again from their source and import again ('xded corpus import'); "
        "'xded corpus describe CORPUS' lists what is missing.",
        {"speaker": who, "recordings": lost, "of": sum(typical.values()), "prompts": len(run), "place": place,
         "missing_prompts": len(missing), "first": names[0], "last": names[1], "chance": chance},
        100 * share,
    )  # fmt: skip


def fewer_than_declared(declared: int | None, listed: int, subject: str) -> list[Finding]:
    """A list that says how many recordings it has, and has another number."""
    if declared in (None, listed):
        return []
    return [Finding(
        "truncated-copy", "warn", subject, f"It declares {declared:,} recordings and lists {listed:,}.",
        "Ids and the posteriors in the same order may belong to different runs.",
        "Make the list and the posteriors again together.", {"declared": declared, "listed": listed},
    )]  # fmt: skip


def sample_rates(rows: Sequence[Recording], subject: str) -> list[Finding]:
    """More than one sample rate: the missing upper band tells speakers, or sessions, apart."""
    rates = Counter(row.sample_rate for row in rows if row.sample_rate)
    if len(rates) < 2:
        return []
    usual = rates.most_common(1)[0][0]
    other = [row for row in rows if row.sample_rate not in (usual, None)]
    speakers = sorted({row.speaker for row in other})
    return [Finding(
        "sample-rate", "warn", subject,
        f"{len(other):,} of {len(rows):,} recordings ({few(speakers)}) are not at {usual} Hz: "
        f"{', '.join(f'{count:,} at {rate} Hz' for rate, count in rates.most_common())}.",
        "If the headers are right, the band that is missing tells these recordings apart; if they are wrong, speech is "
        "too slow or too fast.",
        "Listen to one of each; put the right rate into the files, or bring all to the lowest one, and import again.",
        {"rates": {str(rate): count for rate, count in rates.items()}, "speakers": speakers},
    )]  # fmt: skip


KINDS: Final[Mapping[str, Collection[str]]] = {
    "audio-files": {"unreadable", "wrong length", "changed", "no text"},
    "sample-rate": {"wrong rate"},
    "silence": {"silent"},
    "clipping": {"clipped"},
}
SAID: Final[Mapping[str, tuple[str, str, str]]] = {
    "audio-files": (
        "are damaged or not what the manifest says",
        "Training stops at them, or hears other audio than was imported; targets made before describe other audio.",
        "Restore the files ('xded corpus check CORPUS' names them all), or import again ('xded corpus import').",
    ),
    "sample-rate": (
        "have another sample rate than the manifest declares",
        "Lengths and pitch are off by the ratio of the two rates.",
        "Find the original files and import again ('xded corpus import').",
    ),
    "silence": (
        "are silent",
        "The model learns to write words where nobody speaks.",
        "Check the microphone's channel; leave the files out ('xded corpus check CORPUS' names them all).",
    ),
    "clipping": (
        "are clipped",
        "Clipping adds harmonics that other recordings lack: the model hears loudness instead of speech.",
        "Record with a lower gain, or leave them out; 'xded corpus check CORPUS' names them all.",
    ),
}  # fmt: skip


def heard(check: str, opened: Sequence[tuple[Recording, Row | None]], subject: str) -> list[Finding]:
    """What one check says about the recordings that were opened.

    Args:
        check: a name of `KINDS`; opened: each recording with the row that `corpus.checks.check_one` wrote about it.
        subject: the corpus.
    """
    bad = [(recording, row) for recording, row in opened if row is not None and row.kind in KINDS[check]]
    if not bad:
        return []
    everything, lines = [recording for recording, _ in opened], [recording for recording, _ in bad]
    severity = severity_of(lines, everything, CLIPPED_SHARE if check == "clipping" else BAD_SHARE)
    if check == "clipping":
        severity = "warn" if severity == "refuse" else "note"
    what, effect, remedy = SAID[check]
    share = len(bad) / len(opened)
    speakers = Counter(recording.speaker for recording in lines)
    most = ", ".join(f"{who} {count}" for who, count in speakers.most_common(NAMES_SHOWN))
    return [Finding(
        check, severity, subject,
        f"{len(bad):,} of {len(opened):,} recordings opened ({share:.1%}) {what} ({most}): {bad[0][1].reason}",
        effect, remedy,
        {"bad": len(bad), "opened": len(opened), "speakers": dict(speakers),
         "examples": [recording.recording for recording in lines[:NAMES_SHOWN]]}, 100 * share,
    )]  # fmt: skip


def left_out(rows: Sequence[Row], kept: int, subject: str) -> list[Finding]:
    """Files that the import refused: they are in no manifest, and nobody may have noticed."""
    rejected = [row for row in rows if row.status == "rejected"]
    if not rejected:
        return []
    kinds = Counter(row.kind for row in rejected)
    total = kept + len(rejected)
    severity: Severity = "warn" if len(rejected) >= BAD_SHARE * total else "note"
    return [Finding(
        "audio-files", severity, subject,
        f"{len(rejected):,} of {total:,} files were left out at the import "
        f"({', '.join(f'{count:,} {kind}' for kind, count in kinds.most_common())}): {rejected[0].reason}",
        "The corpus is smaller than its folder; what is left out may be all of one kind.",
        "Read check.jsonl beside the manifest: it names each file and its remedy.", {"left_out": dict(kinds)},
    )]  # fmt: skip
