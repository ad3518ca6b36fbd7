"""Evaluation files of several makes, ours and other people's, read into one form. Imports no torch.

Known: `predictions.jsonl` and `scores.json` of `xded evaluate`; JSON files that hold one object with a list
`predictions` (utterance_id, target, prediction or prediction_text, prediction_tokens) or `details` (id or audio_path,
reference, prediction); SpeechBrain's `wer_*.txt`. Files are taken for untrusted: whatever else they hold is an error.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path, PureWindowsPath
from typing import Any, Final, Literal

import numpy as np
from pydantic import AliasChoices, BaseModel, Field, StrictInt, TypeAdapter, ValidationError
from scipy.stats import binomtest

from xded.corpus.uaspeech import NAME
from xded.errors import ScoringError
from xded.scoring import Prediction, Scores, read_predictions

Source = Literal["predictions", "scores", "student", "zero-shot", "averaging", "ensemble", "speechbrain"]
MAX_BYTES: Final = 512 * 2**20  # 25,000 recordings take 20 MB; a file beyond this is something else
HEAD_BYTES: Final = 65_536
EXPECTED: Final = (
    "expected predictions.jsonl or scores.json of 'xded evaluate', a JSON object with a list 'predictions' or "
    "'details', or a SpeechBrain wer_*.txt"
)
REMEDY: Final = "Give another file, or evaluate again."
AUDIO: Final = (".wav", ".flac")
PREDICTIONS, SCORES = "predictions.jsonl", "scores.json"
UTTERANCE = re.compile(r"^(?P<id>\S+), %WER [\d.]+ \[")
SUMMARY = re.compile(r"^%(?P<name>WER|SER) +(?P<value>[\d.]+) +\[")
SCORED = re.compile(r"^Scored (?P<count>\d+) sentences", re.MULTILINE)


@dataclass(frozen=True)
class Item:
    """What one recording was heard as.

    Attributes:
        take: microphone copies share it.
        speaker: empty where the file does not say.
        hypothesis: none where the file holds no text for the output.
        tokens: ids as stored; none where the file holds none.
    """

    recording: str
    take: str
    speaker: str
    reference: str
    hypothesis: str | None
    tokens: tuple[int, ...] | None = None
    mic: str | None = None
    seed: int = 0


@dataclass(frozen=True)
class Evaluation:
    """One evaluation file.

    Attributes:
        path: the file with the outputs (of scores.json: the predictions beside it, where they are).
        items: the outputs; empty for a scores.json without its predictions.
        reported: what the file says of itself, in per cent: `wra`, `wer`, `cer`, `ser`, `accuracy`.
        sha256: of the file's bytes.
        stated_offset: what the file says was taken away from token ids before they were decoded.
        stated_speaker: the tested speaker that the file names.
        stated_count: how many outputs the file says it holds.
        conditions, scores: of a scores.json of ours.
    """

    path: Path
    source: Source
    items: tuple[Item, ...]
    reported: Mapping[str, float]
    sha256: str
    stated_offset: int | None = None
    stated_speaker: str | None = None
    stated_count: int | None = None
    tokenizer_path: str | None = None
    checkpoint: str | None = None
    epoch: int | None = None
    val_loss: float | None = None
    conditions: Mapping[str, str] = field(default_factory=dict)
    scores: Scores | None = None

    @property
    def takes(self) -> tuple[str, ...]:
        """Distinct takes, in order of appearance."""
        return tuple(dict.fromkeys(item.take for item in self.items))

    @property
    def speakers(self) -> tuple[str, ...]:
        """Distinct speakers as far as the file says."""
        return tuple(sorted({item.speaker for item in self.items} - {""}))

    @property
    def references(self) -> tuple[str, ...]:
        """Distinct references, sorted."""
        return tuple(sorted({item.reference for item in self.items}))

    @property
    def normaliser(self) -> str:
        """Of our own scores; elsewhere only case is ignored."""
        return self.conditions.get("normaliser", "upper")

    @property
    def texts(self) -> tuple[str, ...] | None:
        """The stored outputs; none where the file holds ids only."""
        if not self.items or all(item.hypothesis is None for item in self.items):
            return None
        return tuple(item.hypothesis or "" for item in self.items)

    @property
    def reported_wra(self) -> float | None:
        """Per cent; none where the file reports none, or none that is a number."""
        value = self.reported.get("wra", math.nan)
        return value if math.isfinite(value) else None

    @property
    def has_tokens(self) -> bool:
        """Whether ids are stored (not all outputs empty)."""
        return any(item.tokens for item in self.items)

    def predictions(self, texts: Sequence[str] | None = None) -> list[Prediction]:
        """The outputs as `xded.scoring` takes them, with `texts` in the place of the stored ones."""
        hypotheses = texts if texts is not None else [item.hypothesis or "" for item in self.items]
        return [
            Prediction(
                recording=item.recording, take=item.take, speaker=item.speaker or "unknown", band=None, word_type=None,
                prompt=item.reference, reference=item.reference, hypothesis=text, tokens=item.tokens or (),
                seed=item.seed,
            )
            for item, text in zip(self.items, hypotheses, strict=True)
        ]  # fmt: skip

    def by_take(self, values: Sequence[float] | np.ndarray) -> np.ndarray:
        """Mean of a value over the outputs of each take, in the order of `takes`."""
        return np.bincount(self._take_numbers, np.asarray(values, float)) / np.bincount(self._take_numbers)

    @cached_property
    def _take_numbers(self) -> np.ndarray:
        place = {take: i for i, take in enumerate(self.takes)}
        return np.array([place[item.take] for item in self.items])

    def gain(self, before: Sequence[float] | np.ndarray, after: Sequence[float] | np.ndarray) -> tuple[int, int, float]:
        """Takes that get better and worse from `before` to `after`, and the one-sided p-value of a sign test.

        Takes are what is independent: 7 microphones that hear one take gain or lose together.
        """
        difference = self.by_take(after) - self.by_take(before)
        better, worse = int((difference > 0).sum()), int((difference < 0).sum())
        if better + worse == 0:
            return 0, 0, 1.0
        return better, worse, float(binomtest(better, better + worse, alternative="greater").pvalue)


def recognise(path: Path) -> str | None:
    """What kind of evaluation a file is, from its first bytes; none: no evaluation file."""
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES).decode("utf-8", errors="replace").lstrip()
    except OSError:
        return None
    if head.startswith("%WER"):
        return "speechbrain"
    if '"conditions"' in head and '"overall"' in head:
        return "scores"
    if head.startswith("{") and re.search(r'"(predictions|details)"\s*:\s*\[', head):
        return "evaluation"
    fields = all(f'"{name}"' in head for name in ("recording", "reference", "hypothesis"))
    return "predictions" if fields or path.name.endswith(PREDICTIONS) else None


def read_evaluation(path: Path) -> Evaluation:
    """Reads an evaluation file.

    Raises:
        ScoringError: a file that is missing, too large, damaged or of another shape, saying what was expected.
    """
    kind = recognise(path)
    if kind == "predictions":
        return _own(path)
    if kind == "scores":
        return _own_scores(path)
    data = _bytes(path)
    if kind == "speechbrain":
        return _speechbrain(path, data)
    if kind == "evaluation":
        return _foreign(path, data)
    raise ScoringError(f"{path} is no evaluation: {EXPECTED}.", REMEDY)


def with_takes(evaluation: Evaluation, take_of: Mapping[str, str], speaker_of: Mapping[str, str]) -> Evaluation:
    """The evaluation with the takes (and where it names none, the speakers) that a corpus gives its recordings."""
    items = tuple(
        replace(
            item,
            take=take_of.get(item.recording, item.take),
            speaker=item.speaker or speaker_of.get(item.recording, ""),
        )
        for item in evaluation.items
    )
    return evaluation if items == evaluation.items else replace(evaluation, items=items)


def _bytes(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ScoringError(f"{path} is larger than {MAX_BYTES // 2**20} MiB: no evaluation.", REMEDY)
        return path.read_bytes()
    except OSError as error:
        raise ScoringError(f"{path} cannot be read ({error.strerror}).", "Check the path.") from error


# --- ours ---------------------------------------------------------------------------------------------------


def _own(path: Path) -> Evaluation:
    """predictions.jsonl, with the scores beside it."""
    data = _bytes(path)
    items = tuple(
        Item(
            recording=p.recording, take=p.take, speaker=p.speaker, reference=p.reference, hypothesis=p.hypothesis,
            tokens=p.tokens, seed=p.seed,
        )
        for p in read_predictions(path)
    )  # fmt: skip
    if not items:
        raise ScoringError(f"{path} holds no predictions.", "Evaluate again.")
    evaluation = Evaluation(path, "predictions", items, {}, hashlib.sha256(data).hexdigest())
    beside = path.with_name(SCORES if path.name == PREDICTIONS else path.name.removesuffix("." + PREDICTIONS) + ".json")
    if beside == path or not beside.is_file() or recognise(beside) != "scores":
        return evaluation
    return _with_scores(evaluation, Scores.from_json(_bytes(beside).decode("utf-8", "replace"), str(beside)))


def _own_scores(path: Path) -> Evaluation:
    """scores.json: its predictions when they lie beside it, else only what it says."""
    beside = path.with_name(PREDICTIONS if path.name == SCORES else f"{path.stem}.{PREDICTIONS}")
    if beside.is_file():
        return _own(beside)
    data = _bytes(path)
    scores = Scores.from_json(data.decode("utf-8", "replace"), str(path))
    return _with_scores(Evaluation(path, "scores", (), {}, hashlib.sha256(data).hexdigest()), scores)


def _with_scores(evaluation: Evaluation, scores: Scores) -> Evaluation:
    whole = scores.overall
    reported = {
        "wra": whole.wra_percent.value,
        "wer": whole.wer_percent.value,
        "cer": whole.cer_percent.value,
    }
    return replace(
        evaluation,
        reported=reported,
        stated_count=whole.predictions,
        conditions=scores.conditions,
        scores=scores,
    )


# --- other people's -----------------------------------------------------------------------------------------


class _Row(BaseModel):
    name: str | int = Field(validation_alias=AliasChoices("utterance_id", "id", "recording", "audio_path"))
    audio_path: str = ""
    reference: str = Field(validation_alias=AliasChoices("target", "reference"))
    hypothesis: Any = Field(None, validation_alias=AliasChoices("prediction_text", "prediction", "hypothesis"))
    tokens: tuple[StrictInt, ...] | None = Field(None, validation_alias=AliasChoices("prediction_tokens", "tokens"))


class _TokenizerNote(BaseModel):
    path: str | None = None
    vocab_offset: StrictInt | None = None


class _Metric(BaseModel):
    value: float | None = None


class _File(BaseModel):
    rows: list[_Row] = Field(validation_alias=AliasChoices("predictions", "details"))
    checkpoint: str | None = Field(None, validation_alias=AliasChoices("checkpoint", "model"))
    epoch: int | None = None
    val_loss: float | None = None
    tokenizer: _TokenizerNote | str | None = None
    wra: _Metric | float | None = None
    wer: _Metric | float | None = None
    accuracy: float | None = None
    speaker: str | None = Field(None, validation_alias=AliasChoices("held_out", "speaker_id"))
    count: int | None = Field(None, validation_alias=AliasChoices("num_samples", "num_utterances", "num_utts"))
    agg: str | None = None


def _foreign(path: Path, data: bytes) -> Evaluation:
    """One JSON object with a list of outputs."""
    try:
        raw = json.loads(data)
        file = TypeAdapter(_File).validate_python(raw)
    except ValidationError as error:
        raise ScoringError(f"{path} is no evaluation that can be read: {_first(error)}.", REMEDY) from error
    except RecursionError as error:
        raise ScoringError(f"{path} is nested too deeply: {EXPECTED}.", REMEDY) from error
    except ValueError as error:
        raise ScoringError(f"{path} is damaged JSON ({error}).", "Fetch the file again, or evaluate again.") from error
    if not file.rows:
        raise ScoringError(f"{path} holds no outputs.", REMEDY)
    averaging = "details" in raw
    ids = any(row.tokens is not None for row in file.rows)
    source: Source = ("ensemble" if file.agg else "averaging") if averaging else ("student" if ids else "zero-shot")
    note = file.tokenizer if isinstance(file.tokenizer, _TokenizerNote) else _TokenizerNote(path=file.tokenizer)
    return Evaluation(
        path=path,
        source=source,
        items=tuple(_items(file.rows, file.speaker or "")),
        reported=_reported(file),
        sha256=hashlib.sha256(data).hexdigest(),
        stated_offset=note.vocab_offset,
        stated_speaker=file.speaker,
        stated_count=file.count,
        tokenizer_path=note.path,
        checkpoint=file.checkpoint,
        epoch=file.epoch,
        val_loss=file.val_loss,
    )


def _reported(file: _File) -> dict[str, float]:
    """Metrics in per cent: objects hold shares of 1, bare numbers per cent."""
    reported: dict[str, float] = {}
    for name in ("wra", "wer", "accuracy"):
        metric = getattr(file, name)
        if isinstance(metric, _Metric) and metric.value is not None:
            reported[name] = 100 * metric.value
        elif isinstance(metric, float):
            reported[name] = metric
    return reported


def _items(rows: Sequence[_Row], speaker: str) -> Iterator[Item]:
    """Outputs; a text without any letter beside ids (a list of the ids, or nothing) is no text."""
    texts = [row.hypothesis if isinstance(row.hypothesis, str) else None for row in rows]
    with_ids = [text for row, text in zip(rows, texts, strict=True) if row.tokens]
    spoken = sum(any(c.isalpha() for c in text or "") for text in with_ids)
    letters = any(c.isalpha() for row in rows for c in row.reference)
    if with_ids and letters and 2 * spoken < len(with_ids):
        texts = [None] * len(rows)
    for row, text in zip(rows, texts, strict=True):
        yield _item((str(row.name), row.audio_path), row.reference, text, row.tokens, speaker)


def _item(
    names: Sequence[str], reference: str, hypothesis: str | None, tokens: tuple[int, ...] | None, speaker: str = ""
) -> Item:
    """An output, whose take, speaker and microphone are in its name where one of its names is UASpeech's."""
    for name in names:
        stem = PureWindowsPath(name).stem if name.lower().endswith(AUDIO) else name
        match = NAME.fullmatch(stem)
        if match is not None:
            return Item(stem, take_of(stem) or stem, match["speaker"], reference, hypothesis, tokens, match["mic"])
    return Item(names[0], names[0], speaker, reference, hypothesis, tokens)


