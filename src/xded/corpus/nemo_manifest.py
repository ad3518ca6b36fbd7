"""A plain NeMo manifest: JSON lines with audio_filepath, duration, text, and who speaks under some key."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from xded.corpus.checks import Candidate, Row
from xded.corpus.manifest import MANIFEST_NAME, absolute, load_object, validate
from xded.errors import CorpusError

ID_KEYS = ("speaker", "take", "prompt", "recording", "block", "mic")


def find(source: Path, speaker_key: str = "speaker") -> tuple[list[Candidate], list[Row]]:
    """Finds the recordings that a NeMo manifest lists.

    Keys of our own manifest (take, prompt, role, band ...) are kept where a line has them. Otherwise a recording is
    called after its path below the folder that all files share, its take is that name and its prompt is its text.

    Args:
        source: the manifest, or a folder that holds `manifest.jsonl`; relative audio paths start at its folder.
        speaker_key: the key that names the speaker.

    Returns:
        Candidates in the order of the lines, and a row for each line that cannot be used.

    Raises:
        CorpusError: no manifest, nothing in it, or no line with the speaker key.
    """
    path = source / MANIFEST_NAME if source.is_dir() else source
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise CorpusError(f"{path}: no manifest can be read ({error}).", "Give a JSON-lines file.") from error
    objects: list[tuple[int, dict[str, Any]]] = []
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            if line.strip():
                objects.append((number, _object(line)))
        except ValueError as error:
            rows.append(_bad_line(path, number, str(error)))
    if not objects:
        raise CorpusError(f"{path} lists no recordings.", "Give a NeMo manifest: one JSON object per line.")
    if not any(speaker_key in data for _, data in objects):
        raise CorpusError(
            f"{path}: no line has the key '{speaker_key}'; keys of the first are {', '.join(objects[0][1])}.",
            "Name the key that tells the speaker with --speaker-key.",
        )
    names = _names(path, [str(data["audio_filepath"]) for _, data in objects])
    candidates = []
    for (number, data), (audio, name) in zip(objects, names, strict=True):
        try:
            candidates.append(_candidate(data, audio, name, speaker_key))
        except ValueError as error:
            rows.append(_bad_line(path, number, str(error)))
    return candidates, rows


def _object(line: str) -> dict[str, Any]:
    """A line's keys that hold something; ValueError when it names no audio file."""
    data = {key: value for key, value in load_object(line).items() if value is not None}
    if not isinstance(data.get("audio_filepath"), str):
        raise ValueError("key 'audio_filepath' is missing or not text")
    return data


def _names(manifest: Path, files: list[str]) -> list[tuple[Path, str]]:
    """Absolute path and default name of every file: its path below the folder they share, `/` as `_`, no suffix."""
    paths = [absolute(manifest.parent / file) for file in files]
    shared = Path(os.path.commonpath([path.parent for path in paths]))
    return [(path, "_".join(path.relative_to(shared).with_suffix("").parts)) for path in paths]


def _candidate(data: dict[str, Any], audio: Path, name: str, speaker_key: str) -> Candidate:
    """One line with our defaults; ValueError names every wrong key."""
    ids = {key: str(data[key]) for key in ID_KEYS if isinstance(data.get(key), str | int)}
    defaults = {"recording": name, "take": ids.get("recording", name), "prompt": data.get("text")}
    speaker = {"speaker": str(data[speaker_key])} if speaker_key in data else {}
    recording = validate(defaults | data | ids | speaker | {"audio_filepath": str(audio)})
    return Candidate(**{key: getattr(recording, key) for key in Candidate.__dataclass_fields__})


def _bad_line(path: Path, number: int, problem: str) -> Row:
    return Row("rejected", path, f"{path}, line {number}: {problem}.", "Mend the line and import again.", "line")
