"""Folds, splits by take, the leakage guard and teacher coverage."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal, TypeVar

import numpy as np

from xded.config import FoldConfig
from xded.corpus.manifest import Corpus, Recording
from xded.errors import ConfigError, CorpusError, LeakageError, few

Key = tuple[str, str, str]  # block, prompt, mic; "" where the corpus has none
Matched = TypeVar("Matched", Key, str)  # with the same prompt, or the same recording by its id


@dataclass(frozen=True)
class Fold:
    """Speakers of whom nothing may be heard before the test, speakers left out altogether, and training speakers who
    are heard by their own teachers alone.
    """

    held_out: tuple[str, ...]
    exclude: tuple[str, ...] = ()
    include_held_out: bool = False
    withhold: tuple[str, ...] = ()


@dataclass(frozen=True)
class Split:
    """Three parts of a corpus that share no take."""

    train: tuple[Recording, ...]
    validation: tuple[Recording, ...]
    test: tuple[Recording, ...]


@dataclass(frozen=True)
class Provenance:
    """What an artefact (parent, teacher M08, targets, normaliser, model selection, student ...) has heard.

    `known` is false where that is not on record: of a pretrained encoder, or of a teacher from elsewhere.
    """

    what: str
    speakers: frozenset[str]
    takes: frozenset[str] = frozenset()
    known: bool = True


def make_fold(corpus: Corpus, config: FoldConfig) -> Fold:
    """The fold that a config describes, with its names checked against the corpus.

    Raises:
        CorpusError: a speaker that the corpus does not have, with the nearest name.
        ConfigError: a speaker in two lists (held out, excluded, withheld), or nobody left to train on.
    """
    corpus.require((*config.held_out, *config.exclude, *config.withhold))
    held_out, exclude, withhold = (sorted(set(s)) for s in (config.held_out, config.exclude, config.withhold))
    lists = {"held out": held_out, "excluded": exclude, "withheld": withhold}
    for one, other in combinations(lists, 2):
        if both := sorted(set(lists[one]) & set(lists[other])):
            raise ConfigError(f"{', '.join(both)}: {one} and {other} at once.", "Name each speaker in one list only.")
    left_out = {*exclude, *withhold} if config.include_held_out else {*held_out, *exclude, *withhold}
    if not set(corpus.speakers) - left_out:
        raise ConfigError("The fold leaves no speaker to train on.", "Hold out or exclude fewer speakers.")
    return Fold(tuple(held_out), tuple(exclude), config.include_held_out, tuple(withhold))


def split(
    corpus: Corpus,
    fold: Fold,
    *,
    controls: bool,
    validation: Literal["takes", "speakers"],
    validation_fraction: float,
    seed: int,
) -> Split:
    """Splits a corpus by take: all microphone copies of a take fall on the same side.

    Held-out speakers are test; with `fold.include_held_out` a random half of each one's takes trains instead.
    Excluded and withheld speakers, and control speakers when `controls` is false, are in no part (a held-out control is
    test). Takes are drawn for each speaker by themselves, so that another speaker's coming or going changes nothing;
    speakers for validation are drawn as if nobody were withheld.

    Args:
        corpus: all recordings.
        fold: who is held out, who is excluded.
        controls: whether control speakers train.
        validation: `takes` keeps a share of every training speaker's takes, `speakers` keeps whole speakers
            (target speakers where the fold has two or more; never held-out ones).
        validation_fraction: that share; at least one take or speaker is kept when it is above 0.
        seed: of the draw.

    Raises:
        CorpusError: nothing is left for training.
    """
    takes_of: dict[str, set[str]] = {}
    for recording in corpus.recordings:
        if recording.speaker not in fold.exclude:
            takes_of.setdefault(recording.speaker, set()).add(recording.take)
    test: set[str] = set()
    train: dict[str, list[str]] = {}
    for speaker, takes in sorted(takes_of.items()):
        drawn = _shuffled(takes, seed, speaker)
        if speaker in fold.held_out:
            half = len(drawn) // 2 if fold.include_held_out else 0
            test.update(drawn[half:])
            train[speaker] = drawn[:half]
        elif controls or corpus.role_of(speaker) != "control":
            train[speaker] = drawn
    kept = _validation_takes(corpus, fold, train, validation, validation_fraction, seed)
    withheld = {take for speaker in fold.withhold for take in takes_of.get(speaker, ())}
    trained = {take for takes in train.values() for take in takes} - kept - withheld
    kept -= withheld
    if not trained:
        raise CorpusError(
            f"{corpus.path}: no recording is left to train on.",
            "Hold out, exclude or withhold fewer speakers, train on the controls too, or keep less for validation.",
        )
    parts = (tuple(r for r in corpus.recordings if r.take in part) for part in (trained, kept, test))
    return Split(*parts)


def _validation_takes(
    corpus: Corpus, fold: Fold, train: Mapping[str, Sequence[str]], kind: str, fraction: float, seed: int
) -> set[str]:
    """The takes that validation keeps from training."""
    if fraction == 0:
        return set()
    if kind == "takes":
        return {take for takes in train.values() for take in takes[: _share(len(takes), fraction)]}
    speakers = [speaker for speaker in train if speaker not in fold.held_out]
    targets = [speaker for speaker in speakers if corpus.role_of(speaker) == "target"]
    candidates = targets if len(targets) > 1 else speakers
    chosen = _shuffled(candidates, seed, "validation speakers")[: _share(len(candidates), fraction)]
    return {take for speaker in chosen for take in train[speaker]}


def _share(count: int, fraction: float) -> int:
    """How many of `count` are kept: at least one, and at least one is left."""
    return min(max(1, round(count * fraction)), count - 1) if count else 0


def _shuffled(names: Iterable[str], seed: int, stream: str) -> list[str]:
    """Names in a random order that depends on the names, the seed and the stream only."""
    ordered = sorted(names)
    generator = np.random.default_rng([seed, zlib.crc32(stream.encode())])
    return [ordered[index] for index in generator.permutation(len(ordered))]


def guard(fold: Fold, provenances: Iterable[Provenance], test_takes: Collection[str] = ()) -> None:
    """Raises when something has heard what the fold forbids.

    Forbidden are the held-out speakers, the excluded speakers and the test takes. When the fold includes the held-out
    speakers, their material is allowed except for the test takes; `test_takes` is then needed, and an artefact that
    heard a held-out speaker must say which takes.

    Raises:
        LeakageError: naming every artefact, the speakers and the takes.
        ValueError: the fold includes held-out speakers and `test_takes` is empty.
    """
    if fold.include_held_out and fold.held_out and not test_takes:
        raise ValueError("a fold that includes its held-out speakers needs test_takes")
    problems = []
    for provenance in provenances:
        held_out = sorted(provenance.speakers & set(fold.held_out))
        excluded = sorted(provenance.speakers & set(fold.exclude))
        tested = sorted(provenance.takes & set(test_takes))
        if held_out and not fold.include_held_out:
            problems.append(f"{provenance.what} has heard held-out {_speakers(held_out)}{_takes(provenance, tested)}")
        elif tested:
            problems.append(f"{provenance.what} has heard {len(tested)} test takes ({few(tested)})")
        elif held_out and not provenance.takes:
            problems.append(f"{provenance.what} has heard held-out {_speakers(held_out)} and does not say which takes")
        if excluded:
            problems.append(f"{provenance.what} has heard excluded {_speakers(excluded)}")
    if problems:
        raise LeakageError(
            "Leakage: " + "; ".join(problems) + ".",
            "Make it again for this fold (xded teach, xded targets), or point to the artefacts of this fold.",
        )


def _speakers(names: Sequence[str]) -> str:
    return f"speaker{'s' if len(names) > 1 else ''} {', '.join(names)}"


def _takes(provenance: Provenance, tested: Sequence[str]) -> str:
    """The takes that reached the artefact, as far as they are known."""
    if tested:
        return f" ({len(tested)} test takes: {few(tested)})"
    return f" (it lists {len(provenance.takes)} takes)" if provenance.takes else ""


def key_of(recording: Recording) -> Key:
    """What is matched across speakers: block, prompt and microphone."""
    return recording.block or "", recording.prompt, recording.mic or ""


def coverage(
    keys_by_teacher: Mapping[str, Collection[Matched]],
    mode: Literal["strict", "partial", "all"],
    min_teachers: int,
) -> dict[Matched, tuple[str, ...]]:
    """Which teachers cover which key, for the keys that the mode keeps.

    Args:
        keys_by_teacher: keys that each teacher's speaker has recorded, or recordings that the teacher has heard.
        mode: `strict` keeps keys that all teachers cover, `partial` those of at least `min_teachers`, `all` any.
        min_teachers: used by `partial`.

    Returns:
        key -> sorted teachers, keys sorted.

    Raises:
        CorpusError: no teachers, or no key that enough of them cover.
    """
    teachers: dict[Matched, list[str]] = {}
    for teacher in sorted(keys_by_teacher):
        for key in set(keys_by_teacher[teacher]):
            teachers.setdefault(key, []).append(teacher)
    if not teachers:
        raise CorpusError("The fold has no teachers, or they cover nothing.", "Train teachers first: 'xded teach'.")
    needed = {"strict": len(keys_by_teacher), "partial": min_teachers, "all": 1}[mode]
    kept = {key: tuple(names) for key, names in sorted(teachers.items()) if len(names) >= needed}
    if not kept:
        most, keys = max(Counter(len(names) for names in teachers.values()).items())
        raise CorpusError(
            f"No prompt or recording is covered by {needed} teachers (coverage {mode}); at most {most} cover "
            f"one ({keys} of them).",
            f"Use coverage partial with at most {most} teachers, or coverage all.",
        )
    return kept
