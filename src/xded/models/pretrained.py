"""Encoders that someone else has trained: `.nemo` archives and Hugging Face folders, and what a run takes from them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xded.config import SIZES, Config, FeatureConfig, ModelConfig
from xded.corpus.folds import Provenance
from xded.errors import CheckpointError, TokenizerError
from xded.models.hugging_face_folder import HuggingFaceModel, read_folder
from xded.models.nemo import read_archive
from xded.models.student import Student
from xded.models.weights import load_weights
from xded.tokenizer import NORMALISERS, Tokenizer

HUB = "hf:"  # before the name of a model of the Hugging Face hub
NEVER_SAID = -1e4  # bias of rows that an own head does not have: <s> and </s>, which CTC never writes


@dataclass(frozen=True)
class Pretrained:
    """What an archive or folder holds.

    Attributes:
        path, sha256: of the archive, or over the folder's files.
        model, features: what `config.ModelConfig` and `config.FeatureConfig` must say of its encoder and front end.
        encoder: weights, by the names of `models.student.Student.encoder`.
        ctc_head: its own CTC head, `weight` [V, D] and `bias` [V], or None.
        tokenizer: its own tokenizer's bytes and their kind (`Tokenizer.from_bytes`), or None.
        blank: id of the blank of its own CTC head, or None.
        whisper: the whole of a Whisper model, whose decoder is used zero-shot alone; else None.
    """

    path: Path
    sha256: str
    model: Mapping[str, Any]
    features: Mapping[str, Any]
    encoder: Mapping[str, Tensor]
    ctc_head: Mapping[str, Tensor] | None
    tokenizer: tuple[bytes, str] | None
    blank: int | None = None
    whisper: HuggingFaceModel | None = None

    def own_tokenizer(self, normaliser: str | None = None) -> Tokenizer | None:
        """The tokenizer that it was trained with; without a normaliser, in the case of its pieces, punctuation dropped.

        Punctuation is dropped because written out or not, it is not heard.
        """
        if self.tokenizer is None:
            return None
        model_bytes, kind = self.tokenizer
        if normaliser is None:
            pieces = Tokenizer.from_bytes(model_bytes, NORMALISERS[0], kind).pieces
            lower = sum(c.islower() for piece in pieces for c in piece)
            upper = sum(c.isupper() for piece in pieces for c in piece)
            normaliser = f"{'lower' if lower > upper else 'upper'}_no_punctuation"
        return Tokenizer.from_bytes(model_bytes, normaliser, kind)

    @property
    def recognises(self) -> bool:
        """Whether it has a head and a tokenizer, and is more than an encoder."""
        return self.tokenizer is not None and (self.ctc_head is not None or self.whisper is not None)


def provenance(path: Path) -> Provenance:
    """What a pretrained encoder has heard: whom is not on record."""
    return Provenance(f"pretrained encoder {path.name}", frozenset(), known=False)


def is_pretrained(path: Path) -> bool:
    """Whether a path means an archive or folder of someone else's, and not a run of this project."""
    if str(path).startswith(HUB) or path.suffix == ".nemo":
        return True
    hears = ("preprocessor_config.json", "processor_config.json")  # older and newer versions of the library
    return (path / "config.json").is_file() and any((path / name).is_file() for name in hears)


def open_pretrained(path: Path) -> Pretrained:
    """Reads an archive or a folder; the last two are kept until their files change.

    Raises:
        CheckpointError: it is missing, damaged, hostile, or of an architecture that is not supported.
    """
    files = sorted(path.glob("*")) if path.is_dir() else [path]
    stats = [file.stat() for file in files if file.is_file()]
    return _open(path, tuple((stat.st_mtime_ns, stat.st_size) for stat in stats))


