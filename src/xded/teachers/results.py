"""Results from elsewhere as what teachers said: every evaluation file of a folder, by teacher."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from xded.checks.readings import as_stored, preferred, read_with
from xded.corpus.manifest import Corpus
from xded.errors import ScoringError, XdedError, few
from xded.evaluations import EXPECTED, PREDICTIONS, SCORES, read_evaluation, recognise, with_takes
from xded.scoring import Prediction
from xded.tokenizer import Tokenizer

SUFFIXES: Final = (".txt", ".json", ".jsonl")
COMPANIONS: Final = ("decode.json",)  # how `xded teach` decoded its cross-test
PREFIXES: Final = ("wer_",)  # of SpeechBrain's reports
TEACHER: Final = "teacher_"


@dataclass(frozen=True)
class Results:
    """What lies in a folder.

    Attributes:
        said: predictions of each teacher, no recording twice.
        problems: one line for each file that was left out, with the reason.
        undecoded: files that hold token ids and were read as their texts are stored.
    """

    said: Mapping[str, list[Prediction]]
    problems: tuple[str, ...]
    undecoded: tuple[Path, ...]


def read_results(source: Path, tokenizers: Mapping[str, Tokenizer], corpus: Corpus | None = None) -> Results:
    """Reads every evaluation file of a folder (or one file) that `xded.evaluations` knows.

    A teacher is named by its file, `teacher_NAME.txt` or `NAME.json`; where the file is called after the speaker that
    it tests (SpeechBrain's `wer_M08.txt`) or after nothing (`predictions.jsonl`), by its folder. Files of one teacher
    on several speakers belong together.

    Args:
        source: the folder or file.
        tokenizers: to decode stored token ids with, by name; texts as stored where they are none.
        corpus: knows takes and speakers better than the recordings' names.

    Raises:
        ScoringError: no such folder, no file that can be an evaluation, or none that can be read.
    """
    paths = _files(source)
    take_of = {r.recording: r.take for r in corpus.recordings} if corpus else {}
    speaker_of = {r.recording: r.speaker for r in corpus.recordings} if corpus else {}
    said: dict[str, list[Prediction]] = {}
    problems: list[str] = []
    undecoded, seen = [], set()
    for path in paths:
        try:
            evaluation = with_takes(read_evaluation(path), take_of, speaker_of)
            if evaluation.path.resolve() in seen:
                continue  # scores.json and the predictions.jsonl beside it
            seen.add(evaluation.path.resolve())
            reading = preferred(read_with(evaluation, tokenizers)) or as_stored(evaluation)
            if not evaluation.items:
                raise ScoringError(f"{path} holds scores without outputs.", "Put its predictions.jsonl beside it.")
            if reading is None:
                raise ScoringError(f"{path} holds token ids only.", "Give their tokenizer with --tokenizer.")
            if evaluation.stated_count not in (None, len(evaluation.items)):
                raise ScoringError(
                    f"{path} says it holds {evaluation.stated_count} outputs and holds {len(evaluation.items)}.",
                    "Fetch it again, or evaluate again.",
                )
            name = teacher_of(path, source, evaluation.speakers)
            _add(said.setdefault(name, []), evaluation.predictions(reading.texts), path, name)
            if evaluation.has_tokens and evaluation.source != "predictions" and not tokenizers:
                undecoded.append(path)
        except XdedError as error:
            problems.append(str(error))
    said = {name: rows for name, rows in said.items() if rows}
    if not said:
        raise ScoringError(f"None of the {len(paths)} files in {source} can be read. {problems[0]}", "Mend it.")
    return Results(said, tuple(problems), tuple(undecoded))


def _files(source: Path) -> list[Path]:
    """Files that are evaluations, or should be: in a run folder only those that are."""
    inside = sorted(source.rglob("*")) if source.is_dir() else [source]
    found = []
    for path in inside:
        hidden = any(part.startswith(".") for part in path.relative_to(source).parts)
        if hidden or not path.is_file() or path.suffix not in SUFFIXES or path.name in COMPANIONS:
            continue
        in_run = any((path.parent / name).is_file() for name in (PREDICTIONS, SCORES))
        if not in_run or recognise(path) is not None:
            found.append(path)
    if not found:
        raise ScoringError(f"{source} holds no evaluation: {EXPECTED}.", "Give a folder of results, or of teachers.")
    return found


def teacher_of(path: Path, source: Path, speakers: Sequence[str]) -> str:
    """Name of the teacher whose outputs a file below `source` holds, on `speakers`."""
    name = path.name.removesuffix(f".{PREDICTIONS}") if path.name.endswith(f".{PREDICTIONS}") else path.stem
    if name.startswith(TEACHER) and name != TEACHER:
        return name.removeprefix(TEACHER)
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    generic = path.name in (PREDICTIONS, SCORES) or not name or [name] == list(speakers)
    return path.parent.name if generic and path.parent != source and path != source else name or path.stem


def _add(rows: list[Prediction], new: Sequence[Prediction], path: Path, name: str) -> None:
    """Adds a file's predictions to those of its teacher, all or none."""
    blank = [p.recording for p in new if not p.reference.strip()]
    if blank:
        raise ScoringError(f"{path} holds no reference for {few(blank)}.", "Give what was asked for, or leave it out.")
    twice = [recording for recording, count in Counter(p.recording for p in new).items() if count > 1]
    if twice:
        raise ScoringError(f"{path} holds {few(twice)} more than once.", "Keep one output of each recording.")
    known = {p.recording for p in rows}
    again = [p.recording for p in new if p.recording in known]
    if again:
        raise ScoringError(
            f"{path} holds {few(again)}, which another file of '{name}' holds too.",
            "Keep one of the files, or put the files of each model into a folder or under a name of its own.",
        )
    rows += new
