"""Every teacher on every speaker, on takes that no one was trained on: matrix, vote, and the any-teacher oracle."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from xded.config import Config, DecodeConfig
from xded.corpus.folds import make_fold
from xded.corpus.manifest import Corpus, Recording
from xded.errors import CorpusError
from xded.models.recogniser import load_recogniser
from xded.parallel import run_all
from xded.scoring import Estimate, Prediction, is_right, read_predictions, score, write_predictions
from xded.teachers.adapt import Teachers, parts_of
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
