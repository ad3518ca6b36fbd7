"""Corpora and bare lists: every line, and a sample of the audio."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from xded.checks import data, labels, recordings
from xded.checks.data import few
from xded.config import FeatureConfig
from xded.corpus.checks import Row, as_candidate, check_one, read_rows
from xded.corpus.manifest import PROBLEMS_SHOWN, REMEDY, Corpus, Problem, Recording, load_object, read_all
from xded.doctor import heard
from xded.doctor.given import Given
from xded.doctor.listings import Listing
from xded.errors import CorpusError, XdedError
from xded.findings import Examination, Finding
from xded.objectives import ctc_frames_needed
from xded.tokenizer import Tokenizer

SAMPLE = 600  # recordings that are opened: a second or two; a fault of 1 % of the files is missed once in 400 times
SAMPLE_SEED = 0
SUBSAMPLING = 4  # of every encoder here: frames of features to an encoded frame


def is_manifest(path: Path) -> bool:
    """Whether a file's first line is that of a manifest."""
    try:
        with path.open("rb") as file:
            first = file.readline(1_000_000)
        return "audio_filepath" in load_object(first.decode("utf-8"))
    except (OSError, ValueError):
        return False


def read_leniently(path: Path, examination: Examination) -> Corpus | None:
    """A manifest with whatever lines can be read; what `read_corpus` would refuse becomes findings.

    Args:
        path: the manifest, or the folder that holds it.
        examination: takes the findings.

    Returns:
        The corpus with its contradictions; None when no line is a recording.
    """
    try:
        corpus, problems = read_all(path)
    except CorpusError as error:
        examination.cannot(str(path), str(error))
        return None
    if not corpus.recordings:
        examination.cannot(
            str(corpus.path),
            f"none of its {len(problems):,} lines is a recording (line {problems[0].line}: {problems[0].what}); "
            "a NeMo manifest becomes a corpus with 'xded corpus import nemo'.",
        )
        return None
    examination.run("audio-files", str(corpus.path), lambda: refused(corpus, problems), "all lines")
    return corpus


def refused(corpus: Corpus, problems: Sequence[Problem]) -> list[Finding]:
    """Findings about lines that `read_corpus` refuses. Files that recordings share are found by other checks."""
    lines = len(corpus.recordings) + sum(problem.kind == "line" for problem in problems)
    findings = []
    for check, kinds, what in (
        ("audio-files", {"audio"}, "lines name audio that is not there"),
        ("audio-files", {"line"}, "lines cannot be read"),
        ("duplicates", {"id"}, "lines use a recording id again"),
        ("labels", {"take"}, "lines disagree with another line of their take about speaker, prompt or text"),
        ("labels", {"speaker"}, "lines disagree with their speaker's other lines about role or band"),
    ):
        found = sorted(problem for problem in problems if problem.kind in kinds)
        if found:
            shown = "; ".join(f"line {problem.line}: {problem.what}" for problem in found[:PROBLEMS_SHOWN])
            findings.append(Finding(
                check, "refuse", str(corpus.path), f"{len(found):,} of {lines:,} {what}: {shown}.",
                "xded refuses the manifest; a tool that does not, trains on less or on something else.", REMEDY,
                {"lines": len(found), "of": lines},
            ))  # fmt: skip
    return findings


def examine(examination: Examination, given: Given) -> None:
    """Runs every check on corpora, lists, and what runs have heard."""
    runs = [heard.read(examination, given, run) for run in given.runs]
    tokenizers = _tokenizers(examination, given, runs)
    features = next((run.config.features for run in runs if run.config is not None), FeatureConfig())
    same: dict[str, str] = {}  # take -> what was really spoken, for copies
    for corpus in given.corpora:
        _manifest(examination, corpus)
        same |= data.spoken_takes(corpus.recordings) | labels.takes_of_same_bytes(_audio(examination, corpus))
        for name, tokenizer in (tokenizers or {"letter by letter": None}).items():
            spelled = partial(_spelled, corpus, tokenizer, name, features)
            examination.run("unspellable", str(corpus.path), spelled, name)
    if given.listings:
        _lists(examination, given.listings)
    heard.examine(examination, runs, given, same)


def _tokenizers(examination: Examination, given: Given, runs: Sequence[heard.Run]) -> dict[str, Tokenizer | None]:
    """Every different tokenizer that was given, or that teachers and runs bring along."""
    found = {str(path): tokenizer for path, tokenizer in given.tokenizers.items()}
    for teachers in given.teachers:
        try:
            found[str(teachers.tokenizer)] = Tokenizer.load(teachers.tokenizer, "upper")
        except XdedError as error:
            examination.cannot(str(teachers.tokenizer), str(error))
    found |= {f"tokenizer of {run.path}": run.tokenizer for run in runs if run.tokenizer is not None}
    different = {tokenizer.fingerprint: name for name, tokenizer in reversed(found.items())}
    return {name: found[name] for name in different.values()}


