"""Faults of results: files that say something else than what was measured."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Final

from faults.plant_tokens import write_evaluation, write_study_file
from faults.workbench import Workbench, fault
from xded.scoring import read_predictions, write_predictions

FAMILY: Final = "results"


@fault("report retouched", FAMILY, "report-differs")
def retouched(bench: Workbench, out: Path) -> list[Path]:
    """The WRA in scores.json was 'corrected' by hand after the run, 12 points up."""
    run = bench.copy(bench.student, out / "run")
    scores = json.loads((run / "scores.json").read_text(encoding="utf-8"))
    for summary in (scores["overall"], *scores["by_speaker"].values(), *scores["by_band"].values()):
        for key in ("value", "low", "high"):
            summary["wra_percent"][key] = min(100.0, summary["wra_percent"][key] + 12.0)
    (run / "scores.json").write_text(json.dumps(scores), encoding="utf-8")
    return [run]


@fault("report of an older run", FAMILY, "report-differs")
def older_report(bench: Workbench, out: Path) -> list[Path]:
    """The run was repeated, the predictions are new, scores.json is still that of the attempt before."""
    run = bench.copy(bench.student, out / "run")
    shutil.copyfile(bench.scratch / "scores.json", run / "scores.json")
    return [run]


@fault("only the first word counts", FAMILY, "other-rule")
def first_word(bench: Workbench, out: Path) -> list[Path]:
    """Long recordings were decoded in two halves and joined, and an output is right when its first word is."""
    rows = sorted(bench.predictions(), key=lambda p: p.recording)
    joined = [
        replace(p, hypothesis=f"{p.hypothesis} {p.hypothesis[-2:]}") if number % 3 == 0 else p
        for number, p in enumerate(rows)
    ]

    def right(reference: str, hypothesis: str) -> bool:
        return hypothesis.upper().split()[:1] == [reference.upper()]

    return [write_study_file(out / "eval_T05_halves.json", joined, right=right)]


@fault("accuracy = 100 - WER", FAMILY, "out-of-range", "other-rule")
def hundred_minus_wer(bench: Workbench, out: Path) -> list[Path]:
    """A rambling model's word error rate was taken from 100: an accuracy of less than -1000 %."""
    rows = bench.predictions()
    said = [" ".join([p.hypothesis or "E", "THE OF"] * (5 + number % 5)) for number, p in enumerate(rows)]
    wer = 100 * sum(len(text.split()) for text in said) / len(rows)
    details = [
        {"id": p.recording, "audio_path": f"{p.recording}.flac", "reference": p.reference, "prediction": text}
        for p, text in zip(rows, said, strict=True)
    ]
    data = {"speaker_id": "T05", "num_utterances": len(rows), "wer": wer, "accuracy": 100 - wer, "details": details}
    out.mkdir(parents=True, exist_ok=True)
    path = out / "test_T05_averaged.json"
    path.write_text(json.dumps(data, indent=1), encoding="utf-8")
    return [path]


@fault("microphones counted as takes", FAMILY, "copies-as-takes")
def recordings_as_takes(bench: Workbench, out: Path) -> list[Path]:
    """A manifest of somebody's own gives every recording a take of its own: the interval is 1.7 times too narrow."""
    run = bench.copy(bench.student, out / "run")
    write_evaluation(run, [replace(p, take=p.recording) for p in bench.predictions()])
    return [run]


@fault("one result under two names", FAMILY, "same-file")
def two_names(bench: Workbench, out: Path) -> list[Path]:
    """The baseline's file is a copy of the student's, renamed."""
    files = [out / "eval_T05_student.jsonl", out / "eval_T05_teacher.jsonl"]
    out.mkdir(parents=True, exist_ok=True)
    for path in files:
        shutil.copyfile(bench.student / "predictions.jsonl", path)
    return files


@fault("another speaker in the file", FAMILY, "wrong-speaker")
def other_speaker(bench: Workbench, out: Path) -> list[Path]:
    """The loop over speakers wrote T05's results into T04's file."""
    return [write_study_file(out / "eval_T04.json", bench.predictions()), bench.corpus]


@fault("two speakers exchanged in a cross-test", FAMILY, "wrong-speaker")
def exchanged_in_crosstest(bench: Workbench, out: Path) -> list[Path]:
    """A folder with one file for each tested speaker; two were filled from each other's list."""
    rows = read_predictions(bench.teachers / "crosstest" / "T04.jsonl")
    other = {"T02": "T03", "T03": "T02"}
    out.mkdir(parents=True, exist_ok=True)
    for speaker in ("T01", "T02", "T03", "T05"):
        inside = other.get(speaker, speaker)
        write_predictions(out / f"parent_on_{speaker}.jsonl", [p for p in rows if p.speaker == inside])
    return [out]


@fault("outputs are names of other words", FAMILY, "renamed-words")
def renamed(bench: Workbench, out: Path) -> list[Path]:
    """The best word's number is looked up in a list sorted in another way than the one that was scored."""
    run = bench.copy(bench.student, out / "run")
    bench.evaluate(run, "--word-list")
    rows = bench.predictions_of(run)
    spoken = [word.upper() for word in bench.words]
    other = dict(zip(sorted(spoken), spoken, strict=True))
    write_evaluation(run, [replace(p, hypothesis=other[p.hypothesis], tokens=()) for p in rows])
    return [run / "predictions.jsonl"]