def take_of(recording: str) -> str | None:
    """The take that a UASpeech name tells; none for other names."""
    match = NAME.fullmatch(recording)
    return recording.removesuffix(f"_{match['mic']}") if match else None


def _speechbrain(path: Path, data: bytes) -> Evaluation:
    """SpeechBrain's WER report: a summary, then an id and three lines of alignment for each utterance."""
    lines = data.decode("utf-8", errors="replace").splitlines()
    reported = {m["name"].lower(): float(m["value"]) for line in lines[:5] if (m := SUMMARY.match(line))}
    items: list[Item] = []
    for number, line in enumerate(lines):
        match = UTTERANCE.match(line)
        if match is None:
            continue
        if number + 3 >= len(lines):
            raise ScoringError(f"{path} ends in the middle of '{match['id']}'.", "Fetch the file again.")
        reference, hypothesis = _aligned(lines[number + 1]), _aligned(lines[number + 3])
        items.append(_item((match["id"],), reference, hypothesis, None))
    if not items:
        raise ScoringError(f"{path} holds no alignments: {EXPECTED}.", REMEDY)
    scored = SCORED.search("\n".join(lines[:5]))
    count = int(scored["count"]) if scored else None
    return Evaluation(path, "speechbrain", tuple(items), reported, hashlib.sha256(data).hexdigest(), stated_count=count)


def _aligned(line: str) -> str:
    """The text of a row of an alignment."""
    return " ".join(word for word in (part.strip() for part in line.split(";")) if word != "<eps>")


def _first(error: ValidationError) -> str:
    """The first problem that pydantic found, where, and what was expected there."""
    item = error.errors()[0]
    place = ".".join(str(part) for part in item["loc"])
    return f"'{place}': {item['msg'][:200]}; {EXPECTED}"
