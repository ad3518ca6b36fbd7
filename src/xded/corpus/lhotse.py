"""Lhotse's cut manifests (cuts.jsonl, cuts.jsonl.gz): one MonoCut a line, which must be a whole file of one channel.

Only sources of type `file` are opened. Commands are never run, nothing is fetched, and audio in shards or in memory,
parts of longer files and mixed or padded cuts are refused line by line.
"""

from __future__ import annotations

import gzip
import json
import zlib
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from xded.corpus.checks import DURATION_TOLERANCE_S, Candidate, Row
from xded.corpus.foreign import bad_line, candidate, own_keys, refuse, write_files
from xded.corpus.manifest import Corpus, Recording, absolute, load_object
from xded.errors import CorpusError

FILE_NAME = "cuts.jsonl"
WHOLE_FILES = "Write one file a cut with Lhotse: cuts.trim_to_supervisions(), then cuts.save_audios(FOLDER)."


class _Source(BaseModel):
    type: str
    channels: list[int]
    source: str


class _Recording(BaseModel):
    model_config = ConfigDict(allow_inf_nan=False)

    sources: list[_Source]
    sampling_rate: int
    duration: float
    transforms: list[Any] | None = None


class _Supervision(BaseModel):
    text: str | None = None
    speaker: str | None = None
    custom: dict[str, Any] | None = None


class _Cut(BaseModel):
    model_config = ConfigDict(allow_inf_nan=False)

    id: str
    start: float
    duration: float
    supervisions: list[_Supervision]
    recording: _Recording
    custom: dict[str, Any] | None = None


class _NotWholeError(ValueError):
    """The cut is something else than one whole file of one channel with one text."""


def find(source: Path, root: Path | None = None) -> tuple[list[Candidate], list[Row]]:
    """Finds the recordings of a cut manifest.

    Args:
        source: cuts.jsonl or cuts.jsonl.gz.
        root: where relative paths start (Lhotse: where the program runs); none: the manifest's folder.

    Returns:
        Candidates in the order of the lines, and a row for each cut that is no whole file with one text.

    Raises:
        CorpusError: no such file, no text, or nothing in it.
    """
    try:
        data = source.read_bytes()
        text = (gzip.decompress(data) if source.suffix == ".gz" else data).decode("utf-8")
    except (OSError, UnicodeDecodeError, EOFError, zlib.error) as error:
        raise CorpusError(f"{source} cannot be read ({error}).", "Give a cut manifest: cuts.jsonl(.gz).") from error
    candidates, rows = [], []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            candidates.append(_candidate(line, root or source.parent))
        except ValidationError as error:
            first = error.errors()[0]
            problem = f"'{'.'.join(map(str, first['loc']))}': {first['msg']}"
            rows.append(bad_line(source, number, problem, "Give cuts, not recordings or supervisions.", "no cut"))
        except _NotWholeError as error:
            rows.append(bad_line(source, number, str(error), WHOLE_FILES, "no whole file"))
        except ValueError as error:
            rows.append(bad_line(source, number, str(error), "Mend the line and import again."))
    if not candidates and not rows:
        raise CorpusError(f"{source} lists no cuts.", "Give a cut manifest: cuts.jsonl(.gz).")
    return candidates, rows


def _candidate(line: str, folder: Path) -> Candidate:
    """One cut; _NotWholeError or ValueError says why it is refused."""
    raw = load_object(line)
    kind = raw.get("type", "MonoCut")
    if kind != "MonoCut":
        raise _NotWholeError(f"a {kind} is no single recording")
    cut = _Cut.model_validate(raw)
    sources, recording = cut.recording.sources, cut.recording
    if [source.type for source in sources] != ["file"]:
        kinds = ", ".join(source.type for source in sources) or "nothing"
        raise _NotWholeError(f"cut '{cut.id}' has its audio from {kinds}; only one source of type file is opened")
    if len(sources[0].channels) != 1:
        raise _NotWholeError(f"cut '{cut.id}' lies in a file of {len(sources[0].channels)} channels")
    if recording.transforms:
        raise _NotWholeError(f"cut '{cut.id}' is changed when it is read (transforms)")
    if abs(cut.start) > DURATION_TOLERANCE_S or abs(cut.duration - recording.duration) > DURATION_TOLERANCE_S:
        raise _NotWholeError(f"cut '{cut.id}' is a part of a longer file")
    if len(cut.supervisions) != 1:
        raise _NotWholeError(f"cut '{cut.id}' has {len(cut.supervisions)} supervisions; one is expected")
    spoken = cut.supervisions[0]
    more = {**(cut.custom or {}), **(spoken.custom or {})}
    more |= {"duration": recording.duration, "sample_rate": recording.sampling_rate}
    return candidate(absolute(folder / sources[0].source), spoken.text, cut.id, spoken.speaker, more)


def write(corpus: Corpus, folder: Path) -> list[Path]:
    """Writes cuts.jsonl; our own keys stand in the supervision's `custom`.

    Raises:
        CorpusError: recordings whose sample rate is not in the manifest.
    """
    unknown = (r.recording for r in corpus.recordings if r.sample_rate is None)
    refuse("Lhotse needs the sample rate of every file", unknown, "Import the corpus again: 'xded corpus import'.")
    lines = (json.dumps(_cut(r), ensure_ascii=False) + "\n" for r in corpus.recordings)
    return write_files(folder, {FILE_NAME: "".join(lines)})


def _cut(r: Recording) -> dict[str, Any]:
    rate = r.sample_rate or 0
    span = {"start": 0.0, "duration": r.duration, "channel": 0}
    supervision = {"id": r.recording, "recording_id": r.recording, **span, "text": r.text, "speaker": r.speaker}
    recording = {
        "id": r.recording,
        "sources": [{"type": "file", "channels": [0], "source": str(r.audio_filepath)}],
        "sampling_rate": rate,
        "num_samples": round(r.duration * rate),
        "duration": r.duration,
        "channel_ids": [0],
    }
    spoken = [{**supervision, "custom": own_keys(r)}]
    return {"id": r.recording, **span, "supervisions": spoken, "recording": recording, "type": "MonoCut"}
