"""Results made elsewhere as rows of a study: recomputed from their token ids, what they reported kept apart."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from xded.checks.readings import as_stored, preferred, read_with
from xded.doctor.examine import examine_all
from xded.errors import XdedError
from xded.evaluations import PREDICTIONS, Evaluation, read_evaluation, recognise
from xded.findings import Finding
from xded.scoring import Estimate, Prediction, read_predictions, write_predictions
from xded.study.outcome import Result
from xded.study.plan import StudyError
from xded.teachers.crosstest import wra
from xded.tokenizer import Tokenizer
from xded.training.status import write_atomically

FOLDER = "imported"
SAID = "imported.json"

# what the files of the reference study are in its history (see the built-in study `debug`)
REFERENCE_NAMES = {
    "eval_M08_nemo_decoder": "original",
    "eval_M08_debug": "included",
    "eval_M08_nemo_ctc_final": "CTC-KD",
    "eval_M08_nemo_ctc": "original, read through its CTC head",
    "eval_nemo_pretrained_M08": "zero-shot",
}


@dataclass(frozen=True)
class Imported:
    """An evaluation file as an attempt.

    Attributes:
        name: row in the table; evaluation: the file as it was read.
        predictions: recomputed; how: from what ("ids with tokenizer.model", "texts as stored").
        reported_percent: WRA that the file says; none where it says nothing.
        recomputed: WRA of `predictions`, whole output, with its interval over takes.
        findings: what the doctor says about the file, worst first, notes left out.
    """

    name: str
    evaluation: Evaluation
    predictions: tuple[Prediction, ...]
    how: str
    reported_percent: float | None
    recomputed: Estimate
    findings: tuple[Finding, ...]


def evaluation_files(paths: Iterable[Path]) -> list[Path]:
    """The evaluation files among files and folders, sorted by name.

    Raises:
        StudyError: there is none, or a file that was named is none.
    """
    found: list[Path] = []
    for path in paths:
        inside = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        known = [p for p in inside if p.is_file() and recognise(p) is not None]
        if not known:
            raise StudyError(
                f"{path} holds no evaluation that xded knows.", "Give files of 'xded evaluate' or the like."
            )
        found += known
    return list({path.resolve(): path for path in found}.values())


def read_all(paths: Iterable[Path], tokenizers: Mapping[str, Tokenizer]) -> tuple[list[Imported], list[str]]:
    """Every file recomputed; files that cannot be read are returned as lines of text, and the others are read.

    Args:
        paths: files and folders; tokenizers: by name, to decode stored ids with.

    Raises:
        StudyError: no file could be read.
    """
    rows, unread = [], []
    for path in evaluation_files(paths):
        try:
            rows.append(_read(path, tokenizers))
        except XdedError as error:
            unread.append(f"{path}: {error}")
    if not rows:
        raise StudyError(
            f"None of {len(unread)} files can be imported. {unread[0]}",
            "Give files that hold outputs, and the tokenizer of their ids with --tokenizer.",
        )
    return _with_distinct_names(rows), unread


def _read(path: Path, tokenizers: Mapping[str, Tokenizer]) -> Imported:
    evaluation = read_evaluation(path)
    if not evaluation.items:
        raise StudyError(f"{path} holds no outputs.", "Give the predictions too.")
    reading = preferred(read_with(evaluation, tokenizers)) or as_stored(evaluation)
    if reading is None:
        raise StudyError(f"{path} holds token ids only.", "Give their tokenizer with --tokenizer.")
    shift = f", shifted by {reading.shift}" if reading.shift else ""
    how = f"ids with {reading.tokenizer}{shift}" if reading.tokenizer in tokenizers else "texts as stored"
    predictions = tuple(evaluation.predictions(reading.texts))
    examined = examine_all([path]).at_least("warn")
    return Imported(
        REFERENCE_NAMES.get(path.stem, path.stem),
        evaluation,
        predictions,
        how,
        evaluation.reported.get("wra"),
        wra(predictions, evaluation.normaliser),
        tuple(examined),
    )


def _with_distinct_names(rows: Sequence[Imported]) -> list[Imported]:
    """Files of one name in two folders keep both: the later ones get their folder's name."""
    seen: Counter[str] = Counter()
    named = []
    for row in rows:
        seen[_as_folder(row.name)] += 1
        count = seen[_as_folder(row.name)]
        name = row.name if count == 1 else f"{row.name} ({row.evaluation.path.parent.name}, {count})"
        named.append(Imported(**{**vars(row), "name": name}))
    return named


def _as_folder(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_" else "_" for c in name)


def keep(rows: Iterable[Imported], out: Path) -> None:
    """Writes each row to OUT/imported/NAME: recomputed predictions, and what the file said of itself."""
    for row in rows:
        folder = out / FOLDER / _as_folder(row.name)
        folder.mkdir(parents=True, exist_ok=True)
        write_predictions(folder / PREDICTIONS, row.predictions)
        said = {"name": row.name, "file": str(row.evaluation.path), "reported_percent": row.reported_percent}
        write_atomically(folder / SAID, json.dumps(said, indent=1))


def imported_results(out: Path) -> list[Result]:
    """What `keep` has left in a study's folder, as rows of the study: the speakers of a file are its fold."""
    results = []
    for path in sorted((out / FOLDER).glob(f"*/{SAID}")):
        said = json.loads(path.read_text(encoding="utf-8"))
        predictions = read_predictions(path.with_name(PREDICTIONS))
        speakers = tuple(sorted({p.speaker for p in predictions}))
        reported = said["reported_percent"]
        name = f"{said['name']} (imported)"  # the study may have an attempt of that name
        results.append(Result(name, "imported", speakers, {"open": predictions}, (path.parent,), reported))
    return results