def _manifest(examination: Examination, corpus: Corpus) -> None:
    """What the lines alone say."""
    rows, subject = corpus.recordings, str(corpus.path)
    detail = f"{len(rows):,} recordings of {len(corpus.speakers)} speakers"
    examination.run("truncated-copy", subject, partial(recordings.truncated_copy, rows), detail)
    examination.run("shared-takes", subject, partial(data.copies_with_own_takes, rows, subject), detail)
    examination.run(
        "labels", subject, lambda: labels.labels(rows, subject) or labels.misnamed_words(rows, subject), detail
    )


def _audio(examination: Examination, corpus: Corpus) -> list[Recording]:
    """What a sample of the files says, and the report of the import; the recordings with the SHA-256 that is known."""
    rows, subject = corpus.recordings, str(corpus.path)
    opened = open_some(rows)
    hashes = {known.audio_filepath: known.audio_sha256 for _, known, _ in opened if known is not None}
    hashed = [
        row if row.audio_sha256 else row.model_copy(update={"audio_sha256": hashes.get(row.audio_filepath)})
        for row in rows
    ]
    said = [(recording, row) for recording, _, row in opened]
    detail = f"{len(opened):,} of {len(rows):,} opened"
    if len(opened) < len(rows):
        detail += f"; 'xded corpus check {corpus.path.parent}' opens all"
    examination.run("wrong-audio", subject, partial(labels.wrong_files, hashed, subject), "names and bytes of files")
    examination.run("duplicates", subject, partial(labels.duplicates, hashed, subject), "names and bytes of files")
    examination.run("sample-rate", subject, partial(recordings.sample_rates, hashed, subject), "as declared")
    for check in recordings.KINDS:
        examination.run(check, subject, partial(recordings.heard, check, said, subject), detail)
    examination.run("audio-files", subject, partial(_imported, corpus), "report of the import")
    return hashed


def _imported(corpus: Corpus) -> list[Finding]:
    """What the report of the import says, which opened every file."""
    report = read_rows(corpus.path.parent)
    return recordings.left_out(report, len(corpus.recordings), str(corpus.path))


def open_some(rows: Sequence[Recording], most: int = SAMPLE) -> list[tuple[Recording, Recording | None, Row | None]]:
    """Opens a sample of the recordings, drawn evenly over speakers, always the same.

    Returns:
        Each recording, what its file really is (None when it cannot be used), and a row when something is wrong.
        Files that are not there are left out.
    """
    random = np.random.default_rng(SAMPLE_SEED)
    turns: dict[str, int] = {}
    order = []
    for place in random.permutation(len(rows)).tolist():
        speaker = rows[place].speaker
        turns[speaker] = turns.get(speaker, -1) + 1
        order.append((turns[speaker], speaker, place))
    drawn = [rows[place] for _, _, place in sorted(order)[:most]]
    there = [row for row in drawn if row.audio_filepath.is_file()]
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        outcomes = pool.map(lambda row: check_one(as_candidate(row)), there)
        return [(row, known, problem) for row, (known, problem) in zip(there, outcomes, strict=True)]


def _spelled(corpus: Corpus, tokenizer: Tokenizer | None, name: str, config: FeatureConfig) -> list[Finding]:
    """Frames that CTC needs and has for every recording."""
    hop_samples = round(config.hop_s * config.sample_rate)
    needed = {
        text: ctc_frames_needed(tokenizer.encode(text) if tokenizer else [ord(sign) for sign in text if sign.strip()])
        for text in corpus.texts
    }
    rows = [
        (row.recording, needed[row.text], -(-(round(row.duration * config.sample_rate) // hop_samples) // SUBSAMPLING))
        for row in corpus.recordings
    ]
    return data.unspellable(rows, name, str(corpus.path))


def _lists(examination: Examination, listings: Sequence[Listing]) -> None:
    """What bare lists say, together: each alone cannot know what is missing."""
    rows = [row for listing in listings for row in listing.recordings]
    where = str(listings[0].path) if len(listings) == 1 else f"{len(listings)} lists in {listings[0].path.parent}"
    detail = f"{len(rows):,} recordings of {few(sorted({row.speaker for row in rows}))}"
    examination.run("truncated-copy", where, partial(recordings.truncated_copy, rows), detail)
    examination.run("labels", where, partial(labels.labels, rows, where), detail)
    examination.run("shared-takes", where, partial(data.copies_with_own_takes, rows, where), detail)
    for listing in listings:
        own, subject = listing.recordings, str(listing.path)
        fewer = partial(recordings.fewer_than_declared, listing.declared, len(own), subject)
        examination.run("truncated-copy", subject, fewer, "declared number")
        examination.run("wrong-audio", subject, partial(labels.of_others, listing.speaker, own, subject), "ids")
        examination.run("duplicates", subject, partial(labels.ids_twice, own, subject), "ids")
