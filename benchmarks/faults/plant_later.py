"""Faults planted when the doctor was finished: its checks were developed beside the others, and never saw these."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from faults.plant_data import from_parent_with_split, with_audio
from faults.plant_targets import Row, names_of, rewrite, rows_of
from faults.plant_tokens import redecoded, write_evaluation, write_study_file
from faults.plant_training import around, started_with
from faults.workbench import Workbench, changed, fault, write_corpus
from xded.corpus.folds import Split
from xded.corpus.manifest import Recording
from xded.models.student import Student
from xded.targets.store import Posterior
from xded.training.data import TrainingData
from xded.training.schedule import Schedule


@fault("ids decoded two low", "tokens and text", "token-offset")
def ids_two_low(bench: Workbench, out: Path) -> list[Path]:
    """Another toolkit keeps two rows for padding and start: 2 is taken from every id; the tokenizer lies beside it."""
    tokenizer = bench.teachers / "tokenizer.model"
    rows = redecoded(bench, bench.tokenizer, 2)
    return [write_study_file(out / "eval_T05_two.json", rows, offset=2, tokenizer=tokenizer), tokenizer]


@fault("references with dots", "tokens and text", "normaliser-mismatch", "unreachable-prompts")
def dotted_references(bench: Workbench, out: Path) -> list[Path]:
    """The test's word list spells every word out, 'S.I.X.', where training had 'six'."""
    run = bench.copy(bench.student, out / "run")
    dotted = {p.reference: "".join(f"{letter}." for letter in p.reference) for p in bench.predictions()}
    write_evaluation(run, [replace(p, reference=dotted[p.reference]) for p in bench.predictions()])
    return [run]


@fault("two words exchanged in one speaker's sheet", "data", "labels")
def two_words_exchanged(bench: Workbench, out: Path) -> list[Path]:
    """In one speaker's sheet 'six' and 'seven' changed places."""
    other = {"six": "seven", "seven": "six"}
    rows = changed(
        bench.read().recordings,
        lambda row: row.speaker == "T02" and row.text in other,
        lambda row: row.model_copy(update={"text": other[row.text], "prompt": other[row.text]}),
    )
    return [write_corpus(out / "corpus", rows)]


@fault("held-out speaker chooses the checkpoint", "data", "leakage")
def chosen_on_the_test(bench: Workbench, out: Path) -> list[Path]:
    """Validation is the test speaker: the best checkpoint is the one that is best on the test. The guard is off."""

    def selected(parts: Split) -> Split:
        return replace(parts, validation=parts.test)

    return [bench.evaluate(from_parent_with_split(bench, out / "run", selected))]


@fault("a microphone at a thousandth of its level", "data", "silence")
def hardly_audible(bench: Workbench, out: Path) -> list[Path]:
    """One preamplifier was off: what is left is in the last bits."""
    return [with_audio(bench, out / "corpus", lambda row: (row.speaker, row.mic) == ("T01", "M5"), lambda a: a / 4000)]


@fault("another speaker's files fill the gaps", "data", "duplicates", "wrong-audio")
def borrowed(bench: Workbench, out: Path) -> list[Path]:
    """One speaker's third block was lost; copies of another speaker's files stand in for it."""
    rows = {row.recording: row for row in bench.read().recordings}

    def borrow(row: Recording) -> Recording:
        source = rows[row.recording.replace("T02", "T03")]
        path = out / "corpus" / "audio" / f"{row.recording}.flac"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(source.audio_filepath.read_bytes())
        return row.model_copy(update={"audio_filepath": path, "duration": source.duration})

    lost = changed(list(rows.values()), lambda row: (row.speaker, row.block) == ("T02", "B3"), borrow)
    return [write_corpus(out / "corpus", lost)]


@fault("decoder targets one step late", "teachers and targets", "target-text")
def one_step_late(bench: Workbench, out: Path) -> list[Path]:
    """The teachers' decoders were read one step late: each step's distribution is that of the token before."""
    targets = bench.copy(bench.targets, out / "targets")

    def late(rows: list[Row]) -> list[Row]:
        keys = ("ids", "probabilities", "rest", "least_blank")
        return [(e, Posterior(*(np.roll(getattr(p, key), 1, axis=0) for key in keys))) for e, p in rows]

    for folder in (targets / "decoder", *(targets / "posteriors" / name / "decoder" for name in names_of(targets))):
        rewrite(folder, late(rows_of(folder)))
    return [targets, bench.corpus]


@fault("frame rate of another front end", "teachers and targets", "frame-count")
def other_frame_rate(bench: Workbench, out: Path) -> list[Path]:
    """The index says 50 frames a second where it is 25: alignment by time puts every target into the first half."""
    targets = bench.copy(bench.targets, out / "targets")
    for path in sorted(targets.rglob("ctc/index.json")):
        data = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps({**data, "frame_rate_hz": 50.0}), encoding="utf-8")
    return [targets, bench.corpus]


@fault("encoder under no_grad", "model and training", "no-gradient")
def encoder_no_grad(bench: Workbench, out: Path) -> list[Path]:
    """The encoder runs under torch.no_grad 'for speed': both heads learn on random features."""
    with patch.object(Student, "encode", torch.no_grad()(Student.encode)):
        run = bench.train(out / "run", *bench.from_scratch)
    return [bench.evaluate(run)]


@fault("learning rate falls to nothing after a third", "model and training", "learning-rate")
def ends_early(bench: Workbench, out: Path) -> list[Path]:
    """The cosine was given the updates of another run: it is over after a third of this one."""

    def early(original: Callable[..., float], self: Schedule, update: int) -> float:
        return original(self, 3 * update) if 3 * update < self.updates else 1e-8

    with around(Schedule, "learning_rate", early):
        run = bench.train(out / "run", *bench.from_scratch)
    return [bench.evaluate(run)]


@fault("decoder not loaded", "model and training", "partial-load")
def decoder_not_loaded(bench: Workbench, out: Path) -> list[Path]:
    """The parent's decoder is left out by a filter on names; nobody compares."""

    def loose(student: Student, weights: Mapping[str, Tensor], path: Path) -> None:
        kept = {key: value for key, value in weights.items() if not key.startswith(("decoder", "embedding"))}
        student.load_state_dict(kept, strict=False)

    return started_with(loose, bench, out)


@fault("first microphone for all", "data", "wrong-audio")
def one_microphone(bench: Workbench, out: Path) -> list[Path]:
    """The loader drops the microphone from the file's name and opens the first one that it finds."""
    start = TrainingData.__init__

    def init(self: TrainingData, *args: Any, **more: Any) -> None:
        start(self, *args, **more)
        self.recordings = [
            row.model_copy(update={"audio_filepath": row.audio_filepath.with_name(f"{row.take}_M3.flac")})
            for row in self.recordings
        ]

    with patch.object(TrainingData, "__init__", init):
        run = bench.train(out / "run", *bench.from_parent)
    return [bench.evaluate(run)]


@fault("only the good takes reported", "results", "report-differs")
def good_takes_only(bench: Workbench, out: Path) -> list[Path]:
    """scores.json was made of the takes that were right, predictions.jsonl holds all of them."""
    run = bench.copy(bench.student, out / "run")
    rows = bench.predictions()
    right = {p.take for p in rows if p.hypothesis.upper() == p.reference.upper()}
    write_evaluation(run, [p for p in rows if p.take in right])
    (run / "predictions.jsonl").write_bytes((bench.student / "predictions.jsonl").read_bytes())
    return [run]
