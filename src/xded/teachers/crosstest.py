"""Every teacher on every speaker: matrix, mean, best, vote and the any-teacher oracle, for teachers of any make.

The vote is the plurality of whole outputs, normalised; an empty output votes like any other. Ties decide points where
few teachers agree, so their rule is always stated. `vote` needs one output and takes the alphabetically first of the
tied teachers, which favours whoever has that name; `examine` shares ties: of n tied outputs each counts 1/n, what a
random choice gives on average, and says what the kindest and the unkindest choice would give.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from xded.config import Config, DecodeConfig
from xded.corpus.folds import make_fold
from xded.corpus.manifest import Corpus, Recording
from xded.errors import CorpusError
from xded.models.recogniser import load_recogniser
from xded.parallel import run_all
from xded.scoring import Estimate, Prediction, Scores, is_right, read_predictions, score, write_predictions
from xded.teachers.adapt import Teachers, parts_of
from xded.tokenizer import normalise
from xded.training.data import TrainingData
from xded.training.evaluation import UNSTATED, recognise
from xded.training.status import write_atomically

Said = Mapping[str, Sequence[Prediction]]


def _test_one(job: tuple[Path, tuple[Recording, ...], DecodeConfig, tuple[str, ...], Path]) -> None:
    checkpoint, recordings, decode, word_list, out = job
    recogniser = load_recogniser(checkpoint)
    data = TrainingData(recordings, recogniser.student.front_end, recogniser.tokenizer)
    write_predictions(
        out, recognise(recogniser.student, data, decode, word_list=word_list if decode.word_list else None)
    )


def ask_all(
    checkpoints: Mapping[str, Path],
    recordings: Sequence[Recording],
    decode: DecodeConfig,
    word_list: Sequence[str],
    out: Path,
    jobs: int,
) -> dict[str, list[Prediction]]:
    """Predictions of several recognisers on the same recordings, kept in OUT/<name>.jsonl.

    A file is kept when it is newer than the checkpoint, covers exactly these recordings and was decoded in this way.
    """
    out.mkdir(parents=True, exist_ok=True)
    decoded, settings = out / "decode.json", decode.model_dump_json()
    if not decoded.is_file() or decoded.read_text(encoding="utf-8") != settings:
        for stale in out.glob("*.jsonl"):
            stale.unlink()
        write_atomically(decoded, settings)
    wanted = {recording.recording for recording in recordings}
    todo = []
    for name, checkpoint in checkpoints.items():
        path = out / f"{name}.jsonl"
        current = path.is_file() and path.stat().st_mtime > checkpoint.stat().st_mtime
        if not (current and {p.recording for p in read_predictions(path)} == wanted):
            todo.append((checkpoint, tuple(recordings), decode, tuple(word_list), path))
    run_all(_test_one, todo, jobs)
    return {name: read_predictions(out / f"{name}.jsonl") for name in checkpoints}


def crosstest(corpus: Corpus, teachers: Teachers, config: Config, *, jobs: int = 1) -> dict[str, list[Prediction]]:
    """Predictions of every finished teacher on the takes that the fold's training has not heard.

    These are all takes of the held-out speakers and the validation takes of the others (which chose the best
    checkpoint, but were never trained on).

    Raises:
        CorpusError: no teacher is finished.
    """
    if not teachers.finished:
        raise CorpusError(f"{teachers.folder} has no finished teacher.", "Train them first: 'xded teach'.")
    parts = parts_of(corpus, make_fold(corpus, config.fold), config)
    unheard = [r for r in (*parts.test, *parts.validation) if r.role == "target"]
    checkpoints = {speaker: teachers.teacher(speaker) / "best.pt" for speaker in teachers.finished}
    return ask_all(checkpoints, unheard, config.decode, corpus.texts, teachers.folder / "crosstest", jobs)


def wra(predictions: Sequence[Prediction], normaliser: str, *, seed: int = 0, resamples: int = 2000) -> Estimate:
    """WRA in per cent with its interval over takes."""
    return score(
        predictions, normaliser=normaliser, conditions=UNSTATED, seed=seed, resamples=resamples
    ).overall.wra_percent


def matrix(said: Said, normaliser: str) -> dict[str, dict[str, Estimate]]:
    """WRA of every teacher (row) on every speaker (column)."""
    return {teacher: _by_speaker(predictions, normaliser) for teacher, predictions in said.items()}


def _by_speaker(predictions: Sequence[Prediction], normaliser: str) -> dict[str, Estimate]:
    speakers = sorted({p.speaker for p in predictions})
    return {s: wra([p for p in predictions if p.speaker == s], normaliser) for s in speakers}


def _aligned(said: Said) -> list[list[Prediction]]:
    """For every recording that all teachers heard, what each said, teachers in alphabetical order."""
    by_recording = [{p.recording: p for p in said[teacher]} for teacher in sorted(said)]
    shared = sorted(set.intersection(*(set(rows) for rows in by_recording)))
    return [[rows[recording] for rows in by_recording] for recording in shared]


def vote(said: Said) -> list[Prediction]:
    """Plurality over the teachers' whole outputs; a tie goes to the alphabetically first of the tied teachers."""
    winners = []
    for row in _aligned(said):
        counts = Counter(p.hypothesis for p in row)
        winners.append(max(row, key=lambda p: counts[p.hypothesis]))  # max keeps the first of equals
    return winners


