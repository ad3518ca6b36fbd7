"""The work of a study's pieces: module-level functions, so that other processes and machines can be given them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from xded.config import Config, DecodeConfig
from xded.corpus.manifest import Recording, read_corpus
from xded.models.averaging import average
from xded.models.checkpoints import save
from xded.models.recogniser import Recogniser, load_recogniser
from xded.scoring import Prediction, is_right, write_predictions
from xded.study.plan import DecodeName
from xded.teachers import aggregation
from xded.tokenizer import Tokenizer, normalise
from xded.training.data import TrainingData
from xded.training.evaluation import recognise
from xded.training.job import Job
from xded.training.loop import CollapsedRunError
from xded.training.run import fit
from xded.training.status import write_atomically

EFFECTIVE = "effective.json"  # number of teachers that targets amount to, by kind
DECODES: tuple[DecodeName, ...] = ("open", "word list")


def predictions_in(folder: Path, decode: DecodeName) -> Path:
    """`predictions.jsonl` is the open one, as 'xded evaluate' writes it."""
    return folder / ("predictions.jsonl" if decode == "open" else "predictions_word_list.jsonl")


def fit_job(job: Job) -> None:
    """Trains, or goes on."""
    fit(replace(job, facts={}), resume=True, quiet=True)


def fit_and_test(
    job: Job, test: Sequence[Recording], words: Sequence[str], decodes: Mapping[DecodeName, DecodeConfig], seed: int
) -> None:
    """Trains an attempt and asks it about the test recordings.

    A run that has collapsed is tested as it is: that it learns nothing may be the answer.
    """
    with suppress(CollapsedRunError):
        fit_job(job)
    ask_about(job.out / "best.pt", test, words, decodes, job.out, seed)


def ask_about(
    checkpoint: Path,
    test: Sequence[Recording],
    words: Sequence[str],
    decodes: Mapping[DecodeName, DecodeConfig],
    out: Path,
    seed: int = 0,
) -> None:
    """Predictions of every decode mode."""
    _write(out, _said(load_recogniser(checkpoint), test, words, decodes, seed))


def in_our_spelling(prediction: Prediction, normaliser: str) -> Prediction:
    """What a recogniser of another spelling said, so that any normaliser judges it as its own one does.

    Whisper writes "X-ray." where the corpus has X-RAY: right without punctuation, and wrong in a study that keeps it.
    """
    right = is_right(prediction, normaliser)
    said = prediction.reference if right else normalise(prediction.hypothesis, normaliser)
    return replace(prediction, hypothesis=said)


def ask_zero_shot(path: Path, test: Sequence[Recording], words: Sequence[str], out: Path) -> None:
    """The same of a pretrained recogniser, in its own way and with the words that its tokenizer can write."""
    recogniser = load_recogniser(path)
    own = recogniser.tokenizer.normaliser
    lost = recogniser.tokenizer.unspellable(words)
    how = recogniser.config.decode
    decodes: dict[DecodeName, DecodeConfig] = {"open": how, "word list": how.model_copy(update={"word_list": True})}
    said = _said(recogniser, test, [word for word in words if word not in lost], decodes)
    _write(out, {decode: [in_our_spelling(p, own) for p in predictions] for decode, predictions in said.items()})


def _said(
    recogniser: Recogniser,
    test: Sequence[Recording],
    words: Sequence[str],
    decodes: Mapping[DecodeName, DecodeConfig],
    seed: int = 0,
) -> dict[DecodeName, list[Prediction]]:
    data = TrainingData(test, recogniser.student.front_end, recogniser.tokenizer)
    return {
        decode: recognise(recogniser.student, data, how, word_list=words if how.word_list else None, seed=seed)
        for decode, how in decodes.items()
    }


def _write(out: Path, said: Mapping[DecodeName, Sequence[Prediction]]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for decode, predictions in said.items():
        write_predictions(predictions_in(out, decode), predictions)


def average_teachers(checkpoints: Sequence[Path], out: Path) -> None:
    """The mean of teachers' weights as a recogniser of its own: OUT/best.pt."""
    save(average(checkpoints), out / "best.pt")


def make_targets(
    folders: dict[str, Path],
    heard_by: dict[str, tuple[Recording, ...]],
    recordings: Sequence[Recording],
    corpus: Path,
    config: Config,
    out: Path,
    tokenizer: Path,
    parent: Path | None = None,
) -> None:
    """One target a recording and kind; `parent` is its checkpoint, where `teachers.aggregation.needs_parent`."""
    pieces = Tokenizer.load(tokenizer, config.tokenizer.normaliser)
    made = aggregation.aggregate_all(folders, heard_by, recordings, read_corpus(corpus), pieces, config, out, parent)
    write_atomically(out / EFFECTIVE, json.dumps({kind: index.effective_teachers for kind, index in made.items()}))
