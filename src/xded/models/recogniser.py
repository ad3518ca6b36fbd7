"""A recogniser as it is kept and passed on: weights, tokenizer, config, and what it has heard."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import torch

from xded import config as configs
from xded.config import Config
from xded.corpus.folds import Provenance
from xded.errors import CheckpointError, ConfigError
from xded.exported import WEIGHTS, checked, is_exported
from xded.exported import describe as describe_export
from xded.exported import tokenizer_of as tokenizer_of_export
from xded.models.checkpoints import checked_sha256_of, load
from xded.models.pretrained import begin_with, fitted, is_pretrained, open_pretrained, provenance
from xded.models.student import Student
from xded.models.weights import load_weights
from xded.models.whisper import whisper_recogniser
from xded.tokenizer import Tokenizer

LONGEST = 50  # tokens of one word or phrase, to which no Whisper model needs to be held


@dataclass
class Recogniser:
    """A loaded checkpoint. `name` is who it is (parent, teacher M08, student); `sha256` is of its file."""

    name: str
    student: Student
    tokenizer: Tokenizer
    config: Config
    provenance: tuple[Provenance, ...]
    path: Path
    sha256: str
    epoch: int


def describe(tokenizer: Tokenizer, config: Config, name: str, provenance: tuple[Provenance, ...]) -> dict[str, Any]:
    """The keys of a checkpoint that `load_recogniser` needs besides the weights."""
    return {
        "name": name,
        "config": config.model_dump(mode="json"),
        "tokenizer_model": torch.frombuffer(bytearray(tokenizer.model_bytes), dtype=torch.uint8),
        "tokenizer_kind": tokenizer.kind,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "vocabulary": tokenizer.size,
        "provenance": [
            {"what": p.what, "speakers": sorted(p.speakers), "takes": sorted(p.takes), "known": p.known}
            for p in provenance
        ],
    }


def tokenizer_of(payload: Mapping[str, Any], normaliser: str) -> Tokenizer:
    """The tokenizer that a checkpoint keeps; those written before there was another kind keep a SentencePiece model.

    Raises:
        KeyError: it keeps none.
        TokenizerError: it cannot be read.
    """
    model_bytes = payload["tokenizer_model"].numpy().tobytes()
    return Tokenizer.from_bytes(model_bytes, normaliser, payload.get("tokenizer_kind", "sentencepiece"))


def provenance_of(payload: Mapping[str, Any]) -> tuple[Provenance, ...]:
    """Who and what a checkpoint has heard."""
    return tuple(
        Provenance(p["what"], frozenset(p["speakers"]), frozenset(p["takes"]), p.get("known", True))
        for p in payload["provenance"]
    )


def resolve(path: Path) -> Path:
    """A checkpoint's path; a run folder stands for its best.pt."""
    return path / "best.pt" if path.is_dir() else path


def load_recogniser(path: Path, *, device: str = "cpu", language: str = "en") -> Recogniser:
    """Loads a checkpoint of this project, or a pretrained recogniser, ready to recognise.

    Args:
        path: checkpoint, run folder, export, `.nemo` archive, Hugging Face folder, or `hf:` and a model's name.
        device: where the weights go.
        language: that a Whisper model is told to write; no other model asks.

    Raises:
        CheckpointError: damaged, foreign, or its weights do not fit its own config (every name is listed).
    """
    if is_pretrained(path):
        return _pretrained(path, device, language)
    if is_exported(path):
        return _exported(path, device)
    path = resolve(path)
    payload = load(path)
    try:
        config = configs.build(payload["config"], f"the config in {path}")
        tokenizer = tokenizer_of(payload, config.tokenizer.normaliser)
        provenance = provenance_of(payload)
    except (KeyError, ConfigError) as error:
        raise CheckpointError(
            f"{path} was written by another version of xded: {error}.",
            "Train it again, or use the version that wrote it.",
        ) from error
    student = Student(config.model, tokenizer.size, config.features)
    load_weights(student, payload["model_state_dict"], path)
    return Recogniser(
        payload.get("name", path.stem),
        student.to(device).eval(),
        tokenizer,
        config,
        provenance,
        path,
        checked_sha256_of(path),
        int(payload.get("epoch", 0)),
    )


def _exported(path: Path, device: str) -> Recogniser:
    """What 'xded export' wrote, from its safetensors."""
    description = describe_export(path)
    tokenizer, config = tokenizer_of_export(path, description), description.as_config()
    student = Student(config.model, tokenizer.size, config.features)
    load_weights(student, safetensors.torch.load(checked(path, WEIGHTS, description)), path)
    if description.provenance is None:
        heard: tuple[Provenance, ...] = (Provenance(f"exported model {path.name}", frozenset(), known=False),)
    else:
        heard = tuple(
            Provenance(h.what, frozenset(h.speakers), frozenset(h.takes), h.known) for h in description.provenance
        )
    student = student.to(device).eval()
    return Recogniser(path.name, student, tokenizer, config, heard, path, description.source_sha256, 0)


def _pretrained(path: Path, device: str, language: str) -> Recogniser:
    """A pretrained model with its own head and tokenizer: what it recognises zero-shot.

    Raises:
        CheckpointError: it has no head of its own.
    """
    found = open_pretrained(path)
    tokenizer = found.own_tokenizer()
    if tokenizer is None or not found.recognises:
        raise CheckpointError(
            f"{path} is an encoder without a head and a tokenizer: by itself it recognises nothing.",
            f"Train with it: xded train --pretrained {path}.",
        )
    if found.whisper is not None:
        whisper = whisper_recogniser(found.whisper, tokenizer.size, language)
        longest = min(LONGEST, whisper.most_tokens)
        config = _zero_shot(path, tokenizer, {"mode": "decoder", "ctc_weight": 0.0, "max_length": longest}, layers=1)
        ends = (whisper.bos, whisper.eos) == (tokenizer.bos, tokenizer.eos)
        student = cast(Student, whisper)  # decoding asks the same of both
    else:
        config = _zero_shot(path, tokenizer, {"mode": "ctc", "ctc_weight": 1.0}, layers=0)
        student = Student(config.model, tokenizer.size, config.features)
        begin_with(student, found, tokenizer)
        ends = found.blank == tokenizer.blank
    if not ends:
        raise CheckpointError(
            f"{path}: its tokenizer and its head do not have the same special ids.", "Get the model again, whole."
        )
    student = student.to(device).eval()
    return Recogniser(path.stem, student, tokenizer, config, (provenance(path),), path, found.sha256, 0)


def _zero_shot(path: Path, tokenizer: Tokenizer, decode: dict[str, Any], layers: int) -> Config:
    return fitted(
        Config.model_validate(
            {
                "model": {"pretrained": path, "decoder_layers": layers},
                "objective": {"cross_entropy": 0.0},
                "tokenizer": {"normaliser": tokenizer.normaliser},
                "decode": decode,
            }
        )
    )


def pick_device(name: str) -> torch.device:
    """`auto`, `cpu`, `cuda`, `cuda:1` or `mps` as a torch device.

    Raises:
        ConfigError: this machine has no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"device '{name}' cannot be used here: {str(error).splitlines()[0]}.", "Use --device cpu, or --device auto."
        ) from error
    return device
