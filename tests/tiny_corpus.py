"""A corpus of tones and a model of a few thousand parameters, for tests that train."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from xded.config import Config, build
from xded.corpus.folds import make_fold
from xded.corpus.manifest import Corpus, Recording, read_corpus, write_manifest
from xded.teachers.adapt import parts_of
from xded.tokenizer import Tokenizer
from xded.training.job import Job

SAMPLE_RATE = 16_000
WORDS = ("AB", "BAD", "CAB", "DA")
MODEL = {
    "size": None, "width": 16, "encoder_layers": 1, "heads": 2, "kernel": 3, "feed_forward_factor": 1,
    "subsampling_channels": 4, "decoder_layers": 1, "decoder_feed_forward": 16,
}  # fmt: skip


def write_corpus(
    folder: Path, controls: Sequence[str] = (), targets: Sequence[str] = ("t1", "t2"), takes: int = 2
) -> Corpus:
    """Every speaker says every word `takes` times: a tone a letter, the speaker's pitch, some noise."""
    recordings = []
    for number, speaker in enumerate([*controls, *targets]):
        for place, word in enumerate(WORDS):
            for take in range(takes):
                random = np.random.default_rng([number, place, take])
                name = f"{speaker}_{word}_{take}"
                path = folder / f"{name}.wav"
                folder.mkdir(parents=True, exist_ok=True)
                audio = _tones(word, 1.0 + 0.1 * number, random)
                soundfile.write(path, audio, SAMPLE_RATE, subtype="PCM_16")
                row = {"audio_filepath": path, "duration": len(audio) / SAMPLE_RATE, "text": word, "prompt": word}
                who = {"speaker": speaker, "role": "control" if speaker in controls else "target"}
                recordings.append(Recording.model_validate({**row, **who, "recording": name, "take": name}))
    write_manifest(folder / "manifest.jsonl", recordings)
    return read_corpus(folder)


def _tones(word: str, pitch: float, random: np.random.Generator) -> np.ndarray:
    parts = []
    for letter in word:
        samples = int(SAMPLE_RATE * random.uniform(0.12, 0.2))
        hertz = 300.0 * pitch * (1 + ord(letter) - ord("A"))
        parts.append(0.3 * np.sin(2 * np.pi * hertz * np.arange(samples) / SAMPLE_RATE))
    audio = np.concatenate(parts)
    return (audio + random.normal(0.0, 0.01, len(audio))).astype(np.float32)


def tiny_config(**sections: Any) -> Config:
    """A config of the tiny model; a train section gets fast defaults."""
    train = {"batch_size": 3, "threads": 1, "device": "cpu", "stages": ({"epochs": 2, "peak_lr": 1e-3},)}
    data = {"model": MODEL, **sections, "train": {**train, **sections.get("train", {})}}
    return build(data, "the test")


def job_for(corpus: Corpus, out: Path, *, name: str = "student", **sections: Any) -> Job:
    """A run of the tiny model on a corpus, with a tokenizer made of all its words."""
    config = tiny_config(**sections)
    fold = make_fold(corpus, config.fold)
    parts = parts_of(corpus, fold, config)
    tokenizer = Tokenizer.train(corpus.texts, "char", 64, "upper")
    test_takes = frozenset(r.take for r in parts.test)
    return Job(name, config, parts.train, parts.validation, fold, test_takes, tokenizer, out)
