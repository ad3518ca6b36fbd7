"""Hugging Face `datasets` on disk: `save_to_disk` (Arrow), the hub's Parquet files, and audiofolders with metadata.

Arrow and Parquet hold the audio's bytes in a column {bytes, path}: they are written out as files, as they are. Nothing
is fetched, and no script of a data set is run.
"""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from xded.corpus.checks import Candidate, Row
from xded.corpus.foreign import OWN_KEYS, bad_line, candidate, own_keys, read_lines, refuse, write_files
from xded.corpus.manifest import Corpus, absolute, load_object
from xded.errors import CorpusError, need_extra

STATE, METADATA = "state.json", ("metadata.jsonl", "metadata.csv")
AUDIO_FOLDER: Final = "audio"
FILE_NAME, ID_KEYS = "file_name", ("recording", "id")
BATCH_ROWS: Final = 64
UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")
MAGIC: Final = {b"fLaC": ".flac", b"RIFF": ".wav"}
CONVERT = "Decode it first: dataset.map, or save the column as WAV or FLAC files with soundfile."


def find(
    source: Path, out: Path, speaker_key: str = "speaker", text_key: str = "text"
) -> tuple[list[Candidate], list[Row]]:
    """Finds the recordings of a data set; of several splits all.

    Args:
        source: folder of `save_to_disk`, of Parquet files, or of audio files with metadata.csv or metadata.jsonl.
        out: bytes are written to OUT/audio.
        speaker_key, text_key: columns that tell speaker and text; class labels are read as their names.

    Returns:
        Candidates in the order of the files and rows, and a row for each that cannot be used.

    Raises:
        CorpusError: none of the three, a damaged file, or a column that is missing.
        ConfigError: the package pyarrow is needed and not installed.
    """
    states = sorted(source.rglob(STATE))
    tables = [table for state in states for table in _data_files(state)] or sorted(source.rglob("*.parquet"))
    if tables:
        return _from_tables(tables, source, out / AUDIO_FOLDER, speaker_key, text_key)
    metadata = sorted(path for name in METADATA for path in source.rglob(name))
    if not metadata:
        raise CorpusError(
            f"{source} holds no {STATE}, no .parquet and no {' or '.join(METADATA)}.",
            "Give a folder of datasets' save_to_disk, of Parquet files, or an audiofolder.",
        )
    return _from_metadata(metadata, source, speaker_key, text_key)


# --- Arrow and Parquet --------------------------------------------------------------------------------------


def _data_files(state: Path) -> list[Path]:
    """Arrow files that a state.json names; they lie beside it."""
    try:
        names = [file["filename"] for file in json.loads(state.read_text(encoding="utf-8"))["_data_files"]]
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise CorpusError(f"{state} names no data files ({error!r}).", "Save the data set again.") from error
    strange = [name for name in names if not isinstance(name, str) or Path(name).name != name]
    if strange:
        raise CorpusError(f"{state} names '{strange[0]}', which is not beside it.", "Save the data set again.")
    return [state.parent / name for name in names]


def _from_tables(
    tables: list[Path], source: Path, audio: Path, speaker_key: str, text_key: str
) -> tuple[list[Candidate], list[Row]]:
    arrow = need_extra("pyarrow", "arrow", f"Reading {tables[0].name}")
    candidates: list[Candidate] = []
    rows: list[Row] = []
    names: set[str] = set()
    for path in tables:
        try:
            batches = _batches(arrow, path)
            for number, row in enumerate(_rows(batches, arrow, path, speaker_key, text_key), start=1):
                try:
                    fallback = f"{'_'.join(path.relative_to(source).with_suffix('').parts)}_{number}"
                    candidates.append(_candidate(row, path, audio, names, fallback))
                except ValueError as error:
                    rows.append(bad_line(path, number, str(error), CONVERT, "row"))
        except (arrow.ArrowException, OSError) as error:
            problem = str(error).partition("\n")[0]
            raise CorpusError(f"{path} cannot be read ({problem}).", "Save or fetch the data set again.") from error
    return candidates, rows


def _batches(arrow: ModuleType, path: Path) -> Iterator[Any]:
    """Record batches of a stream of `save_to_disk`, or of a Parquet file."""
    if path.suffix == ".parquet":
        parquet = need_extra("pyarrow.parquet", "arrow", f"Reading {path.name}")
        with parquet.ParquetFile(path) as file:
            yield from file.iter_batches(BATCH_ROWS)
        return
    with arrow.memory_map(str(path)) as file, arrow.ipc.open_stream(file) as stream:
        yield from stream


