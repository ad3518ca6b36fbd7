"""A few updates of the whole recogniser on a speaker's takes, with the one training loop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from xded.adaptation.settings import Settings
from xded.adaptation.takes import Apart
from xded.config import DecodeConfig, FoldConfig, ObjectiveConfig, StageConfig, TargetConfig, TrainConfig
from xded.corpus.folds import Fold
from xded.corpus.manifest import Corpus, Recording
from xded.models.recogniser import Recogniser, load_recogniser
from xded.scoring import Prediction, read_predictions, write_predictions
from xded.training.data import TrainingData
from xded.training.evaluation import recognise
from xded.training.job import Job
from xded.training.run import fit


@dataclass(frozen=True)
class Piece:
    """One adaptation and its test, by itself: `decodes` are tested, `words` is the word list."""

    takes: int
    draw: int
    job: Job
    test: tuple[Recording, ...]
    decodes: Mapping[str, DecodeConfig]
    words: tuple[str, ...]
    device: str
    keep: bool


def job_of(
    recogniser: Recogniser, corpus: Corpus, apart: Apart, takes: int, draw: int, settings: Settings, out: Path
) -> Job:
    """The run that adapts: the checkpoint's config with the true text alone, `settings.updates` updates at least.

    There is no validation, which would need more takes: the last weights are tested. The leakage guard of the
    pre-flight sees to it that none of the test's takes was ever heard.
    """
    heard, truth = apart.heard(draw, takes), recogniser.config.objective
    epochs = -(-settings.updates // -(-len(heard) // settings.batch_size))
    train = TrainConfig(
        stages=(StageConfig(epochs=epochs, peak_lr=settings.peak_lr),),
        init=recogniser.path.resolve(),
        freeze_layers=settings.freeze_layers,
        batch_size=settings.batch_size,
        validate_every_epochs=epochs,
        checkpoint_every_epochs=epochs + 1,
        stop_on_collapse=False,
        device=str(next(recogniser.student.parameters()).device),
        threads=1,
    )
    changes = {
        "corpus": corpus.path.resolve(),
        "targets": None,
        "target": TargetConfig(),
        "seed": settings.seed + draw,
        "fold": FoldConfig(validation_fraction=0.0),
        "objective": ObjectiveConfig(
            ctc=truth.ctc, cross_entropy=truth.cross_entropy, label_smoothing=truth.label_smoothing
        ),
        "train": train,
    }
    config = recogniser.config.model_copy(update=changes)
    name = f"{recogniser.name} adapted to {apart.speaker}"
    test_takes = frozenset(recording.take for recording in apart.test)
    return Job(name, config, heard, (), Fold(()), test_takes, recogniser.tokenizer, out)


def hear_adapted(piece: Piece) -> dict[str, list[Prediction]]:
    """Adapts, recognises the test in every decode mode, and drops the weights unless they are kept.

    What is on disk is not done again.
    """
    out = piece.job.out
    kept = {decode: out / f"predictions_{decode.replace(' ', '_')}.jsonl" for decode in piece.decodes}
    if all(path.is_file() for path in kept.values()) and (not piece.keep or (out / "best.pt").is_file()):
        return {decode: read_predictions(path) for decode, path in kept.items()}
    recogniser = load_recogniser(fit(piece.job, resume=True, quiet=True), device=piece.device)
    data = TrainingData(piece.test, recogniser.student.front_end, recogniser.tokenizer)
    said = {}
    for decode, config in piece.decodes.items():
        words = piece.words if config.word_list else None
        said[decode] = recognise(recogniser.student, data, config, word_list=words, seed=piece.draw)
    for decode, predictions in said.items():
        write_predictions(kept[decode], predictions)
    if not piece.keep:
        for weights in out.glob("*.pt"):
            weights.unlink()
    return said