def best_by_speaker(said: Said, normaliser: str) -> list[Prediction]:
    """For every speaker the predictions of the teacher that turned out best: a choice made after the fact."""
    best: list[Prediction] = []
    for speaker in sorted({p.speaker for rows in said.values() for p in rows}):
        of_speaker = {name: [p for p in said[name] if p.speaker == speaker] for name in sorted(said)}
        best += max(of_speaker.values(), key=lambda rows: sum(is_right(p, normaliser) for p in rows))
    return best


def oracle(said: Said, normaliser: str) -> list[Prediction]:
    """The right output wherever any teacher has it: what a perfect choice of teacher would reach."""
    best = []
    for row in _aligned(said):
        right = [p for p in row if is_right(p, normaliser)]
        best.append(right[0] if right else row[0])
    return best


# --- one tested speaker -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Vote:
    """WRA of the vote in per cent under every rule for ties; intervals over takes.

    Attributes:
        shared: each of n tied outputs counts 1/n.
        first_name: a tie goes to the alphabetically first of the tied teachers, as in `vote`.
        worst, best: what the unkindest and the kindest choice among tied outputs give.
        tied_percent: recordings on which several outputs have the most votes.
    """

    shared: Estimate
    first_name: Estimate
    worst: Estimate
    best: Estimate
    tied_percent: float


@dataclass(frozen=True)
class Tested:
    """What all teachers make of one speaker, on the recordings that every one of them has.

    The speaker's own teacher, where there is one, has scores, and no part in mean, best, vote and oracle: these say
    what other speakers' teachers are worth.

    Attributes:
        scores: of each teacher.
        effective_recordings: of each teacher, the number of independent recordings with the same standard error.
        mean: WRA of the mean teacher, per cent.
        best: the teacher that turned out best: a choice made after the fact.
        oracle: WRA where any teacher that is right suffices.
        lacking: recordings that some teacher has and this one lacks.
        disputed: recordings that the teachers' files give different references for.
    """

    speaker: str
    recordings: int
    takes: int
    scores: Mapping[str, Scores]
    effective_recordings: Mapping[str, float]
    mean: Estimate
    best: str
    vote: Vote
    oracle: Estimate
    lacking: Mapping[str, tuple[str, ...]]
    disputed: tuple[str, ...]


def examine(said: Said, normaliser: str, *, seed: int = 0) -> tuple[list[Tested], list[str]]:
    """Every tested speaker, in alphabetical order.

    Args:
        said: predictions of each teacher, no recording twice.
        normaliser: of `tokenizer.normalise`, for the votes and for what is right.
        seed: of the resampling.

    Returns:
        The speakers, and those that no two teachers can be compared on: no recording that all of their teachers have.
    """
    tested, apart = [], []
    for speaker in sorted({p.speaker for rows in said.values() for p in rows}):
        rows = {name: {p.recording: p for p in said[name] if p.speaker == speaker} for name in sorted(said)}
        found = _tested(speaker, {name: row for name, row in rows.items() if row}, normaliser, seed)
        if found is None:
            apart.append(speaker)
        else:
            tested.append(found)
    return tested, apart


