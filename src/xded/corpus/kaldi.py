"""Kaldi data folders: wav.scp, text, utt2spk, and where they are there utt2dur and utt2uniq.

In wav.scp a command may stand for a file. Commands are never run here, whatever they are: such a line is refused.
`utt2uniq`, which Kaldi's recipes write for copies of one utterance, carries our takes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from xded.corpus.checks import Candidate, Row
from xded.corpus.foreign import bad_line, candidate, read_lines, refuse, write_files
from xded.corpus.manifest import Corpus, Recording, absolute
from xded.errors import CorpusError

NEEDED = ("wav.scp", "text", "utt2spk")
IN_ARCHIVE = re.compile(r"\.ark(:\d+)?(\[.*\])?$")
MEND = "Mend the line and import again."
CUT = "Cut the audio first: utils/data/extract_wav_segments_data_dir.sh of Kaldi, or ESPnet's format_wav_scp.sh."


def find(source: Path, root: Path | None = None) -> tuple[list[Candidate], list[Row]]:
    """Finds the recordings of a Kaldi data folder.

    Args:
        source: the folder that holds wav.scp, text and utt2spk.
        root: where relative paths of wav.scp start (Kaldi: where the recipe runs); none: the folder itself.

    Returns:
        Candidates in the order of wav.scp, and a row for each line that cannot be used: commands, archives, parts of
        longer files (`segments` that do not begin with their file), utterances without text or speaker.

    Raises:
        CorpusError: one of the three files is missing or empty.
    """
    missing = [name for name in NEEDED if not (source / name).is_file()]
    if missing:
        raise CorpusError(f"{source} holds no {', '.join(missing)}.", "Give a Kaldi data folder, such as data/train.")
    rows: list[Row] = []
    scp, texts, speakers = (_table(source / name, rows) for name in NEEDED)
    durations, takes = (_table(source / name, rows) for name in ("utt2dur", "utt2uniq"))
    if not scp:
        raise CorpusError(f"{source / 'wav.scp'} lists no recordings.", "Give a Kaldi data folder, such as data/train.")
    listed = source / ("segments" if (source / "segments").is_file() else "wav.scp")
    lines = _table(listed, rows) if listed.name == "segments" else scp
    candidates = []
    for name, (number, rest) in lines.items():
        place, end = (rest, "")
        if listed.name == "segments":
            refusal, place, end = _whole_file(name, rest, scp)
            if refusal is not None:
                rows.append(bad_line(listed, number, *refusal, "segment"))
                continue
        problem = _unusable(place)
        if problem is not None:
            rows.append(bad_line(listed, number, f"{name}: {problem[0]}", problem[1], "no file"))
            continue
        unnamed = [of for of, table in (("text", texts), ("utt2spk", speakers)) if name not in table]
        if unnamed:
            kind = "no text" if "text" in unnamed else "no speaker"
            rows.append(bad_line(listed, number, f"{name} is not in {' and '.join(unnamed)}", "Add it there.", kind))
            continue
        more = {"duration": end or durations.get(name, (0, ""))[1], "take": takes.get(name, (0, ""))[1]}
        try:
            audio = absolute((root or source) / place)
            candidates.append(candidate(audio, texts[name][1], name, speakers[name][1], more))
        except ValueError as error:
            rows.append(bad_line(listed, number, f"{name}: {error}", "Mend text, utt2spk or utt2dur."))
    for name, (number, _) in texts.items():
        if name not in lines:
            rows.append(
                bad_line(source / "text", number, f"{name} is not in {listed.name}", "Add its audio.", "no file")
            )
    return candidates, rows


def _table(path: Path, rows: list[Row]) -> dict[str, tuple[int, str]]:
    """Number and rest of the line of every id; lines without a rest or with an id that came before become rows."""
    table: dict[str, tuple[int, str]] = {}
    for number, line in read_lines(path) if path.is_file() else []:
        name, *rest = line.strip().split(maxsplit=1)
        if not rest:
            rows.append(bad_line(path, number, f"nothing stands behind '{name}'", MEND))
        elif name in table:
            rows.append(bad_line(path, number, f"'{name}' stands in line {table[name][0]} too", MEND))
        else:
            table[name] = (number, rest[0])
    return table


def _unusable(place: str) -> tuple[str, str] | None:
    """Why the second column of wav.scp is no file, and the remedy."""
    if place.endswith("|") or place.startswith("|"):
        return (
            f"'{place:.80}' is a command, and commands are never run",
            "Run it once yourself, write its output to a WAV or FLAC file, and put that path into wav.scp.",
        )
    if IN_ARCHIVE.search(place):
        return f"'{place:.80}' lies in an archive", "Write it to a WAV file with 'wav-copy', and put that path there."
    return None


def _whole_file(name: str, rest: str, scp: Mapping[str, tuple[int, str]]) -> tuple[tuple[str, str] | None, str, str]:
    """Problem and remedy of a segment (none: it begins with its file), its audio and its end in seconds.

    That it also ends with the file is seen when the audio is checked: a part is shorter than its file.
    """
    recording, start, end = (*rest.split(), "", "")[:3]
    if recording not in scp:
        return (f"{name} is cut from {recording}, which is not in wav.scp", "Add its audio."), "", ""
    try:
        if float(start) == 0 and float(end) > 0:
            return None, scp[recording][1], end
    except ValueError:
        return (f"{name} has no start and end in seconds", MEND), "", ""
    return (f"{name} is a part of a longer file; a recording of ours is a whole file", CUT), "", ""


def write(corpus: Corpus, folder: Path) -> list[Path]:
    """Writes a data folder, sorted as `LC_ALL=C sort` does; roles, bands and prompts have no place in it.

    Kaldi wants the order of utterances to be that of their speakers: where it is not, every id gets its speaker's as
    prefix. Kaldi itself reads WAV only; paths of FLAC files are written as they are.

    Raises:
        CorpusError: white space in an id, a line break in a text, or a path that would be taken for a command.
    """
    recordings = corpus.recordings
    ids = {text for r in recordings for text in (r.recording, r.speaker, r.take)}
    refuse("Kaldi's ids hold no white space", (name for name in ids if len(name.split()) != 1), "Rename them.")
    broken = (r.recording for r in recordings if r.text.split() != r.text.split(" "))
    refuse("Kaldi's texts have single spaces and no line breaks", broken, "Mend the texts in the manifest.")
    paths = (str(r.audio_filepath) for r in recordings if _unusable(str(r.audio_filepath)))
    refuse("Kaldi would take these paths for commands or archives", paths, "Rename the files.")
    names = _names(recordings)
    of_speaker: dict[str, list[str]] = {}
    for name in sorted(names, key=str.encode):
        of_speaker.setdefault(names[name].speaker, []).append(name)
    files: dict[str, Mapping[str, object]] = {
        "wav.scp": {name: r.audio_filepath for name, r in names.items()},
        "text": {name: r.text for name, r in names.items()},
        "utt2spk": {name: r.speaker for name, r in names.items()},
        "spk2utt": {speaker: " ".join(utterances) for speaker, utterances in of_speaker.items()},
        "utt2dur": {name: r.duration for name, r in names.items()},
        "utt2uniq": {name: r.take for name, r in names.items()},
    }
    return write_files(folder, {name: _lines(table) for name, table in files.items()})


def _names(recordings: tuple[Recording, ...]) -> dict[str, Recording]:
    """Utterance ids: ours, where sorting by them also sorts by speaker."""
    ordered = sorted(recordings, key=lambda r: r.recording.encode())
    by_speaker = sorted(ordered, key=lambda r: r.speaker.encode())
    same = [r.recording for r in ordered] == [r.recording for r in by_speaker]
    return {r.recording if same else f"{r.speaker}-{r.recording}": r for r in recordings}


def _lines(table: Mapping[str, object]) -> str:
    return "".join(f"{name} {table[name]}\n" for name in sorted(table, key=str.encode))
