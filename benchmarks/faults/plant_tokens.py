"""Faults of tokens and text."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

import sentencepiece

from faults.workbench import Workbench, fault, write_corpus
from xded.scoring import Prediction, score, write_predictions
from xded.tokenizer import Tokenizer, normalise
from xded.training.data import TrainingData

FAMILY: Final = "tokens and text"
CONDITIONS = {"speakers": "unseen", "words": "seen", "word_list": "open", "decode": "ctc greedy"}


def write_evaluation(folder: Path, predictions: Sequence[Prediction]) -> None:
    """predictions.jsonl and the scores.json that belongs to it, as `xded evaluate` writes them."""
    folder.mkdir(parents=True, exist_ok=True)
    write_predictions(folder / "predictions.jsonl", predictions)
    scores = score(predictions, normaliser="upper", conditions=CONDITIONS)
    (folder / "scores.json").write_text(scores.to_json(), encoding="utf-8")


def exact(reference: str, hypothesis: str) -> bool:
    """The rule of WRA."""
    return normalise(hypothesis, "upper") == normalise(reference, "upper")


def write_study_file(
    path: Path,
    predictions: Sequence[Prediction],
    *,
    offset: int = 0,
    tokenizer: Path | None = None,
    right: Callable[[str, str], bool] = exact,
) -> Path:
    """An evaluation as the study's `eval_student.py` wrote it."""
    correct = sum(right(p.reference, p.hypothesis) for p in predictions)
    data: dict[str, Any] = {
        "checkpoint": "checkpoints/student_T05/best.pt",
        "epoch": 5,
        "train_loss": 0.4,
        "val_loss": 0.8,
        "num_samples": len(predictions),
        "tokenizer": {"type": "sentencepiece", "path": str(tokenizer), "vocab_offset": offset},
        "wra": {"value": correct / len(predictions), "correct": correct, "total": len(predictions)},
        "predictions": [
            {
                "utterance_id": p.recording,
                "target": p.reference,
                "prediction_tokens": list(p.tokens),
                "prediction_text": p.hypothesis,
            }
            for p in predictions
        ],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1), encoding="utf-8")
    return path


def permuted(tokenizer: Tokenizer) -> Tokenizer:
    """A tokenizer of the same size with the same letters in another order."""
    model = io.BytesIO()
    letters = [piece for piece in tokenizer.pieces[3:] if len(piece) == 1]
    rare_first = [letter * (3 * place + 1) for place, letter in enumerate(letters)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(rare_first), model_writer=model, model_type="char", vocab_size=tokenizer.size,
        hard_vocab_limit=False, character_coverage=1.0, normalization_rule_name="identity", add_dummy_prefix=False,
        unk_id=0, bos_id=1, eos_id=2, pad_id=-1, minloglevel=3,
    )  # fmt: skip
    other = Tokenizer.from_bytes(model.getvalue(), tokenizer.normaliser)
    assert other.size == tokenizer.size
    assert other.pieces != tokenizer.pieces
    return other


def redecoded(bench: Workbench, tokenizer: Tokenizer, offset: int = 0) -> list[Prediction]:
    """The student's predictions, their ids turned into text in another way."""
    return [
        replace(p, hypothesis=tokenizer.decode([i - offset for i in p.tokens if 0 <= i - offset < tokenizer.size]))
        for p in bench.predictions()
    ]


@fault("ids decoded one low", FAMILY, "token-offset")
def ids_one_low(bench: Workbench, out: Path) -> list[Path]:
    """The evaluation takes 1 from every token id before it decodes it, as the study's did."""
    run = bench.copy(bench.student, out / "run")
    write_evaluation(run, redecoded(bench, bench.tokenizer, 1))
    return [run]


@fault("ids decoded one high, study's format", FAMILY, "token-offset")
def ids_one_high(bench: Workbench, out: Path) -> list[Path]:
    """A script adds 1 to every id before it decodes it; what is kept is the study's kind of file."""
    tokenizer = bench.teachers / "tokenizer.model"
    path = out / "eval_T05_decoder.json"
    return [
        write_study_file(path, redecoded(bench, bench.tokenizer, -1), offset=-1, tokenizer=tokenizer),
        tokenizer,
    ]