def _tested(speaker: str, rows: Mapping[str, Mapping[str, Prediction]], normaliser: str, seed: int) -> Tested | None:
    everything = set().union(*rows.values())
    prompts = {r: {normalise(row[r].reference, normaliser) for row in rows.values() if r in row} for r in everything}
    disputed = tuple(sorted(r for r, texts in prompts.items() if len(texts) > 1))
    shared = sorted(set.intersection(*(set(row) for row in rows.values())) - set(disputed))
    if not shared:
        return None
    takes = [next(iter(rows.values()))[r].take for r in shared]
    right = np.array([[is_right(row[r], normaliser) for r in shared] for row in rows.values()])  # [K, N]
    others = [name for name in rows if name != speaker] or list(rows)
    outputs = [[normalise(rows[name][r].hypothesis, normaliser) for name in others] for r in shared]
    others_right = right[[name in others for name in rows]]
    scores = {
        name: score([row[r] for r in shared], normaliser=normaliser, conditions=UNSTATED, seed=seed)
        for name, row in rows.items()
    }
    return Tested(
        speaker=speaker,
        recordings=len(shared),
        takes=len(set(takes)),
        scores=scores,
        effective_recordings={name: effective_recordings(r, takes) for name, r in zip(rows, right, strict=True)},
        mean=over_takes(others_right.mean(0), takes, seed=seed),
        best=max(others, key=lambda name: scores[name].overall.wra_percent.value),
        vote=_votes(outputs, others_right, takes, seed),
        oracle=over_takes(others_right.max(0), takes, seed=seed),
        lacking={name: lacks for name, row in rows.items() if (lacks := tuple(sorted(everything - set(row))))},
        disputed=disputed,
    )


def _votes(outputs: Sequence[Sequence[str]], right: np.ndarray, takes: Sequence[str], seed: int) -> Vote:
    """outputs: normalised, for each recording one a teacher; right: [K, N]."""
    shared, first, worst, best, tied = (np.zeros(len(outputs)) for _ in range(5))
    for n, row in enumerate(outputs):
        counts = Counter(row)
        most = max(counts.values())
        top = {text: right[k, n] for k, text in reversed(list(enumerate(row))) if counts[text] == most}
        tied[n] = len(top) > 1
        shared[n] = sum(top.values()) / len(top)
        worst[n], best[n] = all(top.values()), any(top.values())
        first[n] = top[next(text for text in row if text in top)]
    return Vote(
        shared=over_takes(shared, takes, seed=seed),
        first_name=over_takes(first, takes, seed=seed),
        worst=over_takes(worst, takes, seed=seed),
        best=over_takes(best, takes, seed=seed),
        tied_percent=100 * float(tied.mean()),
    )


def over_takes(values: np.ndarray, takes: Sequence[str], *, seed: int = 0, resamples: int = 2000) -> Estimate:
    """Mean of values in [0, 1] in per cent, with a 95 % percentile bootstrap interval that resamples whole takes.

    values: one a recording, [N]; takes: of each recording.
    """
    _, group = np.unique(takes, return_inverse=True)
    sums, sizes = np.bincount(group, values), np.bincount(group)
    value = 100 * float(np.mean(values))
    if len(sizes) < 2:
        return Estimate(value, None, None)
    drawn = np.random.default_rng(seed).multinomial(len(sizes), np.full(len(sizes), 1 / len(sizes)), size=resamples)
    low, high = np.percentile(100 * (drawn @ sums) / (drawn @ sizes), [2.5, 97.5])
    return Estimate(value, float(low), float(high))


def effective_recordings(right: np.ndarray, takes: Sequence[str]) -> float:
    """Recordings over their design effect (Kish 1965, Survey Sampling): copies of one take are right or wrong together.

    right: of each recording, [N]; takes: of each recording. Where all (or none) are right, copies tell nothing: takes.
    """
    share, count = float(right.mean()), len(right)
    _, group = np.unique(takes, return_inverse=True)
    if share in (0.0, 1.0):
        return float(group.max() + 1)
    variance = float((np.bincount(group, right - share) ** 2).sum()) / count**2
    return min(float(count), share * (1 - share) / variance) if variance > 0 else float(count)
