"""A recogniser as it is kept and passed on: weights, tokenizer, config, and what it has heard."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from xded import config as configs
from xded.config import Config
from xded.corpus.folds import Provenance
from xded.errors import CheckpointError, ConfigError
from xded.models.checkpoints import load, sha256_of
from xded.models.student import Student
from xded.tokenizer import Tokenizer


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
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "vocabulary": tokenizer.size,
        "provenance": [{"what": p.what, "speakers": sorted(p.speakers), "takes": sorted(p.takes)} for p in provenance],
    }


def provenance_of(payload: Mapping[str, Any]) -> tuple[Provenance, ...]:
    """Who and what a checkpoint has heard."""
    return tuple(Provenance(p["what"], frozenset(p["speakers"]), frozenset(p["takes"])) for p in payload["provenance"])


def resolve(path: Path) -> Path:
    """A checkpoint's path; a run folder stands for its best.pt."""
    return path / "best.pt" if path.is_dir() else path


def load_recogniser(path: Path, *, device: str = "cpu") -> Recogniser:
    """Loads a checkpoint of this project, ready to recognise.

    Raises:
        CheckpointError: damaged, foreign, or its weights do not fit its own config (every name is listed).
    """
    path = resolve(path)
    payload = load(path)
    try:
        config = configs.build(payload["config"], f"the config in {path}")
        tokenizer = Tokenizer.from_bytes(payload["tokenizer_model"].numpy().tobytes(), config.tokenizer.normaliser)
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
        sha256_of(path),
        int(payload.get("epoch", 0)),
    )


def load_weights(student: Student, weights: Mapping[str, torch.Tensor], path: Path) -> None:
    """Loads every weight or none.

    Raises:
        CheckpointError: listing the missing, unexpected and misshapen weights.
    """
    own = student.state_dict()
    missing, unexpected = sorted(set(own) - set(weights)), sorted(set(weights) - set(own))
    misshapen = [
        f"{name} {tuple(weights[name].shape)} for {tuple(own[name].shape)}"
        for name in sorted(set(own) & set(weights))
        if own[name].shape != weights[name].shape
    ]
    if missing or unexpected or misshapen:
        lists = (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen))
        problems = "; ".join(f"{kind}: {', '.join(names[:5])} ({len(names)})" for kind, names in lists if names)
        raise CheckpointError(
            f"{path} does not fit this model: {problems}.",
            "Give the model the size in the checkpoint's config, or leave out --init.",
        )
    student.load_state_dict(dict(weights))


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