@lru_cache(maxsize=2)
def _open(path: Path, stamps: tuple[tuple[int, int], ...]) -> Pretrained:
    if path.suffix == ".nemo":
        archive = read_archive(path)
        model = archive.tokenizer_model  # none: it writes characters, which are its vocabulary
        pieces = json.dumps(list(archive.vocabulary)).encode()
        tokenizer = (pieces, "pieces") if model is None else (model, "sentencepiece")
        return Pretrained(
            path, archive.sha256, archive.model, archive.features, archive.encoder, archive.ctc_head, tokenizer,
            len(archive.vocabulary),
        )  # fmt: skip
    archives = sorted(path.glob("*.nemo"))
    if not is_pretrained(path) and archives:
        raise CheckpointError(f"{path} is a folder.", f"Give the archive in it: {archives[0]}.")
    if not is_pretrained(path):
        raise CheckpointError(
            f"{path} is no pretrained encoder: neither a .nemo archive nor a folder with config.json and "
            "preprocessor_config.json.",
            "Give one of the two, or the name of a model of the Hugging Face hub as 'hf:org/name'.",
        )
    folder = read_folder(Path(str(path).removeprefix(HUB)))
    settings = {"encoder": folder.encoder_settings, "front_end": folder.front_end_settings}
    return Pretrained(
        path, folder.sha256, {"hugging_face": settings}, {"sample_rate": folder.sample_rate},
        folder.encoder, folder.ctc_head, folder.tokenizer, folder.blank, folder if folder.seq2seq else None,
    )  # fmt: skip


def tokenizer_at(path: Path, normaliser: str) -> Tokenizer:
    """A tokenizer file's tokenizer, or that of a pretrained recogniser.

    Raises:
        TokenizerError: there is none, or it cannot be read.
    """
    if not is_pretrained(path):
        return Tokenizer.load(path, normaliser)
    own = open_pretrained(path).own_tokenizer(normaliser)
    if own is None:
        raise TokenizerError(f"{path} has no tokenizer.", "Give a tokenizer file, or leave out --tokenizer.")
    return own


def fitted(config: Config) -> Config:
    """The config with the encoder's sizes and the features of `model.pretrained`; the decoder's sizes stay its own.

    Raises:
        CheckpointError: see `open_pretrained`.
    """
    path = config.model.pretrained
    if path is None:
        return config
    found = open_pretrained(path)
    model = _sizes(config.model, found.model)
    features = config.features.model_dump() | dict(found.features)
    return config.model_copy(update={"model": model, "features": FeatureConfig.model_validate(features)})


def _sizes(config: ModelConfig, found: Mapping[str, Any]) -> ModelConfig:
    """The model's config around a pretrained encoder.

    An encoder of a named size gets that size's decoder, but for what the config says otherwise.
    """
    own = config.model_dump()
    alike = [size for size in SIZES.values() if all(found.get(key) == size[key] for key in size if key in found)]
    if alike and "width" in found:
        named = SIZES.get(config.size or "", {})
        own |= {key: alike[0][key] for key in alike[0] if own[key] == named.get(key)}
    return ModelConfig.model_validate(own | dict(found) | {"size": None})


def begin_with(student: Student, found: Pretrained, tokenizer: Tokenizer) -> dict[str, Tensor]:
    """Loads every weight of the encoder, and its own CTC head when the run has its tokenizer and its blank.

    Returns:
        What was loaded, by the student's names.

    Raises:
        CheckpointError: the weights do not fit the student; every name is listed, and nothing was loaded.
    """
    load_weights(student.encoder, found.encoder, found.path)
    loaded = {f"encoder.{name}": value for name, value in found.encoder.items()}
    own = found.own_tokenizer(tokenizer.normaliser)
    alike = own is not None and own.fingerprint == tokenizer.fingerprint and own.blank == found.blank
    if found.ctc_head is not None and alike:
        head = _padded(found.ctc_head, student.vocabulary, found.path)
        load_weights(student.ctc_head, head, found.path)
        loaded |= {f"ctc_head.{name}": value for name, value in head.items()}
    return loaded


def _padded(head: Mapping[str, Tensor], rows: int, path: Path) -> dict[str, Tensor]:
    """A CTC head with rows for special tokens that it was trained without.

    Raises:
        CheckpointError: it has rows that no token stands for.
    """
    missing = rows - len(head["bias"])
    if missing < 0:
        raise CheckpointError(
            f"{path}: its CTC head has {len(head['bias'])} rows, and its tokenizer only {rows} pieces.",
            "Give --tokenizer another file: the head is then left out.",
        )
    weight = torch.nn.functional.pad(head["weight"], (0, 0, 0, missing))
    return {"weight": weight, "bias": torch.nn.functional.pad(head["bias"], (0, missing), value=NEVER_SAID)}
