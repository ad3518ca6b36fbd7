"""The manifest: one JSON line per recording, readable by NeMo, checked before anything uses it."""

from __future__ import annotations

import difflib
import gc
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    ValidationInfo,
)

from xded.errors import CorpusError

MANIFEST_NAME = "manifest.jsonl"
PROBLEMS_SHOWN = 5
REMEDY = "Mend these lines, or write the manifest again with 'xded corpus import' (see 'xded corpus import --help')."

Role = Literal["control", "target"]
Band = Literal["very_low", "low", "mid", "high"]
BANDS: tuple[str, ...] = get_args(Band)
Name = Annotated[str, StringConstraints(min_length=1, pattern=r"\S")]


def _names_a_folder(speaker: str) -> str:
    """A speaker's id, which is the name of the teacher's folder: no path out of where it belongs."""
    if speaker.startswith(".") or not {"/", "\\", "\0"}.isdisjoint(speaker):
        raise ValueError("it names folders: no / and no \\ in it, no . at its start")
    return speaker


def _from_folder(path: object, info: ValidationInfo) -> object:
    """A path of a manifest in the folder that is the context of the validation; as it stands without one."""
    if info.context is None or not isinstance(path, str):
        return path
    return os.path.abspath(os.path.join(info.context, path))  # noqa: PTH100, PTH118 - text until it is right


class Recording(BaseModel):
    """One audio file: one microphone's copy of one take. Unknown keys of other tools' manifests are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    audio_filepath: Annotated[Path, BeforeValidator(_from_folder)] = Field(
        description="absolute in memory; on disk relative when it lies below the manifest"
    )
    duration: float = Field(gt=0, allow_inf_nan=False, description="seconds")
    text: Name = Field(description="what should be recognised")
    recording: Name = Field(description="unique id of the recording")
    speaker: Annotated[Name, AfterValidator(_names_a_folder)]
    take: Name = Field(description="id of the spoken realisation; microphone copies share it")
    prompt: Name = Field(description="id of what the speaker was asked to say")
    block: str | None = None
    mic: str | None = None
    role: Role = "target"
    band: Band | None = None
    word_type: str | None = None
    simulated_by: str | None = Field(None, description="what of ours made or changed the audio: synthesiser, simulator")
    sample_rate: int | None = Field(None, gt=0, description="Hz, of the file")
    audio_sha256: str | None = Field(None, pattern=r"^[0-9a-f]{64}$", description="of the file's bytes")


@dataclass(frozen=True)
class Corpus:
    """A checked manifest and its recordings, in the order of the lines."""

    path: Path
    recordings: tuple[Recording, ...]

    @cached_property
    def _by_speaker(self) -> dict[str, list[Recording]]:
        return by_speaker(self.recordings)

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
        rows = self._by_speaker[min(wanted)] if len(wanted) == 1 else self.recordings  # often asked speaker by speaker
        return tuple(r for r in rows if r.speaker in wanted and role in (None, r.role))

    def role_of(self, speaker: str) -> Role:
        """Role of one speaker."""
        self.require([speaker])
        return self._by_speaker[speaker][-1].role

    def band_of(self, speaker: str) -> Band | None:
        """Intelligibility band of one speaker, where the corpus knows it."""
        self.require([speaker])
        return self._by_speaker[speaker][-1].band

    def require(self, speakers: Iterable[str]) -> None:
        """Raises CorpusError, with the nearest names, when a speaker is not in the corpus."""
        if not self._by_speaker.keys() >= (wanted := set(speakers)):
            require_speakers(wanted, self.speakers, str(self.path))


Kind = Literal["line", "audio", "id", "file", "speaker", "take"]


class Problem(NamedTuple):
    """Why a manifest is refused: a line that is no recording, lost audio, or what contradicts an earlier line."""

    line: int
    what: str
    kind: Kind


def by_speaker(recordings: Iterable[Recording]) -> dict[str, list[Recording]]:
    """Recordings of every speaker, in the order given."""
    rows: dict[str, list[Recording]] = {}
    for recording in recordings:
        rows.setdefault(recording.speaker, []).append(recording)
    return rows


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
    recordings: list[Recording] = []
    numbers: list[int] = []
    problems: list[Problem] = []
    try:
        with _no_collection():
            for number, parsed in _lines(path):
                if isinstance(parsed, Recording):
                    recordings.append(parsed)
                    numbers.append(number)
                else:
                    problems.append(Problem(number, parsed, "line"))
    except OSError as error:
        raise CorpusError(
            f"{path}: no manifest can be read ({error.strerror or error}).",
            "Check the path, or make a corpus with 'xded corpus import' or 'xded corpus synthesise'.",
        ) from error
    if not recordings and not problems:
        raise CorpusError(f"{path} holds no recordings.", "Import a corpus again: 'xded corpus import --help'.")
    problems += [Problem(numbers[index], what, kind) for index, what, kind in _contradictions(recordings)]
    problems += [
        Problem(number, f"audio file not found: {recording.audio_filepath}", "audio")
        for number, recording in zip(numbers, recordings, strict=True)
        if not os.path.isfile(recording.audio_filepath)  # noqa: PTH113 - half the time of Path.is_file
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


@contextmanager
def _no_collection() -> Iterator[None]:
    """Without Python's search for cycles, which looks at all recordings again and again as they come: half the time."""
    searched = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if searched:
            gc.enable()


def _lines(path: Path) -> Iterator[tuple[int, Recording | str]]:
    """Number and recording of every line that is not blank, its path absolute; or what is wrong with the line."""
    folder = os.path.abspath(path.parent)  # noqa: PTH100
    keys: dict[frozenset[str], set[str]] = {}
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                recording = _parse(line, folder)
            except UnicodeDecodeError as error:
                raise CorpusError(
                    f"{path} is not UTF-8 text (line {number}: {error}).", "Save the manifest as UTF-8 JSON lines."
                ) from error
            except ValueError as error:
                yield number, str(error)
                continue
            # pydantic's set of the keys that were given takes more memory than all values: one for all such lines
            given = recording.model_fields_set
            object.__setattr__(recording, "__pydantic_fields_set__", keys.setdefault(frozenset(given), given))
            yield number, recording


def _parse(line: bytes, folder: str) -> Recording:
    """One line as a recording with an absolute path; ValueError says what is wrong with it."""
    try:
        return Recording.model_validate_json(line, context=folder)  # a third of the time of the way below
    except ValidationError:
        return validate(load_object(line.decode("utf-8")), folder)


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


def validate(data: dict[str, Any], folder: str | None = None) -> Recording:
    """One object of a manifest as a recording, its path as it stands, or absolute where a folder is given.

    Raises:
        ValueError: naming every wrong key.
    """
    try:
        return Recording.model_validate(data, context=folder)
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
    ids: set[str] = set()
    files: dict[str, str] = {}
    speakers: dict[str, Recording] = {}
    takes: dict[str, Recording] = {}
    for index, row in enumerate(recordings):
        if row.recording in ids:
            problems.append((index, f"recording id '{row.recording}' is used twice; ids must be unique", "id"))
        ids.add(row.recording)
        file = str(row.audio_filepath)
        other = files.setdefault(file, row.recording)
        if other != row.recording:
            problems.append((index, f"recordings '{other}' and '{row.recording}' share the file {file}", "file"))
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
