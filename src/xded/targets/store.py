"""Top-k posteriors on disk: safetensors shards and an index.json that says what they are and of which audio.

One folder holds one kind (`ctc` frames, `decoder` steps, or `words`: one distribution over listed words for each
recording) of one teacher, or the aggregate of several.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save

from xded.config import Aggregation, Asked
from xded.corpus.folds import Provenance
from xded.corpus.manifest import Recording
from xded.errors import XdedError
from xded.models.checkpoints import sha256_of

Kind = Literal["ctc", "decoder", "words"]
RECORDINGS_PER_SHARD = 4_096
FORMAT = 1


class TargetError(XdedError):
    """Posteriors or targets are missing, damaged, or of other audio, tokens or people."""


def audio_hash(recording: Recording) -> str:
    """SHA-256 of a recording's file: the manifest's, or computed where the manifest has none."""
    return recording.audio_sha256 or sha256_of(recording.audio_filepath)


@dataclass(frozen=True, slots=True)  # 14 teachers of 25,000 recordings: a third of a model's memory, half its time
class Entry:
    """One recording in the index."""

    __pydantic_config__ = ConfigDict(extra="forbid")
    recording: str
    audio_sha256: str
    steps: int  # T frames, U + 1 token steps, or 1 for a distribution over words
    weight: dict[str, float] = field(default_factory=dict)  # of each teacher that has a say, for an aggregate
    true_log_prob: float | None = None  # of the true text, a token (of the true word, for words), for one teacher
    text: str | None = None  # greedy CTC text of one teacher, or what the aggregate spells; none where not on record


class Index(BaseModel):
    """Everything about a store but the numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    format: int = FORMAT
    kind: Kind
    temperature: float
    top_k: int
    vocabulary: int
    frame_rate_hz: float | None  # None for decoder steps
    teacher_forced: bool  # decoder posteriors follow the true text: they are targets, never predictions
    tokenizer: str  # fingerprint
    teachers: tuple[str, ...]
    teacher_hashes: dict[str, str]  # SHA-256 of each teacher's checkpoint
    heard: str = "same_audio"
    aggregation: Aggregation | None = None
    weighting: str | None = None
    asked: Asked = "all"
    best: int | None = None
    spelled_only: bool = False  # recordings whose aggregate does not spell their text have no target, on purpose
    dropped: tuple[str, ...] = ()  # these recordings
    words: tuple[str, ...] = ()  # that ids stand for, with kind words
    provenance: tuple[Provenance, ...]  # what the teachers and their parent have heard
    recordings: tuple[Entry, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.spelled_only and "dropped" not in self.model_fields_set:
            raise ValueError("spelled_only, and it is not on record which recordings were dropped")
        return self

    @property
    def effective_teachers(self) -> float:
        """Mean over recordings of (sum w)^2 / sum w^2."""
        return _effective(self.recordings)

    def effective_by(self, group_of: Mapping[str, str]) -> dict[str, float]:
        """`effective_teachers` of each group of recordings (bands, speakers); recordings without a group are left out.

        Args:
            group_of: recording -> its group.
        """
        groups: dict[str, list[Entry]] = {}
        for entry in self.recordings:
            if entry.recording in group_of:
                groups.setdefault(group_of[entry.recording], []).append(entry)
        return {group: _effective(entries) for group, entries in sorted(groups.items())}


def _effective(entries: Iterable[Entry]) -> float:
    rows = [list(e.weight.values()) for e in entries if any(e.weight.values())]
    numbers = [sum(row) ** 2 / sum(w * w for w in row) for row in rows]
    return float(np.mean(numbers)) if numbers else 1.0


@dataclass
class Posterior:
    """One recording's distributions.

    ids: [T, k] int; probabilities: [T, k] float32; rest: [T] float32, mass beyond the k entries;
    least_blank: [T], smallest blank probability over the teachers (CTC only, else zeros).
    """

    ids: np.ndarray
    probabilities: np.ndarray
    rest: np.ndarray
    least_blank: np.ndarray


@dataclass
class StoreWriter:
    """Writes a store; nothing is visible until `close` has written the index."""

    folder: Path
    index: Index
    _entries: list[Entry] = field(default_factory=list)
    _dropped: list[str] = field(default_factory=list)
    # values one after the other: thousands of small arrays kept between large ones would hold on to gigabytes
    _pending: dict[str, bytearray] = field(default_factory=dict)
    _waiting: int = 0  # recordings
    _shards: int = 0

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "index.json").unlink(missing_ok=True)

    def add(self, entry: Entry, posterior: Posterior) -> None:
        """Appends one recording."""
        self._entries.append(entry)
        for name, kind in self._types.items():
            self._pending.setdefault(name, bytearray()).extend(getattr(posterior, name).astype(kind).tobytes())
        self._waiting += 1
        if self._waiting == RECORDINGS_PER_SHARD:
            self._flush()

    def drop(self, recording: str) -> None:
        """Notes that a recording has no target, on purpose."""
        self._dropped.append(recording)

    @property
    def _types(self) -> dict[str, type[np.generic]]:
        small = self.index.vocabulary <= np.iinfo(np.int16).max
        ids = np.int16 if small else np.int32
        return {"ids": ids, "probabilities": np.float16, "rest": np.float16, "least_blank": np.float16}

    def _flush(self) -> None:
        if not self._waiting:
            return
        shard = {name: np.frombuffer(self._pending[name], kind) for name, kind in self._types.items()}
        steps = len(shard["rest"])
        shard |= {name: shard[name].reshape(steps, -1) for name in ("ids", "probabilities")}
        # as bytes: a full disk is then an OSError, which safetensors' own writing hides
        (self.folder / f"shard_{self._shards:03d}.safetensors").write_bytes(save(shard))
        self._pending, self._waiting = {}, 0
        self._shards += 1

    def close(self) -> Index:
        """Writes the last shard, then the index (atomically)."""
        self._flush()
        rows = {"recordings": tuple(self._entries), "dropped": tuple(self._dropped)}
        index = self.index.model_copy(update=rows)
        temporary = self.folder / "index.json.tmp"
        temporary.write_text(index.model_dump_json(indent=None), encoding="utf-8")
        temporary.replace(self.folder / "index.json")
        return index


