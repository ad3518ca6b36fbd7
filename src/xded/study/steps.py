"""Pieces of work with content hashes: what two attempts of a study have in common is one piece, done once.

A piece's key is a hash of everything its result depends on (settings, recordings with their audio's hashes, keys of
what it needs), never of where it lies or when it ran. Its folder is named after the key. Studies that are run in one
folder share their pieces, too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from xded.checks.training import trained_heads
from xded.config import Config, DecodeConfig, ObjectiveConfig, TargetConfig
from xded.corpus.folds import Split, make_fold
from xded.corpus.manifest import Corpus, Recording
from xded.models.pretrained import fitted, open_pretrained, tokenizer_at
from xded.study.folder import FORMAT
from xded.study.pieces import predictions_in
from xded.study.plan import DecodeName, Study
from xded.targets.store import audio_hash
from xded.teachers.adapt import parts_of
from xded.training.run import PATHS, flat

Kind = Literal["parent", "teacher", "soup", "posteriors", "targets", "attempt", "test"]
# on these no result depends, or something else in the key stands for them
PLACE_ONLY = PATHS | {
    f"{section}.{key}"
    for section in ("train", "teach.parent", "teach.teacher")
    for key in ("device", "threads", "loggers", "init", "guide")
}
KEY_CHARACTERS = 12  # of a folder's name


@dataclass(frozen=True)
class Step:
    """A piece of work: `work` may run in another process or on another machine that sees the same folders."""

    key: str
    kind: Kind
    title: str
    folder: Path
    needs: tuple[str, ...]
    work: Callable[[], object]


@dataclass(frozen=True)
class Cell:
    """An attempt in one fold with one seed: its run folder, where its predictions are, and its targets (or none), of
    which it reads some kinds."""

    attempt: str
    held_out: tuple[str, ...]
    seed: int
    key: str
    run: Path
    targets: Path | None = None
    kinds: tuple[str, ...] = ()

    def predictions(self, decode: DecodeName) -> Path:
        """Predictions of a decode mode."""
        return predictions_in(self.run, decode)


@dataclass(frozen=True)
class Baseline:
    """A recogniser that was there before the students, asked about a fold's test recordings."""

    system: str  # "parent", "teacher M05"
    held_out: tuple[str, ...]
    key: str
    folder: Path
    run: Path | None = None  # that made it; a pretrained model has none here

    def predictions(self, decode: DecodeName) -> Path:
        """Predictions of a decode mode."""
        return predictions_in(self.folder, decode)


@dataclass(frozen=True)
class Work:
    """All pieces of a study in an order that satisfies their needs, and where the results will be."""

    steps: tuple[Step, ...]
    cells: tuple[Cell, ...]
    baselines: tuple[Baseline, ...]
    folds: tuple[tuple[str, ...], ...]
    single_runs: int  # steps that there would be if every attempt of every fold and seed were run by itself
    words_heard: str = "unknown"  # whether training has heard the tested words: seen, mixed or unseen


def key_of(*parts: Any) -> str:
    """SHA-256 of JSON-able parts, and of the format of pieces."""
    return hashlib.sha256(json.dumps([FORMAT, *parts], sort_keys=True).encode()).hexdigest()


def settings(config: Config, *sections: str) -> dict[str, Any]:
    """Config values on which a result depends: all, or those of some sections; never paths or devices."""
    leaves = flat(config.model_dump(mode="json"))
    kept = {key: value for key, value in leaves.items() if key not in PLACE_ONLY}
    if config.model.pretrained is not None:
        kept["model.pretrained"] = open_pretrained(config.model.pretrained).sha256
    return {key: value for key, value in kept.items() if not sections or key.startswith(sections)}


def decodes_of(config: Config) -> dict[DecodeName, DecodeConfig]:
    """How the outputs of a run are decoded: as its config says, and with the listed words.

    Listed words are scored with both heads, but for a head that the objective never trains.
    """
    heads, weight = trained_heads(config.objective), config.decode.ctc_weight
    if "ctc" not in heads:
        weight = 0.0
    elif "decoder" not in heads:
        weight = 1.0
    listed = {"word_list": True, "ctc_weight": weight}
    return {
        "open": config.decode.model_copy(update={"word_list": False}),
        "word list": config.decode.model_copy(update=listed),
    }


def without_targets(config: Config) -> Config:
    """The config of a run without targets: what is said of them has no part in it."""
    objective, usual = config.objective, ObjectiveConfig()
    unused = ["ctc_kd", "decoder_kd", "word_kd", "text_kd", "temperature", "temperature_end", "blank_threshold"]
    if not objective.feature_kd:
        unused.append("kd_end")
    if not (objective.consistency or objective.word_consistency):
        unused.append("consistency_temperature")
    plain = objective.model_copy(update={name: getattr(usual, name) for name in unused})
    return config.model_copy(update={"objective": plain, "target": TargetConfig()})


class Pieces:
    """Collects pieces of work; one that is there already is not added again.

    Args:
        study, corpus: what and on what; out: the study's folder.
    """

    def __init__(self, study: Study, corpus: Corpus, out: Path) -> None:
        self.study, self.corpus, self.out = study, corpus, out.resolve()
        self.steps: dict[str, Step] = {}
        no_part = {"audio_filepath", "simulated_by"}  # of what a piece of work depends on
        self._heard = {r.recording: key_of(r.model_dump(mode="json", exclude=no_part), audio_hash(r))
                       for r in corpus.recordings}  # fmt: skip
        self.everyone = self.heard(corpus.recordings)
        self._splits: dict[str, Split] = {}

    def add(
        self, key: str, kind: Kind, title: str, folder: Path, needs: Sequence[str], work: Callable[[], object]
    ) -> str:
        """Adds a piece unless it is there."""
        self.steps.setdefault(key, Step(key, kind, title, folder, tuple(needs), work))
        return key

    def folder(self, kind: str, key: str) -> Path:
        """Folder of a piece."""
        return self.out / "pieces" / kind / key[:KEY_CHARACTERS]

    def heard(self, recordings: Iterable[Recording]) -> str:
        """What a result depends on of recordings: their order, their audio and all that the manifest says of them."""
        return hashlib.sha256("".join(self._heard[r.recording] for r in recordings).encode()).hexdigest()

    def fold_config(self, config: Config, held_out: Sequence[str], **changes: Any) -> Config:
        """The config in one fold."""
        fold = config.fold.model_copy(update={"held_out": tuple(held_out), **changes})
        return fitted(config.model_copy(update={"fold": fold, "corpus": self.corpus.path}))

    def split_of(self, config: Config) -> Split:
        """The three parts of a fold, made once."""
        key = config.fold.model_dump_json()
        if key not in self._splits:
            self._splits[key] = parts_of(self.corpus, make_fold(self.corpus, config.fold), config)
        return self._splits[key]

    def given_tokenizer(self, config: Config) -> str | None:
        """Hash of the tokenizer that the config names; one that is trained follows from settings and recordings."""
        path = config.tokenizer.path
        if path is None:
            return None
        return hashlib.sha256(tokenizer_at(path, config.tokenizer.normaliser).model_bytes).hexdigest()
