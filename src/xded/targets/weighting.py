"""Whom to believe: with which weight teachers are listened to about a recording, and who of them is left out.

Evidence beyond the recording itself is of training recordings only: whoever gathers it passes those and no others.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from xded.config import TargetConfig, Weighting
from xded.corpus.manifest import BANDS, Recording
from xded.errors import ConfigError, few
from xded.targets.aggregate import LEAST
from xded.targets.asking import PARENT
from xded.targets.store import Entry, Posterior, TargetError
from xded.tokenizer import normalise

CLOSENESS_SCALE: Final = 0.5  # cosine that makes a weight e times as large: a twin has 7 times a stranger's
WHOLE = "Make the posteriors anew with this version: 'xded targets' into an empty folder. "
KNOWN = "Posteriors from elsewhere do not say it: weigh those with uniform, confidence or band."


@dataclass(frozen=True)
class SpeakerSums:
    """A teacher's log-probabilities of a speaker's true texts: sum and number, of all takes and of each."""

    total: float
    count: int
    by_take: Mapping[str, tuple[float, int]]

    def without(self, take: str) -> float | None:
        """Mean over the other takes; none where there is no other."""
        total, count = self.by_take.get(take, (0.0, 0))
        return (self.total - total) / (self.count - count) if self.count > count else None


@dataclass(frozen=True)
class Evidence:
    """What weights are made of besides what was said about the recording; empty where the weighting does not ask.

    bands: of each teacher's speaker. accuracy: of each teacher. fit: teacher -> speaker -> log-probabilities of the
    speaker's texts. closeness: speaker -> teacher -> weight.
    """

    bands: Mapping[str, str | None] = field(default_factory=dict)
    accuracy: Mapping[str, float] = field(default_factory=dict)
    fit: Mapping[str, Mapping[str, SpeakerSums]] = field(default_factory=dict)
    closeness: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


def need_sense(config: TargetConfig) -> None:
    """Refuses choices that do not go together, before anything is computed.

    Raises:
        ConfigError: naming them and the way out.
    """
    same_prompt = config.heard == "same_prompt"
    if same_prompt and config.weighting in ("accuracy", "likelihood"):
        raise ConfigError(
            f"Weighting '{config.weighting}' compares what teachers say about other speakers, and with heard "
            "same_prompt each has heard its own speaker only.",
            "Give --heard same_audio, or weigh with reliability.",
        )
    if same_prompt and config.asked != "all":
        raise ConfigError(
            f"target.asked is {config.asked}, and with heard same_prompt the parent has no speaker to hear.",
            "Give --heard same_audio, or --asked all.",
        )
    if config.best is not None and config.weighting == "uniform":
        raise ConfigError(
            f"target.best is {config.best}, and weighting 'uniform' takes every teacher for as good as any other.",
            "Give the weighting that says who is best, such as --weighting reliability.",
        )
    if config.asked != "all" and config.coverage != "all":
        raise ConfigError(
            f"target.coverage '{config.coverage}' counts teachers, and target.asked {config.asked} asks one.",
            "Give --coverage all, or --asked all.",
        )


def weigh(
    how: Weighting,
    recording: Recording,
    entries: Mapping[str, Entry],
    posteriors: Mapping[str, Posterior],
    evidence: Evidence,
    best: int | None = None,
) -> dict[str, float]:
    """Weight of each teacher for one recording; those that are not among the `best` are left out.

    Choosing one teacher for each recording follows the multi-teacher distillation of SpeechBrain's TIMIT recipe (Gao,
    Parcollet & Lane 2020, arXiv:2005.09310), which takes the teacher of the lowest error rate on the utterance, and
    weighs several by their error rate. With `best` 1, `reliability` is its finer-grained neighbour.

    Args:
        how: `uniform`; `reliability`: the probability a token that the teacher gives to the true text; `confidence`:
            1 - entropy / log(entries kept + 1), mean over steps; `band`: 1 / (1 + distance in intelligibility bands);
            `accuracy`: see `accuracies`; `likelihood`: exp of the mean log-probability a token of the true texts of the
            speaker's other takes; `embedding`: see `closeness_of`.
        entries, posteriors: by teacher. evidence: what `how` asks for.
        best: only so many of the largest weights; of equal ones, those of the first names.

    Raises:
        TargetError: the weighting asks for what is not on record.
    """
    raw = {teacher: _raw(how, teacher, recording, entries, posteriors, evidence) for teacher in entries}
    if best is not None:  # before small weights are lifted: they are told apart, too
        kept = sorted(raw, key=lambda teacher: (-raw[teacher], teacher))[:best]
        raw = {teacher: weight for teacher, weight in raw.items() if teacher in kept}
    return {teacher: max(weight, LEAST) for teacher, weight in raw.items()}


def _raw(
    how: Weighting,
    teacher: str,
    recording: Recording,
    entries: Mapping[str, Entry],
    posteriors: Mapping[str, Posterior],
    evidence: Evidence,
) -> float:
    if how == "uniform":
        return 1.0
    if how == "confidence":
        return confidence(posteriors[teacher])
    if how == "band":
        return 1.0 / (1.0 + band_distance(evidence.bands.get(teacher), recording.band))
    if how == "accuracy":
        return evidence.accuracy[teacher]
    if how == "embedding":
        return evidence.closeness[recording.speaker][teacher]
    if how == "reliability":
        return float(np.exp(_log_prob(teacher, entries[teacher])))
    sums = evidence.fit[teacher].get(recording.speaker)
    fit = sums.without(recording.take) if sums else None
    if fit is not None:
        return float(np.exp(fit))
    if any(_has_others(evidence.fit[other], recording) for other in entries):
        raise TargetError(
            f"Weighting 'likelihood' asks how teacher {teacher} understands {recording.speaker}, and it was only asked "
            f"about '{recording.recording}'.",
            "Ask every teacher about every training recording, or weigh with reliability.",
        )
    return 1.0  # the speaker has no other take: nothing tells the teachers apart


def _has_others(fit: Mapping[str, SpeakerSums], recording: Recording) -> bool:
    return recording.speaker in fit and fit[recording.speaker].without(recording.take) is not None


def _log_prob(teacher: str, entry: Entry) -> float:
    if entry.true_log_prob is None:
        raise TargetError(
            f"It is not on record how probable teacher {teacher} found the true text of '{entry.recording}', which "
            "the weighting asks for.",
            WHOLE + KNOWN,
        )
    return entry.true_log_prob


def confidence(posterior: Posterior) -> float:
    """1 - normalised entropy, mean over steps: 1 is certain, 0 knows nothing."""
    full = np.concatenate([posterior.probabilities, posterior.rest[:, None]], axis=1)
    entropy = -(full * np.log(np.maximum(full, LEAST))).sum(1)
    return float(1.0 - (entropy / np.log(full.shape[1])).mean())


def band_distance(one: str | None, other: str | None) -> int:
    """Steps between two intelligibility bands; unknown bands are taken as two apart."""
    if one not in BANDS or other not in BANDS:
        return 2
    return abs(BANDS.index(one) - BANDS.index(other))


# --- evidence from other recordings ---------------------------------------------------------------------------------


def accuracies(
    entries: Mapping[str, Sequence[Entry]], recordings: Sequence[Recording], normaliser: str
) -> dict[str, float]:
    """Measured WRA of each teacher on other people's training recordings: (right + 1) / (asked + 2).

    Laplace's rule of succession keeps a teacher that was never right from having no weight at all. Recordings of the
    teacher's own speaker are left out: it was trained on them. With `teach.rehearsal` it was trained on some of the
    others' too, and so was the parent on those of everyone it has heard: their shares are the higher for it.

    Args:
        entries: what each teacher says, with its texts. recordings: those of training; others are left out.

    Raises:
        TargetError: texts are not on record, or a teacher was asked about its own speaker only.
    """
    known = {recording.recording: recording for recording in recordings}
    texts = {name: normalise(recording.text, normaliser) for name, recording in known.items()}
    shares = {}
    for teacher, said in entries.items():
        others = [e for e in said if e.recording in known and known[e.recording].speaker != teacher]
        if not others:
            raise TargetError(
                f"Weighting 'accuracy' asks how many of others' recordings teacher {teacher} has right, and it was "
                "asked about its own speaker only.",
                "Ask every teacher about every training recording (heard same_audio), or weigh with reliability.",
            )
        silent = [entry.recording for entry in others if entry.text is None]
        if silent:
            raise TargetError(
                f"It is not on record what teacher {teacher} heard in {few(silent)}, which weighting 'accuracy' asks "
                "for.",
                WHOLE + KNOWN,
            )
        right = sum(normalise(str(e.text), normaliser) == texts[e.recording] for e in others)
        shares[teacher] = (right + 1) / (len(others) + 2)
    return shares


def fits(entries: Mapping[str, Sequence[Entry]], recordings: Sequence[Recording]) -> dict[str, dict[str, SpeakerSums]]:
    """How well each teacher understands each speaker: teacher -> speaker -> log-probabilities of the true texts.

    Args:
        entries: what each teacher says. recordings: those of training; others are left out.

    Raises:
        TargetError: probabilities of true texts are not on record.
    """
    known = {recording.recording: recording for recording in recordings}
    found: dict[str, dict[str, SpeakerSums]] = {}
    for teacher, said in entries.items():
        takes: dict[str, dict[str, list[float]]] = {}
        for entry in said:
            if entry.recording in known:
                recording = known[entry.recording]
                row = takes.setdefault(recording.speaker, {}).setdefault(recording.take, [])
                row.append(_log_prob(teacher, entry))
        found[teacher] = {
            speaker: SpeakerSums(
                sum(sum(row) for row in rows.values()),
                sum(len(row) for row in rows.values()),
                {take: (sum(row), len(row)) for take, row in rows.items()},
            )
            for speaker, rows in takes.items()
        }
    return found


def closeness_of(embeddings: Mapping[str, np.ndarray], teachers: Collection[str]) -> dict[str, dict[str, float]]:
    """exp(cosine / 0.5) of speakers' embeddings, the mean over speakers taken off first: speaker -> teacher -> weight.

    Without the mean, which is what all speech has in common, all cosines are near 1. The parent stands at that mean:
    its cosine is 0.

    Args:
        embeddings: of each training speaker, [D].
        teachers: called as their speakers; and the parent.

    Raises:
        TargetError: a teacher of whose speaker there is no recording.
    """
    unknown = sorted(set(teachers) - set(embeddings) - {PARENT})
    if unknown:
        raise TargetError(
            f"Weighting 'embedding' compares speakers' voices, and there is no training recording of {few(unknown)}.",
            "Weigh with likelihood, which asks the teacher and not its speaker, or leave these teachers out.",
        )
    speakers = sorted(embeddings)
    apart = np.stack([embeddings[speaker] for speaker in speakers]).astype(np.float64)  # [S, D]
    apart -= apart.mean(axis=0)
    apart /= np.maximum(np.linalg.norm(apart, axis=1, keepdims=True), LEAST)
    unit = dict(zip(speakers, apart, strict=True)) | {PARENT: np.zeros(apart.shape[1])}
    return {s: {t: float(np.exp(unit[s] @ unit[t] / CLOSENESS_SCALE)) for t in teachers} for s in speakers}