@fault("trained on ids one high", FAMILY, "token-offset")
def trained_one_high(bench: Workbench, out: Path) -> list[Path]:
    """The loader adds 1 to every id to make room for a blank at 0 that is there already; decoding does not know."""
    start = TrainingData.__init__
    letters = bench.tokenizer.size - 3

    def shifted(self: TrainingData, *args: Any, **more: Any) -> None:
        start(self, *args, **more)
        self.tokens = [[3 + (i - 3 + 1) % letters for i in tokens] for tokens in self.tokens]

    with patch.object(TrainingData, "__init__", shifted):
        run = bench.train(out / "run", *bench.from_scratch)
    return [bench.evaluate(run)]


@fault("decoded with another tokenizer of the same size", FAMILY, "tokenizer-mismatch")
def other_tokenizer(bench: Workbench, out: Path) -> list[Path]:
    """Predictions are decoded with the tokenizer of another project: as many pieces, in another order."""
    run = bench.copy(bench.student, out / "run")
    other = permuted(bench.tokenizer)
    path = out / "other" / "tokenizer.model"
    path.parent.mkdir()
    path.write_bytes(other.model_bytes)
    write_evaluation(run, redecoded(bench, other))
    return [run, path]


@fault("targets of another tokenizer", FAMILY, "tokenizer-mismatch")
def targets_of_another(bench: Workbench, out: Path) -> list[Path]:
    """The targets' folder gets another tokenizer of the same size, the student takes it, and nobody compares."""
    targets = bench.copy(bench.targets, out / "targets")
    (targets / "tokenizer.model").write_bytes(permuted(bench.tokenizer).model_bytes)
    with patch("xded.training.preflight.check_fingerprint"):
        run = bench.train(out / "run", *bench.from_scratch, "--no-controls", "--targets", targets, "--ctc-kd", 1)
    return [bench.evaluate(run), targets]


@fault("special ids elsewhere", FAMILY, "special-ids")
def special_ids(bench: Workbench, out: Path) -> list[Path]:
    """A tokenizer made with another toolkit's habits: padding 0, unknown 1, start 2, end 3."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "tokenizer.model"
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([text.upper() for text in bench.read().texts]), model_writer=file,
            model_type="char", vocab_size=64, hard_vocab_limit=False, add_dummy_prefix=False,
            pad_id=0, unk_id=1, bos_id=2, eos_id=3, minloglevel=3,
        )  # fmt: skip
    return [path, bench.corpus]


@fault("prompts with hyphens that the tokenizer lacks", FAMILY, "unreachable-prompts", "normaliser-mismatch")
def hyphens(bench: Workbench, out: Path) -> list[Path]:
    """Two of the eight prompts have a hyphen; the tokenizer was made elsewhere and has none."""
    names = {"six": "x-ray", "seven": "roly-poly"}
    rows = [r.model_copy(update={"text": names.get(r.text, r.text)}) for r in bench.read().recordings]
    path = out / "tokenizer.model"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(Tokenizer.train([*bench.read().texts, "xray", "rolypoly"], "char", 64, "upper").model_bytes)
    return [write_corpus(out / "corpus", rows), path]


@fault("decoder cut off after two tokens", FAMILY, "unreachable-prompts")
def max_length(bench: Workbench, out: Path) -> list[Path]:
    """Single words, so `--max-length 2`; but a word has three to five tokens (the study: 1, with up to 7)."""
    run = bench.copy(bench.student, out / "run")
    with patch("xded.decoding.check_max_length"):
        bench.evaluate(run, "--decode", "decoder", "--max-length", 2)
    return [run]


@fault("references in another case than outputs", FAMILY, "normaliser-mismatch")
def other_case(bench: Workbench, out: Path) -> list[Path]:
    """References as they stand in the word list (lower case), outputs in upper case, compared as they are."""
    tokenizer = bench.teachers / "tokenizer.model"
    path = write_study_file(
        out / "eval_T05_ctc.json", bench.predictions(), tokenizer=tokenizer, right=lambda a, b: a == b
    )
    return [path, tokenizer]
