"""Who is asked about which recordings, and who of them is listened to. Imports neither torch nor numpy."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Final

from xded.config import Asked, TargetConfig
from xded.corpus.manifest import Corpus, Recording

PARENT: Final = "parent"  # asked beside the teachers, as a generalist: it has no speaker of its own


def listened_to(teachers: Collection[str], speaker: str, asked: Asked) -> list[str]:
    """Who is listened to about a recording of `speaker`, of those who can say something about it.

    `all` the teachers; `own`: that of the speaker, or the parent where there is none; `own_and_parent`: both of them.
    """
    if asked == "all":
        return [teacher for teacher in teachers if teacher != PARENT]
    if asked == "own":
        return [speaker] if speaker in teachers else [PARENT] if PARENT in teachers else []
    return [teacher for teacher in teachers if teacher in (speaker, PARENT)]


def questions(
    corpus: Corpus,
    teachers: Sequence[str],
    recordings: Sequence[Recording],
    target: TargetConfig,
    test_takes: frozenset[str] = frozenset(),
) -> dict[str, tuple[Recording, ...]]:
    """Recordings that each teacher (and the parent, where it is listened to) is asked about; none: not asked at all.

    Args:
        teachers: by their speakers. recordings: what students train on, or may. test_takes: never asked about.
    """
    if target.heard == "same_prompt":
        return {s: tuple(r for r in corpus.select(speakers=[s]) if r.take not in test_takes) for s in teachers}
    whole, how = tuple(recordings), target.asked
    everything = how == "all" or target.weighting == "accuracy"  # of other speakers
    council = (*teachers, *((PARENT,) if how != "all" else ()))
    about = {speaker: listened_to(council, speaker, how) for speaker in {r.speaker for r in whole}}
    asked = {t: whole if everything else tuple(r for r in whole if t in about[r.speaker]) for t in council}
    return {teacher: rows for teacher, rows in asked.items() if rows}