def read_index(folder: Path) -> Index:
    """The index of a store.

    Raises:
        TargetError: no finished store is there, or it was written by another version.
    """
    path = folder / "index.json"
    if not path.is_file():
        raise TargetError(f"{folder} holds no finished posteriors (no index.json).", "Make them with 'xded targets'.")
    try:
        return Index.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise TargetError(
            f"{path} is damaged or of another version: {place + ': ' if place else ''}{first['msg']} "
            f"({error.error_count()} problems).",
            f"Delete {folder} and make it anew with 'xded targets'.",
        ) from error


class Store:
    """Reads a store, a shard at a time or as a whole."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.index = folder, read_index(folder)
        self.dropped = frozenset(self.index.dropped)  # these learn from their text alone
        self._place = {entry.recording: i for i, entry in enumerate(self.index.recordings)}
        ends = np.cumsum([0, *(entry.steps for entry in self.index.recordings)])  # as if all shards were one
        self._shard_of = np.arange(len(ends)) // RECORDINGS_PER_SHARD
        self._start = ends - ends[self._shard_of * RECORDINGS_PER_SHARD]
        self._loaded: dict[int, Mapping[str, np.ndarray]] = {}

    def __contains__(self, recording: str) -> bool:
        """Whether there is a target."""
        return recording in self._place

    def entry(self, recording: str) -> Entry:
        """Index row of a recording."""
        if recording not in self._place:
            raise TargetError(
                f"{self.folder} holds nothing about recording '{recording}'.",
                "Make the targets anew from the corpus that you train on: 'xded targets'.",
            )
        return self.index.recordings[self._place[recording]]

    def _shard(self, number: int) -> Mapping[str, np.ndarray]:
        if number not in self._loaded:
            path = self._path(number)
            try:
                shard = load_file(path)
                found = len(shard["ids"])
            except (OSError, KeyError, SafetensorError) as error:
                raise self._damaged(path, str(error)) from error
            self._need_steps(number, found)
            self._loaded[number] = shard
        return self._loaded[number]

    def _path(self, number: int) -> Path:
        return self.folder / f"shard_{number:03d}.safetensors"

    def _need_steps(self, number: int, found: int) -> None:
        first = number * RECORDINGS_PER_SHARD
        wanted = sum(entry.steps for entry in self.index.recordings[first : first + RECORDINGS_PER_SHARD])
        if found != wanted:
            raise self._damaged(self._path(number), f"it has {found} steps, the index says {wanted}")

    def _damaged(self, path: Path, why: str) -> TargetError:
        return TargetError(
            f"{path} is damaged or missing: {why}.", f"Delete {self.folder} and make it anew with 'xded targets'."
        )

    def read(self, recording: str) -> Posterior:
        """Distributions of one recording, probabilities rescaled to sum to exactly 1 after 16-bit storage."""
        steps = self.entry(recording).steps
        place = self._place[recording]
        shard, rows = self._shard(int(self._shard_of[place])), slice(self._start[place], self._start[place] + steps)
        probabilities = shard["probabilities"][rows].astype(np.float32)
        rest = shard["rest"][rows].astype(np.float32)
        total = probabilities.sum(1) + rest
        return Posterior(
            ids=shard["ids"][rows].astype(np.int64),
            probabilities=probabilities / total[:, None],
            rest=rest / total,
            least_blank=shard["least_blank"][rows].astype(np.float32),
        )

    def as_stored(self, recordings: Iterable[str]) -> dict[str, Posterior]:
        """Distributions of some recordings as they lie on disk, not rescaled; nothing of their shards is kept."""
        by_shard: dict[int, list[str]] = {}
        for recording in recordings:
            self.entry(recording)
            by_shard.setdefault(int(self._shard_of[self._place[recording]]), []).append(recording)
        said: dict[str, Posterior] = {}
        for number, names in sorted(by_shard.items()):
            try:
                with safe_open(self._path(number), framework="numpy") as shard:
                    said |= self._slices(shard, number, names)
            except (OSError, SafetensorError) as error:
                raise self._damaged(self._path(number), str(error)) from error
        return said

    def _slices(self, shard: Any, number: int, names: Sequence[str]) -> dict[str, Posterior]:
        parts = {name: shard.get_slice(name) for name in ("ids", "probabilities", "rest", "least_blank")}
        shapes = [tuple(part.get_shape()) for part in parts.values()]
        fit = [len(shape) for shape in shapes] == [2, 2, 1, 1] and len({shape[0] for shape in shapes}) == 1
        if not fit or shapes[0] != shapes[1] or not shapes[0][1]:
            raise self._damaged(self._path(number), f"the shapes {shapes} of its arrays do not fit together")
        self._need_steps(number, shapes[0][0])
        said = {}
        for name in names:
            start = int(self._start[self._place[name]])
            rows = {part: values[start : start + self.entry(name).steps] for part, values in parts.items()}
            ids = rows.pop("ids").astype(np.int64)
            said[name] = Posterior(ids=ids, **{part: values.astype(np.float32) for part, values in rows.items()})
        return said
