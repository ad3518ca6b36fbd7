"""Difficulty scores of a curriculum: do they differ, and do they reach the recordings? Imports no torch.

Readers expect one number per recording, at the top of the file or under the key `utterance_scores`; whatever they do
not find they take for of middling difficulty, without a word.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from xded.checks.data import Named
from xded.findings import Finding

WRAPPER = "utterance_scores"
FEW_SPEAKERS_SHARE = 0.5  # of the scores that name a speaker: more from one speaker is no score of all
FIELDS_SHOWN = 5
SAME_SHARE = 0.9  # of the scores: a default, not a measurement
FEWEST_NUMBERS = 10  # a table of fewer numbers may be anything
EFFECT = "There is no curriculum: recordings without a score of their own keep the default and any order they came in."


def _is_score(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_difficulty(data: object) -> bool:
    """Whether a JSON looks like difficulty scores: names -> numbers, or names -> tables that speak of difficulty."""
    if not isinstance(data, Mapping) or not data:
        return False
    if isinstance(data.get(WRAPPER), Mapping):
        return True
    entries = list(data.values())
    tables = [entry for entry in entries if isinstance(entry, Mapping)]
    if len(tables) == len(entries):
        keys = {str(key).lower() for table in tables for key in table}
        return any("difficulty" in key or key == "score" for key in keys) or any(is_difficulty(t) for t in tables[:1])
    return len(entries) >= FEWEST_NUMBERS and all(_is_score(entry) for entry in entries)


def curriculum(data: Mapping[str, Any], subject: str, recordings: Sequence[Named]) -> list[Finding]:
    """Findings about difficulty scores: the JSON `data` of the file `subject`.

    `recordings` are those of the corpus (none: it is not known); speakers of whom not one recording has a score may be
    held out.
    """
    wrapped = data.get(WRAPPER)
    entries = wrapped if isinstance(wrapped, Mapping) else data
    scores = {str(key): float(value) for key, value in entries.items() if _is_score(value)}
    if not scores:
        return [_unreadable(entries, subject)]
    findings = []
    if recordings:
        findings += _unreached(scores, subject, recordings)
    value, count = Counter(scores.values()).most_common(1)[0]
    if count > 1 and count >= SAME_SHARE * len(scores):
        everything = count == len(scores)
        findings.append(
            Finding(
                "curriculum",
                "refuse" if everything else "warn",
                subject,
                f"{'All' if everything else f'{count} of'} {len(scores)} difficulty scores are {value:g}.",
                EFFECT,
                "Make the scores anew; print the easiest and the hardest ten before training on them.",
                {"scores": len(scores), "value": value, "count": count},
            )
        )
    return findings


def _unreadable(entries: Mapping[str, Any], subject: str) -> Finding:
    tables = [value for value in entries.values() if isinstance(value, Mapping)]
    fields = Counter(str(key) for table in tables for key in table)
    deeper = tables and all(_is_score(value) for value in tables[0].values()) and len(tables[0]) > len(entries)
    kind = "hold a table each, not a number" if tables else "hold no number"
    what = f"0 of {len(entries)} entries are scores: they {kind}"
    what += f" ({', '.join(list(fields)[:FIELDS_SHOWN])})." if tables and not deeper else "."
    if deeper:
        what = f"No score is where readers look: scores lie one level deeper, under '{next(iter(entries))}'."
    owners = Counter(str(table["speaker"]) for table in tables if "speaker" in table)
    if len(owners) > 1 and owners.most_common(1)[0][1] > FEW_SPEAKERS_SHARE * owners.total():
        speaker, count = owners.most_common(1)[0]
        what += f" Keys name no speaker: {count} of {owners.total()} entries are those of {speaker}, written last."
    return Finding(
        "curriculum",
        "refuse",
        subject,
        what,
        EFFECT,
        "Write one number per recording: {\"recording\": score, ...}.",
        {"entries": len(entries), "scores": 0, "fields": dict(fields), "speakers": dict(owners)},
    )  # fmt: skip


def _unreached(scores: Mapping[str, float], subject: str, recordings: Sequence[Named]) -> list[Finding]:
    """Recordings that no score reaches."""
    reached = Counter(row.speaker for row in recordings if row.recording in scores)
    missing = Counter(row.speaker for row in recordings if row.recording not in scores)
    left_out = [speaker for speaker in missing if speaker not in reached]  # on purpose, where the others are complete
    if set(missing) == set(left_out) and len(left_out) < len(reached):
        return []
    shared = {row.prompt for row in recordings} | {row.recording.removeprefix(f"{row.speaker}_") for row in recordings}
    nameless = len(shared & set(scores))
    what = f"{reached.total()} of {len(recordings)} recordings have a difficulty score ({len(scores)} scores)."
    if nameless and not reached:
        what += f" {nameless} keys name no speaker: one score serves them all, that of the last one written."
    return [
        Finding(
            "curriculum",
            "warn" if reached else "refuse",
            subject,
            what,
            EFFECT,
            f"Key the scores by recording: '{recordings[0].recording}', not '{next(iter(scores))}'.",
            {
                "recordings": len(recordings), "reached": reached.total(), "scores": len(scores),
                "missing": dict(missing), "keys_without_speaker": nameless,
            },
        )
    ]  # fmt: skip
