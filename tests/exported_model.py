"""A recogniser of random weights that says different things about different audio, and its export, made once."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from tiny_corpus import MODEL, WORDS, tiny_config, write_corpus
from xded.config import ModelConfig
from xded.corpus.folds import Provenance
from xded.corpus.manifest import Corpus
from xded.export.folder import Options, write_export
from xded.models.checkpoints import save
from xded.models.recogniser import Recogniser, describe, load_recogniser
from xded.models.student import Student
from xded.tokenizer import Tokenizer

SPEAKERS = ("ZORA", "QUIN")
_KEPT = TemporaryDirectory(prefix="xded-export-")  # until the tests end
FOLDER = Path(_KEPT.name)


@cache
def corpus() -> Corpus:
    return write_corpus(FOLDER / "corpus", controls=SPEAKERS[:1], targets=SPEAKERS[1:])


def random_student(vocabulary: int, seed: int = 2, **sizes: int) -> Student:
    """Weights far from zero, and batch norms that have seen something: outputs differ from frame to frame."""
    config = ModelConfig.model_validate({**MODEL, "decoder_layers": 2, **sizes})
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        student = Student(config, vocabulary)
        for name, values in student.state_dict().items():
            if values.is_floating_point():
                noise = torch.rand(values.shape) - 0.5
                values.add_(1.5 * noise if values.dim() > 1 else noise.abs() if "var" in name else noise)
    return student.eval()


@cache
def recogniser() -> Recogniser:
    """The teacher of a speaker, as a checkpoint."""
    tokenizer = Tokenizer.train(WORDS, "char", 64, "upper")
    student = random_student(tokenizer.size)
    config = tiny_config(corpus=str(corpus().path), model=student.config.model_dump(), fold={"held_out": ["QUIN"]})
    heard = Provenance("teacher ZORA", frozenset({"ZORA"}), frozenset(r.take for r in corpus().select(["ZORA"])))
    facts = describe(tokenizer, config, "teacher ZORA", (heard,))
    save({**facts, "model_state_dict": student.state_dict(), "epoch": 7}, FOLDER / "run" / "best.pt")
    return load_recogniser(FOLDER / "run" / "best.pt")


@cache
def exported() -> Path:
    """The folder that `xded export` writes of it."""
    write_export(recogniser(), FOLDER / "export", Options())
    return FOLDER / "export"
