"""The manifest: one JSON line per recording, readable by NeMo, checked before anything uses it."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from xded.errors import CorpusError

MANIFEST_NAME = "manifest.jsonl"
PROBLEMS_SHOWN = 5
REMEDY = "Mend these lines, or write the manifest again with 'xded corpus import' (see 'xded corpus import --help')."

Role = Literal["control", "target"]
Band = Literal["very_low", "low", "mid", "high"]
BANDS: tuple[str, ...] = get_args(Band)
Name = Annotated[str, StringConstraints(min_length=1, pattern=r"\S")]


class Recording(BaseModel):
    """One audio file: one microphone's copy of one take. Unknown keys of other tools' manifests are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    audio_filepath: Path = Field(description="absolute in memory; on disk relative when it lies below the manifest")
    duration: float = Field(gt=0, allow_inf_nan=False, description="seconds")
    text: Name = Field(description="what should be recognised")
    recording: Name = Field(description="unique id of the recording")
    speaker: Name
    take: Name = Field(description="id of the spoken realisation; microphone copies share it")
    prompt: Name = Field(description="id of what the speaker was asked to say")
    block: str | None = None
    mic: str | None = None
    role: Role = "target"
    band: Band | None = None
    word_type: str | None = None
    sample_rate: int | None = Field(None, gt=0, description="Hz, of the file")
    audio_sha256: str | None = Field(None, pattern=r"^[0-9a-f]{64}$", description="of the file's bytes")


@dataclass(frozen=True)
class Corpus:
    """A checked manifest and its recordings, in the order of the lines."""

    path: Path
    recordings: tuple[Recording, ...]

    @cached_property
    def _by_speaker(self) -> dict[str, Recording]:
        return {recording.speaker: recording for recording in self.recordings}

    @cached_property
    def speakers(self) -> tuple[str, ...]:
        """All speakers, sorted."""
        return tuple(sorted(self._by_speaker))

    @cached_property
    def texts(self) -> tuple[str, ...]:
        """All distinct texts, sorted."""
        return tuple(sorted({recording.text for recording in self.recordings}))

    def select(self, speakers: Iterable[str] | None = None, role: Role | None = None) -> tuple[Recording, ...]:
        """Recordings of the given speakers (all when None) with the given role (any when None), in corpus order.

        Raises:
            CorpusError: a speaker is not in the corpus.
        """
        wanted = set(self.speakers if speakers is None else speakers)
        self.require(wanted)
        return tuple(r for r in self.recordings if r.speaker in wanted and role in (None, r.role))

    def role_of(self, speaker: str) -> Role:
        """Role of one speaker."""
        self.require([speaker])
        return self._by_speaker[speaker].role

    def band_of(self, speaker: str) -> Band | None:
        """Intelligibility band of one speaker, where the corpus knows it."""
        self.require([speaker])
        return self._by_speaker[speaker].band

    def require(self, speakers: Iterable[str]) -> None:
        """Raises CorpusError, with the nearest names, when a speaker is not in the corpus."""
        require_speakers(speakers, self.speakers, str(self.path))


Kind = Literal["line", "audio", "id", "file", "speaker", "take"]


class Problem(NamedTuple):
    """Why a manifest is refused: a line that is no recording, lost audio, or what contradicts an earlier line."""

    line: int
    what: str
    kind: Kind


def require_speakers(given: Iterable[str], known: Sequence[str], where: str) -> None:
    """Raises CorpusError naming every given speaker that is not among the known ones, and the nearest known name."""
    unknown = sorted(set(given) - set(known))
    if not unknown:
        return
    hints = []
    for name in unknown:
        near = difflib.get_close_matches(name.casefold(), [speaker.casefold() for speaker in known], 1, cutoff=0.5)
        match = [speaker for speaker in known if near and speaker.casefold() == near[0]]
        hints.append(f"'{name}'" + (f" (did you mean '{match[0]}'?)" if match else ""))
    raise CorpusError(
        f"{where} has no speaker {', '.join(hints)}.",
        f"Its speakers are {', '.join(known)}; 'xded corpus describe' lists them.",
    )


def read_corpus(path: Path) -> Corpus:
    """Reads and validates a manifest.

    Args:
        path: the manifest, or a folder that holds `manifest.jsonl`.

    Raises:
        CorpusError: no such file, nothing in it, or wrong lines: the first few are named, the rest counted.
    """
    corpus, problems = read_all(path)
    _refuse(problems, corpus.path)
    return corpus


def read_all(path: Path) -> tuple[Corpus, list[Problem]]:
    """Reads every line of a manifest that can be read, and says what `read_corpus` would refuse.

    Returns:
        A corpus of all lines that are recordings, contradictory or without audio as they may be; and what is wrong.

    Raises:
        CorpusError: no such file, or nothing in it.
    """
    path = Path(path)
    if path.is_dir():
        path = path / MANIFEST_NAME
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise CorpusError(
            f"{path}: no manifest can be read ({error.strerror or error}).",
            "Check the path, or make a corpus with 'xded corpus import' or 'xded corpus synthesise'.",
        ) from error
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path} is not UTF-8 text ({error}).", "Save the manifest as UTF-8 JSON lines.") from error
    folder = absolute(path.parent)
    recordings: list[Recording] = []
    numbers: list[int] = []
    problems: list[Problem] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            recordings.append(_parse(line, folder))
            numbers.append(number)
        except ValueError as error:
            problems.append(Problem(number, str(error), "line"))
    if not recordings and not problems:
        raise CorpusError(f"{path} holds no recordings.", "Import a corpus again: 'xded corpus import --help'.")
    problems += [Problem(numbers[index], what, kind) for index, what, kind in _contradictions(recordings)]
    problems += [
        Problem(number, f"audio file not found: {recording.audio_filepath}", "audio")
        for number, recording in zip(numbers, recordings, strict=True)
        if not recording.audio_filepath.is_file()
    ]
    return Corpus(path, tuple(recordings)), problems


