"""Every recording is checked once, when it is imported: a bad file costs one row in a report, never the run."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import TypeAdapter, ValidationError

from xded.audio import decode, load_bytes
from xded.corpus.manifest import MANIFEST_NAME, Band, Corpus, Recording, Role, require_speakers, write_manifest
from xded.errors import CorpusError

REPORT_NAME = "check.jsonl"
DURATION_TOLERANCE_S = 0.02  # foreign manifests round their durations
SILENT_PEAK = 3e-4  # full scale is 1; about 10 steps of 16-bit audio, -70 dBFS
FULL_SCALE = 0.999
CLIPPED_SHARE = 1e-3  # of the samples at full scale; a clean recording has a few at most


@dataclass(frozen=True)
class Candidate:
    """A recording as an importer found it, before its audio has been looked at.

    `duration` (seconds), `sample_rate` (Hz) and `audio_sha256` are what the corpus declares, where it does.
    """

    audio_filepath: Path
    text: str
    recording: str
    speaker: str
    take: str
    prompt: str
    block: str | None = None
    mic: str | None = None
    role: Role = "target"
    band: Band | None = None
    word_type: str | None = None
    simulated_by: str | None = None
    duration: float | None = None
    sample_rate: int | None = None
    audio_sha256: str | None = None


@dataclass(frozen=True)
class Row:
    """One line of the report: a file that was left out (`rejected`), or kept with a `warning`."""

    status: Literal["rejected", "warning"]
    audio_filepath: Path
    reason: str
    remedy: str
    kind: str  # short name to count by: damaged, silent, duplicate ...


@dataclass(frozen=True)
class Report:
    """What a check found. Files seen = recordings kept + rows with status `rejected`."""

    kept: tuple[Recording, ...]
    rows: tuple[Row, ...]

    @property
    def rejected(self) -> tuple[Row, ...]:
        """Rows of the files that were left out."""
        return tuple(row for row in self.rows if row.status == "rejected")

    @property
    def warnings(self) -> tuple[Row, ...]:
        """Rows of the files that were kept with a warning."""
        return tuple(row for row in self.rows if row.status == "warning")

    def summary(self) -> dict[str, Any]:
        """Counts: `kept`, and of `rejected` and `warnings` how many of which kind."""
        return {
            "kept": len(self.kept),
            "rejected": dict(Counter(row.kind for row in self.rejected)),
            "warnings": dict(Counter(row.kind for row in self.warnings)),
        }


def check(candidates: Iterable[Candidate], rows: Iterable[Row] = ()) -> Report:
    """Checks every candidate's audio.

    Args:
        candidates: what the importer found.
        rows: what the importer has already refused; they lead the report.

    Returns:
        Kept recordings, in the order of the candidates, and a row for each file refused or warned about. A file whose
        bytes are those of another recording is refused; when the two disagree about speaker or text, both are.

    Raises:
        CorpusError: two candidates have one recording id (a corpus with two copies of its audio, for example).
    """
    listed = list(candidates)
    _refuse_clashes(listed)
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        outcomes = list(pool.map(check_one, listed))
    kept = [outcome for outcome, _ in outcomes if outcome is not None]
    found = [*rows, *(row for _, row in outcomes if row is not None)]
    kept, duplicates = _without_duplicates(kept)
    return Report(tuple(kept), (*found, *duplicates))


def check_corpus(corpus: Corpus) -> Report:
    """Checks a corpus again: the files against what its manifest declares, their SHA-256 included."""
    return check(as_candidate(recording) for recording in corpus.recordings)


def as_candidate(recording: Recording) -> Candidate:
    """A recording of a manifest, to be checked again."""
    return Candidate(**{name: getattr(recording, name) for name in Candidate.__dataclass_fields__})


def store(report: Report, folder: Path, *, overwrite: bool = False) -> Path:
    """Writes `manifest.jsonl` (the kept recordings) and `check.jsonl` (the rows) into a folder.

    Returns:
        Path of the manifest.

    Raises:
        CorpusError: the folder holds a manifest and `overwrite` is false; nothing was kept (the report is written).
    """
    manifest = folder / MANIFEST_NAME
    if not overwrite:
        refuse_existing(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / REPORT_NAME).open("w", encoding="utf-8") as file:
        for row in report.rows:
            data = {**vars(row), "audio_filepath": str(row.audio_filepath)}
            file.write(json.dumps(data, ensure_ascii=False) + "\n")
    if not report.kept:
        reasons = f" The first: {report.rows[0].reason}" if report.rows else ""
        raise CorpusError(
            f"No recording could be used; {len(report.rejected)} were rejected.{reasons}",
            f"See {folder / REPORT_NAME} for every file and its remedy, and check the folder that was imported.",
        )
    write_manifest(manifest, report.kept)
    return manifest


def read_rows(folder: Path) -> list[Row]:
    """Rows of the report that lies beside a manifest; none where there is no report.

    Raises:
        CorpusError: it cannot be read.
    """
    path = folder / REPORT_NAME
    if not path.is_file():
        return []
    try:
        with path.open("rb") as file:
            return [TypeAdapter(Row).validate_json(line) for line in file if line.strip()]
    except (OSError, ValidationError) as error:
        raise CorpusError(
            f"{path} cannot be read ({error}).", "Check the corpus again: 'xded corpus check'."
        ) from error


def with_controls(candidates: Sequence[Candidate], controls: Collection[str], where: str) -> list[Candidate]:
    """The candidates with the role `control` for the named speakers; CorpusError for a name that nobody has."""
    require_speakers(controls, sorted({candidate.speaker for candidate in candidates}), where)
    return [replace(found, role="control") if found.speaker in controls else found for found in candidates]


def _refuse_clashes(candidates: Sequence[Candidate]) -> None:
    """Raises when two files claim one recording id: which of them is meant is not ours to guess."""
    first: dict[str, Path] = {}
    clashes = []
    for found in candidates:
        other = first.setdefault(found.recording, found.audio_filepath)
        if found.audio_filepath != other:
            clashes.append(f"'{found.recording}' is {other} and {found.audio_filepath}")
    if clashes:
        raise CorpusError(
            f"{len(clashes)} recordings lie in two places; the first: {clashes[0]}.",
            "Import the one folder that holds the copy you want.",
        )


def refuse_existing(folder: Path) -> None:
    """Raises CorpusError when a folder holds a manifest already; ask before the minutes that a check may take."""
    if (folder / MANIFEST_NAME).exists():
        raise CorpusError(f"{folder} already holds a corpus.", "Choose another folder with --out, or add --overwrite.")


def check_one(candidate: Candidate) -> tuple[Recording | None, Row | None]:
    """Reads one file once: the recording if it can be used, and a row if there is something to say."""
    path = candidate.audio_filepath
    if not candidate.text.strip():
        return None, Row(
            "rejected", path, f"{path} has no text.", "Write what was said, or remove the line.", "no text"
        )
    try:
        data = load_bytes(path)
        samples, sample_rate = decode(data, str(path))
    except CorpusError as error:
        return None, Row("rejected", path, error.problem, error.remedy, "unreadable")
    duration = len(samples) / sample_rate
    sha256 = hashlib.sha256(data).hexdigest()
    refusal = _contradiction(candidate, duration, sample_rate, sha256) or _silence(candidate, samples)
    if refusal is not None:
        return None, refusal
    fields = vars(candidate) | {"duration": duration, "sample_rate": sample_rate, "audio_sha256": sha256}
    share = float(np.mean(np.abs(samples) >= FULL_SCALE))
    if share > CLIPPED_SHARE:
        warning = Row("warning", path, f"{path} is clipped: {share:.1%} of its samples are at full scale.",
                      "Record with a lower gain; it is kept.", "clipped")  # fmt: skip
        return Recording(**fields), warning
    return Recording(**fields), None


def _contradiction(candidate: Candidate, duration: float, sample_rate: int, sha256: str) -> Row | None:
    """A row when the file is not what the corpus declares."""
    path = candidate.audio_filepath
    if candidate.sample_rate not in (None, sample_rate):
        return Row("rejected", path, f"{path} has {sample_rate} Hz; {candidate.sample_rate} Hz is declared.",
                   "Find the original file; a wrong rate shifts pitch and tempo.", "wrong rate")  # fmt: skip
    if candidate.duration is not None and abs(candidate.duration - duration) > DURATION_TOLERANCE_S:
        return Row("rejected", path, f"{path} lasts {duration:.3f} s; {candidate.duration:.3f} s is declared.",
                   "Copy it again from its source, or mend the duration in the manifest.", "wrong length")  # fmt: skip
    if candidate.audio_sha256 not in (None, sha256):
        return Row("rejected", path, f"{path} is not the file that was imported: its SHA-256 differs.",
                   "Restore the file, or import the corpus again (targets made from it are stale).",
                   "changed")  # fmt: skip
    return None


def _silence(candidate: Candidate, samples: np.ndarray) -> Row | None:
    """A row when nothing can be heard; a constant offset counts as silence. samples: float32 [N]."""
    peak = float(np.abs(samples - samples.mean()).max())
    if peak >= SILENT_PEAK:
        return None
    path = candidate.audio_filepath
    return Row("rejected", path, f"{path} is silent: its peak is {peak:.1e} of full scale.",
               "Check the microphone's channel, or leave the file out.", "silent")  # fmt: skip


def _without_duplicates(recordings: Sequence[Recording]) -> tuple[list[Recording], list[Row]]:
    """Of recordings with the same bytes keeps the first, or none when they disagree about who said what."""
    groups: dict[str | None, list[int]] = {}
    for index, recording in enumerate(recordings):
        groups.setdefault(recording.audio_sha256, []).append(index)
    refused: dict[int, Row] = {}
    for first, *rest in (group for group in groups.values() if len(group) > 1):
        agree = len({(recordings[index].speaker, recordings[index].text) for index in (first, *rest)}) == 1
        for index in rest if agree else (first, *rest):
            path = recordings[index].audio_filepath
            other = recordings[first if index != first else rest[0]].audio_filepath
            reason = f"{path} has the same bytes as {other}"
            reason += "." if agree else ", yet speaker or text differ: neither can be trusted."
            remedy = "The first is kept." if agree else "Find out which one is right and remove the other."
            refused[index] = Row("rejected", path, reason, remedy, "duplicate")
    kept = [recording for index, recording in enumerate(recordings) if index not in refused]
    return kept, list(refused.values())
