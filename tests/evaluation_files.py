"""Evaluation files of the makes that the doctor knows, with planted faults: a closed list of 255 words, read once."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from xded.evaluations import Evaluation, Item
from xded.scoring import Prediction
from xded.tokenizer import Tokenizer

WORDS = 255
ONE_PIECE = 145  # words that are one token, as in the reference study
MICS = 3  # microphones of each take
RECORDINGS = MICS * WORDS


@cache
def words() -> tuple[str, ...]:
    """Made-up words of one to four syllables."""
    random = np.random.default_rng(0)
    syllables = [consonant + vowel for consonant in "BDFGKLMNPRST" for vowel in "AEIOU"]
    made: dict[str, None] = {}
    while len(made) < WORDS:
        made["".join(random.choice(syllables, size=random.integers(1, 5)))] = None
    return tuple(made)


@cache
def tokenizer() -> Tokenizer:
    """Whole-word pieces for some words, other whole-word pieces between them, and parts of words for the rest."""
    own = words()[:ONE_PIECE]
    others = [word[::-1] + "X" for word in own]
    whole = [f"\u2581{word}" for pair in zip(own, others, strict=True) for word in pair]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*words(), *others]), model_writer=model, model_type="bpe", vocab_size=500,
        hard_vocab_limit=False, user_defined_symbols=whole, character_coverage=1.0, num_threads=1,
        normalization_rule_name="identity", unk_id=0, bos_id=1, eos_id=2, pad_id=-1, minloglevel=3,
    )  # fmt: skip
    return Tokenizer.from_bytes(model.getvalue(), "upper")


def ids_of(text: str) -> list[int]:
    return tokenizer().encode(text)


def read_at(ids: Sequence[int], shift: int) -> str:
    """What a decoder writes that adds `shift` to every id."""
    return tokenizer().decode(i + shift for i in ids if i > 2 and 0 <= i + shift < tokenizer().size)


def names(speaker: str, mics: int = MICS) -> list[tuple[str, str]]:
    """Recording and reference of every recording: one take of each word, `mics` microphones."""
    return [
        (f"{speaker}_B3_CW{i}_M{mic}", word) for i, word in enumerate(words(), start=1) for mic in range(2, 2 + mics)
    ]


def outputs(right_takes: int, *, speaker: str = "M08", mics: int = MICS, seed: int = 0) -> list[list[int]]:
    """Ids of a recogniser that gets some takes right and writes other words of the list for the rest."""
    random = np.random.default_rng(seed)
    right = set(random.permutation(WORDS)[:right_takes].tolist())
    made = []
    for place in range(WORDS):
        wrong = (place + 1 + int(random.integers(WORDS - 1))) % WORDS
        made += [ids_of(words()[place if place in right else wrong])] * mics
    return made


def student(
    path: Path, ids: Sequence[Sequence[int]], *, shift: int = 0, speaker: str = "M08", mics: int = MICS, **changes: Any
) -> Path:
    """A study's evaluation JSON: texts are the ids read with `shift`; the header is computed from them."""
    rows: list[dict[str, Any]] = [
        {"utterance_id": name, "target": reference, "prediction_tokens": list(tokens),
         "prediction_text": read_at(tokens, shift)}
        for (name, reference), tokens in zip(names(speaker, mics), ids, strict=True)
    ]  # fmt: skip
    correct = sum(row["prediction_text"].split()[:1] == [row["target"]] for row in rows)
    data = {
        "checkpoint": f"checkpoints/student_{speaker}/best.pt", "epoch": 39, "train_loss": 0.1, "val_loss": 0.1,
        "num_samples": len(rows), "tokenizer": {"type": "sentencepiece_ckpt", "path": "t.ckpt", "vocab_offset": -shift},
        "wra": {"value": correct / len(rows), "correct": correct, "total": len(rows)}, "predictions": rows,
    }  # fmt: skip
    return write(path, {**data, **changes})


def averaged(path: Path, texts: Sequence[str], *, speaker: str = "M08", mics: int = MICS, **changes: Any) -> Path:
    """An averaging JSON: text only, and an "accuracy" that is 100 - WER (references are single words)."""
    rows = [
        {"id": name, "audio_path": f"/corpus/audio/{speaker}/{name}.wav", "reference": reference, "prediction": text}
        for (name, reference), text in zip(names(speaker, mics), texts, strict=True)
    ]
    errors = sum(max(1, len(t.split())) - (r["reference"] in t.split()) for r, t in zip(rows, texts, strict=True))
    wer = 100 * errors / len(rows)
    data = {"speaker_id": speaker, "num_utterances": len(rows), "wer": wer, "accuracy": 100 - wer, "details": rows}
    return write(path, {**data, **changes})


def write(path: Path, data: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


def report(path: Path, pairs: Sequence[tuple[str, str, str]]) -> Path:
    """A SpeechBrain WER report of (recording, reference, output), one word each."""
    wrong = sum(reference != output for _, reference, output in pairs)
    percent = 100 * wrong / len(pairs)
    lines = [
        f"%WER {percent:.2f} [ {wrong} / {len(pairs)}, 0 ins, 0 del, {wrong} sub ]",
        f"%SER {percent:.2f} [ {wrong} / {len(pairs)} ]",
        f"Scored {len(pairs)} sentences, 0 not present in hyp.",
        "=" * 80,
    ]
    for name, reference, output in pairs:
        mark = "=" if reference == output else "S"
        lines += [f"{name}, %WER 0.00 [ 0 / 1, 0 ins, 0 del, 0 sub ]", reference, mark, output or "<eps>", "=" * 80]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def evaluation(rows: Sequence[tuple[str, str, str]], reported: Mapping[str, float] | None = None) -> Evaluation:
    """Rows of (recording, reference, output) in memory; recordings without a UASpeech name are their own takes."""
    items = tuple(Item(name, name, "s", reference, output) for name, reference, output in rows)
    return Evaluation(Path("given.json"), "student", items, reported or {}, "0" * 64)


def prediction(recording: str, reference: str, hypothesis: str, tokens: Sequence[int] = (), **more: Any) -> Prediction:
    base: dict[str, Any] = {"take": recording, "speaker": "s", "band": None, "word_type": None, "prompt": reference}
    return Prediction(
        recording=recording, reference=reference, hypothesis=hypothesis, tokens=tuple(tokens), **{**base, **more}
    )