def write_manifest(path: Path, recordings: Iterable[Recording]) -> None:
    """Writes a manifest that `read_corpus` accepts, whole or not at all.

    Raises:
        CorpusError: no recordings, or recordings that contradict each other; nothing is written then.
    """
    path = Path(path)
    rows = list(recordings)
    if not rows:
        raise CorpusError(f"{path}: there is no recording to write.", "Check the folder that was imported.")
    _refuse([Problem(index + 1, what, kind) for index, what, kind in _contradictions(rows)], path)
    folder = absolute(path.parent)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    with temporary.open("w", encoding="utf-8") as file:
        for row in rows:
            audio = absolute(row.audio_filepath)
            audio = audio.relative_to(folder) if audio.is_relative_to(folder) else audio
            data = row.model_dump(mode="json", exclude_none=True) | {"audio_filepath": audio.as_posix()}
            file.write(json.dumps(data, ensure_ascii=False) + "\n")
    temporary.replace(path)


def absolute(path: Path) -> Path:
    """Absolute, without `..`, links kept: a corpus of links stays relative to its manifest."""
    return Path(os.path.abspath(path))  # noqa: PTH100


def _parse(line: str, folder: Path) -> Recording:
    """One line as a recording with an absolute path; ValueError says what is wrong with it."""
    recording = validate(load_object(line))
    return recording.model_copy(update={"audio_filepath": absolute(folder / recording.audio_filepath)})


def load_object(line: str) -> dict[str, Any]:
    """One line of JSON as an object; ValueError says what it is instead."""
    try:
        data: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno})") from error
    except RecursionError as error:
        raise ValueError("not a flat JSON object") from error
    if not isinstance(data, dict):
        raise ValueError(f"expected an object with keys audio_filepath, duration, text ..., found {data!r:.60}")
    return data


def validate(data: dict[str, Any]) -> Recording:
    """One object of a manifest as a recording, its path as it stands. ValueError names every wrong key."""
    try:
        return Recording.model_validate(data)
    except ValidationError as error:
        parts = []
        for item in error.errors():
            key = ".".join(str(part) for part in item["loc"])
            if item["type"] == "missing":
                parts.append(f"key '{key}' is missing")
            elif not str(item["input"]).strip():
                parts.append(f"'{key}' is empty")
            else:
                parts.append(f"'{key}' is {item['input']!r:.60}: {item['msg']}")
        raise ValueError("; ".join(parts)) from error


def _contradictions(recordings: Sequence[Recording]) -> list[tuple[int, str, Kind]]:
    """Rules that hold between recordings: (index of the later recording, what is wrong, its kind)."""
    problems: list[tuple[int, str, Kind]] = []
    ids: dict[str, int] = {}
    files: dict[Path, str] = {}
    speakers: dict[str, Recording] = {}
    takes: dict[str, Recording] = {}
    for index, row in enumerate(recordings):
        if ids.setdefault(row.recording, index) != index:
            problems.append((index, f"recording id '{row.recording}' is used twice; ids must be unique", "id"))
        if files.setdefault(row.audio_filepath, row.recording) != row.recording:
            other = files[row.audio_filepath]
            shared = f"recordings '{other}' and '{row.recording}' share the file {row.audio_filepath}"
            problems.append((index, shared, "file"))
        first = speakers.setdefault(row.speaker, row)
        if first.role != row.role:
            problems.append((index, f"speaker '{row.speaker}' has two roles, {first.role} and {row.role}", "speaker"))
        if first.band != row.band:
            problems.append((index, f"speaker '{row.speaker}' has two bands, {first.band} and {row.band}", "speaker"))
        spoken = takes.setdefault(row.take, row)
        if (spoken.speaker, spoken.prompt, spoken.text) != (row.speaker, row.prompt, row.text):
            problems.append(
                (index, f"take '{row.take}' has two speakers, prompts or texts ('{spoken.recording}' differs); "
                        "only microphone copies of one spoken word may share a take", "take")
            )  # fmt: skip
    return problems


def _refuse(problems: Sequence[Problem], path: Path) -> None:
    """Raises CorpusError for the first few problems and the count of the rest."""
    if not problems:
        return
    shown = [f"line {problem.line}: {problem.what}" for problem in sorted(problems)[:PROBLEMS_SHOWN]]
    rest = len(problems) - len(shown)
    more = f"; and {rest} more problems" if rest else ""
    raise CorpusError(f"{path}: " + "; ".join(shown) + more + ".", REMEDY)
