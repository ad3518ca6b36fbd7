"""SpeechBrain's CSV: ID, duration, wav, spk_id, wrd in any order; further columns with our own keys are kept."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path

from xded.corpus.checks import Candidate, Row
from xded.corpus.foreign import OWN_KEYS, bad_line, candidate, own_keys, write_files
from xded.corpus.manifest import Corpus, absolute
from xded.errors import CorpusError

ID, DURATION, AUDIO, SPEAKER, TEXT = "ID", "duration", "wav", "spk_id", "wrd"
FILE_NAME = "recordings.csv"
PLACEHOLDER = re.compile(r"^\$[\w.]+")
MEND = "Mend the line and import again."


def find(
    source: Path, speaker_key: str = SPEAKER, text_key: str = TEXT, root: Path | None = None
) -> tuple[list[Candidate], list[Row]]:
    """Finds the recordings that a SpeechBrain CSV lists.

    Args:
        source: the file.
        speaker_key, text_key: columns that tell speaker and text.
        root: stands in for $data_root (or any one placeholder) and where relative paths start; none: the CSV's folder.

    Returns:
        Candidates in the order of the lines, and a row for each line that cannot be used.

    Raises:
        CorpusError: no such file, no CSV, a column that is missing, or a placeholder without `root`.
    """
    try:
        with source.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, skipinitialspace=True, strict=True)
            columns = [name.strip() for name in reader.fieldnames or []]
            reader.fieldnames = columns
            listed = [(reader.line_num, line) for line in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise CorpusError(f"{source} cannot be read as CSV ({error}).", "Give a SpeechBrain CSV file.") from error
    missing = [name for name in (ID, AUDIO, speaker_key, text_key) if name not in columns]
    if missing:
        raise CorpusError(
            f"{source} has no column {', '.join(missing)}; its columns are {', '.join(columns)}.",
            "Name the columns of speaker and text with --speaker-key and --text-key.",
        )
    candidates, rows = [], []
    for number, line in listed:
        if None in line or None in line.values():
            found = f"{len(columns)} columns are named, and this line has another number"
            rows.append(bad_line(source, number, found, MEND))
        elif line.get("start") or line.get("stop"):
            remedy = "Cut the audio into one file a recording."
            rows.append(bad_line(source, number, f"{line[ID]} is a part of a longer file", remedy, "segment"))
        else:
            try:
                audio = _audio(line[AUDIO], source, root)
                candidates.append(candidate(audio, line[text_key], line[ID], line[speaker_key], line))
            except ValueError as error:
                rows.append(bad_line(source, number, str(error), MEND))
    if not listed:
        raise CorpusError(f"{source} lists no recordings.", "Give a SpeechBrain CSV file.")
    return candidates, rows


def _audio(wav: str, source: Path, root: Path | None) -> Path:
    """The absolute path, placeholders filled in."""
    placeholder = PLACEHOLDER.match(wav)
    if placeholder and root is None:
        raise CorpusError(
            f"{source}: '{wav}' begins with the placeholder {placeholder[0]}.",
            "Say what it stands for with --root DIR.",
        )
    rest = wav.removeprefix(placeholder[0]).lstrip("/") if placeholder else wav
    return absolute((root or source.parent) / rest)


def write(corpus: Corpus, folder: Path) -> list[Path]:
    """Writes recordings.csv, with our own keys in columns behind SpeechBrain's."""
    file = io.StringIO(newline="")
    columns = (ID, DURATION, AUDIO, SPEAKER, TEXT, *OWN_KEYS)
    writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
    writer.writeheader()
    for r in corpus.recordings:
        theirs = {ID: r.recording, DURATION: r.duration, AUDIO: r.audio_filepath, SPEAKER: r.speaker, TEXT: r.text}
        writer.writerow(theirs | own_keys(r))
    return write_files(folder, {FILE_NAME: file.getvalue()})