def _rows(
    batches: Iterator[Any], arrow: ModuleType, path: Path, speaker_key: str, text_key: str
) -> Iterator[dict[str, Any]]:
    """Rows with the keys `speaker`, `text`, `audio` and whatever else is of use; class labels as their names."""
    first = next(batches, None)
    if first is None:
        return
    schema = first.schema
    holds_audio = [
        field.name
        for field in schema
        if arrow.types.is_struct(field.type) and {"bytes", "path"} <= {part.name for part in field.type}
    ]
    missing = [name for name in (speaker_key, text_key) if name not in schema.names]
    if missing or not holds_audio:
        what = f"no column {', '.join(missing)}" if missing else "no audio column {bytes, path}"
        raise CorpusError(
            f"{path} has {what}; its columns are {', '.join(schema.names)}.",
            "Name the columns of speaker and text with --speaker-key and --text-key.",
        )
    labels = _labels(schema)
    wanted = [
        n for n in dict.fromkeys([speaker_key, text_key, holds_audio[0], *ID_KEYS, *OWN_KEYS]) if n in schema.names
    ]
    for batch in chain([first], batches):
        batch.validate(full=True)
        for start in range(0, batch.num_rows, BATCH_ROWS):
            for row in batch.select(wanted).slice(start, BATCH_ROWS).to_pylist():
                for name, texts in labels.items():
                    value = row.get(name)
                    if isinstance(value, int) and 0 <= value < len(texts):
                        row[name] = texts[value]
                yield {**row, "speaker": row[speaker_key], "text": row[text_key], "audio": row[holds_audio[0]]}


def _labels(schema: Any) -> dict[str, list[str]]:
    """Names of the classes of every ClassLabel column, from what `datasets` writes into the schema."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {
            name: feature["names"]
            for name, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and isinstance(feature["names"], list)
        }
    except (LookupError, ValueError, TypeError, AttributeError):
        return {}  # written by another tool: numbers stay numbers


def _candidate(row: Mapping[str, Any], table: Path, folder: Path, names: set[str], fallback: str) -> Candidate:
    """One row, its bytes written to a file; ValueError says why it cannot be used."""
    sound = row["audio"] or {}
    data, place = sound.get("bytes"), sound.get("path")
    name = next((str(row[key]) for key in ID_KEYS if row.get(key) is not None), None)
    if name is None:
        stem = Path(place).stem if place else fallback
        name = stem if stem not in names else fallback
    if data is None:
        if not place:
            raise ValueError(f"{name} has neither bytes nor a path")
        return candidate(absolute(table.parent / place), row["text"], name, row["speaker"], row)
    suffix = MAGIC.get(data[:4])
    if suffix is None:
        raise ValueError(f"the audio of {name} begins with {data[:4]!r}; WAV and FLAC are read")
    file = folder / f"{_safe(name, names)}{suffix}"
    found = candidate(file, row["text"], name, row["speaker"], row)
    folder.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)
    return found


def _safe(name: str, taken: set[str]) -> str:
    """A file name of its own for a recording."""
    safe = UNSAFE.sub("_", name).lstrip(".") or "_"
    chosen = next(n for n in chain([safe], (f"{safe}-{i}" for i in range(2, len(taken) + 3))) if n not in taken)
    taken.add(chosen)
    return chosen


# --- audiofolder --------------------------------------------------------------------------------------------


def _from_metadata(
    files: list[Path], source: Path, speaker_key: str, text_key: str
) -> tuple[list[Candidate], list[Row]]:
    candidates: list[Candidate] = []
    rows: list[Row] = []
    for path in files:
        lines = _csv_lines(path) if path.suffix == ".csv" else [(n, line) for n, line in read_lines(path)]
        for number, line in lines:
            try:
                row = load_object(line) if isinstance(line, str) else line
                missing = [key for key in (FILE_NAME, speaker_key, text_key) if key not in row]
                if missing:
                    raise ValueError(f"no {', '.join(missing)} among {', '.join(map(str, row))}")
                audio = absolute(path.parent / str(row[FILE_NAME]))
                below = audio.relative_to(absolute(source)) if audio.is_relative_to(absolute(source)) else audio
                default = "_".join(below.with_suffix("").parts).lstrip("/_")
                name = next((row[key] for key in ID_KEYS if row.get(key)), default)
                candidates.append(candidate(audio, row[text_key], name, row[speaker_key], row))
            except ValueError as error:
                remedy = "Mend the line, or name the columns with --speaker-key and --text-key."
                rows.append(bad_line(path, number, str(error), remedy))
    return candidates, rows


def _csv_lines(path: Path) -> list[tuple[int, dict[str, Any]]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            return [(reader.line_num, {str(key): value for key, value in line.items()}) for line in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise CorpusError(f"{path} cannot be read as CSV ({error}).", "Write it again.") from error


def write(corpus: Corpus, folder: Path) -> list[Path]:
    """Writes an audiofolder, which `load_dataset("audiofolder", data_dir=FOLDER)` reads: audio/ and metadata.jsonl.

    Audio files are copied, because an audiofolder holds its own; the metadata is written last.

    Raises:
        CorpusError: the corpus has its own audio there, which copies would overwrite.
    """
    audio = folder / AUDIO_FOLDER
    own = (r.recording for r in corpus.recordings if r.audio_filepath.is_relative_to(absolute(audio)))
    refuse(f"{audio} is where the corpus has its own audio", own, "Choose another --out.")
    audio.mkdir(parents=True, exist_ok=True)
    names: set[str] = set()
    lines = []
    for r in corpus.recordings:
        file = audio / f"{_safe(r.recording, names)}{r.audio_filepath.suffix}"
        shutil.copyfile(r.audio_filepath, file)
        row = {"text": r.text, "speaker": r.speaker, "recording": r.recording, "duration": r.duration}
        place = {FILE_NAME: file.relative_to(folder).as_posix()}
        lines.append(json.dumps({**place, **row, **own_keys(r)}, ensure_ascii=False) + "\n")
    return write_files(folder, {METADATA[0]: "".join(lines)})
