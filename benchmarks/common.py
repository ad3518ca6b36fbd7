"""What the benchmarks share: made-up voices, one training run, scores, the head of a section of RESULTS.md."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

from xded.config import build
from xded.corpus.folds import Fold
from xded.corpus.manifest import Recording
from xded.corpus.synthesiser import Sex, Voice, make_voice, say
from xded.corpus.vocoder import SAMPLE_RATE, write_flac
from xded.models.recogniser import Recogniser, load_recogniser
from xded.scoring import Estimate, Prediction, score
from xded.tokenizer import Tokenizer
from xded.training.data import TrainingData
from xded.training.evaluation import recognise
from xded.training.job import Job
from xded.training.run import fit

ROOT = Path(__file__).resolve().parents[1]
REAL = ROOT.parent / "shared" / "data"  # real recordings lie beside the repository, where they are
WORK = ROOT / "work" / "benchmarks"  # ignored by git; a finished training run in it is not repeated
BATCH_SIZE = 16


def make_voices(prefix: str, count: int, *, seed: int, severity: float = 0.0) -> list[Voice]:
    """Voices PREFIX01, PREFIX02 ..., male and female in turn; severity changes nothing else about them."""
    names: list[tuple[str, Sex]] = [(f"{prefix}{n:02d}", "m" if n % 2 else "f") for n in range(1, count + 1)]
    return [make_voice(name, sex=sex, severity=severity, seed=seed) for name, sex in names]


def record(folder: Path, voices: Sequence[Voice], words: Sequence[str], takes: int) -> list[Recording]:
    """Every voice says every word `takes` times; FLAC files in `folder`."""
    recordings = []
    for voice in voices:
        for word in words:
            for take in range(1, takes + 1):
                name = f"{voice.name}_{word}_{take}"
                waveform = say(voice, word, take)
                path = folder / f"{name}.flac"
                digest = write_flac(path, waveform)
                recordings.append(
                    Recording(
                        audio_filepath=path, duration=len(waveform) / SAMPLE_RATE, text=word, recording=name,
                        speaker=voice.name, take=name, prompt=word, sample_rate=SAMPLE_RATE, audio_sha256=digest,
                    )
                )  # fmt: skip
    return recordings


def train_recogniser(
    out: Path,
    train: Sequence[Recording],
    validation: Sequence[Recording],
    held_out: Sequence[str],
    *,
    updates: int,
    **sections: Any,
) -> Recogniser:
    """A supervised (CTC and cross-entropy) recogniser of the demo's size, by the project's own loop.

    Args:
        out: run folder; a finished run of the same config in it is taken as it is.
        train, validation: recordings; validation picks the checkpoint.
        held_out: speakers of the test, whom the leakage guard looks for.
        updates: about how many; whole epochs are trained.
        sections: of the config, such as `features` or `seed`.
    """
    epochs = max(1, round(updates * BATCH_SIZE / len(train)))
    settings = {
        "stages": ({"epochs": epochs, "peak_lr": 3e-3},), "batch_size": BATCH_SIZE, "threads": 1, "device": "cpu",
        "validate_every_epochs": max(1, epochs // 3), "save_every_steps": 100_000, "checkpoint_every_epochs": 100_000,
    }  # fmt: skip
    config = build({"model": {"size": "micro"}, "train": settings, **sections}, "the benchmark")
    tokenizer = Tokenizer.train({r.text for r in train}, "char", 64, config.tokenizer.normaliser)
    fold = Fold(held_out=tuple(held_out))
    fit(Job(out.name, config, list(train), list(validation), fold, frozenset(), tokenizer, out), resume=True)
    return load_recogniser(out)


def predictions_of(
    recogniser: Recogniser, test: Sequence[Recording], words: Sequence[str] | None = None, *, seed: int = 0
) -> list[Prediction]:
    """What is heard: open CTC greedy, or with a word list."""
    decode = recogniser.config.decode.model_copy(update={"word_list": words is not None})
    data = TrainingData(test, recogniser.student.front_end, recogniser.tokenizer)
    return recognise(recogniser.student, data, decode, word_list=words, seed=seed)


def wra_of(predictions: Sequence[Prediction]) -> Estimate:
    """WRA, percent, with its interval over takes (seeds of a take stay together)."""
    conditions = {"speakers": "unseen", "words": "seen", "word_list": "open", "decode": "in the table"}
    return score(predictions, normaliser="upper", conditions=conditions).overall.wra_percent


def head(title: str, script: str) -> str:
    """Heading of a section: date, command, machine."""
    command = " ".join(["python", f"benchmarks/{script}.py", *sys.argv[1:]])
    return (
        f"\n## {date.today().isoformat()}: {title}\n\n`{command}` "
        f"(Python {platform.python_version()}, torch {torch.__version__}, {os.cpu_count()} cores, one thread)\n"
    )
