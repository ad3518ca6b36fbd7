"""Faults of teachers and targets."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

import numpy as np
import torch

from faults.plant_training import around
from faults.workbench import HELD_OUT, Workbench, changed, fault, make_targets, write_audio, write_corpus, xded
from xded import config as configs
from xded.audio import read_audio
from xded.corpus.manifest import Recording
from xded.models import checkpoints
from xded.models.recogniser import load_recogniser
from xded.models.student import Student
from xded.scoring import Prediction, read_predictions, write_predictions
from xded.targets.aggregate import combine, top_k
from xded.targets.store import Entry, Index, Posterior, Store, StoreWriter, audio_hash, read_index
from xded.teachers import aggregation, posteriors
from xded.teachers.adapt import Teachers
from xded.training.data import TrainingData

FAMILY: Final = "teachers and targets"
Row = tuple[Entry, Posterior]


def rows_of(folder: Path) -> list[Row]:
    """Everything in a store."""
    store = Store(folder)
    return [(entry, store.read(entry.recording)) for entry in store.index.recordings]


def rewrite(folder: Path, rows: Iterable[Row], **index: object) -> None:
    """Replaces a store, its index but for the given keys as it was."""
    kept: Index = Store(folder).index.model_copy(update={"recordings": (), **index})
    listed = list(rows)
    shutil.rmtree(folder)
    writer = StoreWriter(folder, kept)
    for entry, posterior in listed:
        writer.add(entry, posterior)
    writer.close()


def averaged(rows: Sequence[Posterior], vocabulary: int) -> Posterior:
    """Mean over teachers, frame by frame, cut to the shortest."""
    frames = min(len(row.ids) for row in rows)
    cut = [Posterior(*(getattr(r, k)[:frames] for k in ("ids", "probabilities", "rest", "least_blank"))) for r in rows]
    mean = combine(cut, [1.0] * len(cut), "logprob_mean", vocabulary)
    return top_k(mean, 32, np.min([row.least_blank for row in cut], axis=0))


def reaggregated(targets: Path, vocabulary: int) -> None:
    """Averages the teachers' stores in a targets folder anew."""
    for kind in ("ctc", "decoder"):
        stores = [Store(folder) for folder in sorted((targets / "posteriors").glob(f"*/{kind}"))]
        rows = []
        for entry, _ in rows_of(targets / kind):
            mean = averaged([store.read(entry.recording) for store in stores], vocabulary)
            rows.append((replace(entry, steps=len(mean.ids)), mean))
        rewrite(targets / kind, rows)


def every_store(targets: Path) -> list[Path]:
    """Folders of all CTC stores of a targets folder, the aggregate's first."""
    return [targets / "ctc", *sorted((targets / "posteriors").glob("*/ctc"))]


def edit(bench: Workbench, out: Path, change: Callable[[list[Row]], Iterable[Row]], **index: object) -> Path:
    """The targets, every CTC store changed in the same way."""
    targets = bench.copy(bench.targets, out / "targets")
    for folder in every_store(targets):
        rewrite(folder, change(rows_of(folder)), **index)
    return targets


def names_of(targets: Path) -> list[str]:
    """The teachers of a targets folder."""
    return sorted(folder.name for folder in (targets / "posteriors").iterdir())


@fault("teachers of other recordings", FAMILY, "frame-count", "audio-hash", "spike-misalignment")
def other_recordings(bench: Workbench, out: Path) -> list[Path]:
    """Each teacher heard its own speaker say the prompt; frames are averaged as if of one recording (the study)."""
    targets = bench.copy(bench.targets, out / "targets")
    rows = {row.recording: row for row in bench.read().recordings}
    for name in names_of(targets):
        folder = targets / "posteriors" / name / "ctc"
        said = rows_of(folder)
        own = {(rows[e.recording].prompt, rows[e.recording].mic): (e, p) for e, p in said if e.recording[:3] == name}
        swapped = []
        for entry, posterior in said:
            row = rows[entry.recording]
            source, other = own.get((row.prompt, row.mic), (entry, posterior))
            swapped.append((replace(entry, steps=source.steps, true_log_prob=source.true_log_prob), other))
        rewrite(folder, swapped)
    reaggregated(targets, bench.tokenizer.size)
    return [targets, bench.corpus]


@fault("targets one row off", FAMILY, "target-text", "frame-count", "audio-hash")
def one_row_off(bench: Workbench, out: Path) -> list[Path]:
    """The list of recordings was sorted again after the posteriors had been written: every name is one row off."""
    hashes = {row.recording: audio_hash(row) for row in bench.read().recordings}

    def slip(rows: list[Row]) -> list[Row]:
        names = [entry.recording for entry, _ in rows]
        return [
            (replace(entry, recording=name, audio_sha256=hashes[name]), posterior)
            for name, (entry, posterior) in zip([*names[1:], names[0]], rows, strict=True)
        ]

    return [edit(bench, out, slip), bench.corpus]


@fault("audio changed after the targets", FAMILY, "audio-hash")
def audio_changed(bench: Workbench, out: Path) -> list[Path]:
    """The corpus was made louder after the targets had been computed."""

    def louder(row: Recording) -> Recording:
        path = out / "corpus" / "audio" / row.audio_filepath.name
        return row.model_copy(update={"audio_filepath": write_audio(path, 1.4 * read_audio(row.audio_filepath))})

    corpus = write_corpus(out / "corpus", changed(bench.read().recordings, lambda row: row.role == "target", louder))
    return [bench.targets, corpus]


@fault("one teacher copied into all", FAMILY, "copied-teacher", "effective-teachers")
def copied(bench: Workbench, out: Path) -> list[Path]:
    """The loop over teachers loads the first one's checkpoint every time; names and hashes are the others'."""
    targets = bench.copy(bench.targets, out / "targets")
    first, *others = names_of(targets)
    for name in others:
        for kind in ("ctc", "decoder"):
            folder = targets / "posteriors" / name / kind
            own = read_index(folder)
            shutil.rmtree(folder)
            shutil.copytree(targets / "posteriors" / first / kind, folder)
            names = {"teachers": own.teachers, "teacher_hashes": own.teacher_hashes, "provenance": own.provenance}
            index = read_index(folder).model_copy(update=names)
            (folder / "index.json").write_text(index.model_dump_json(), encoding="utf-8")
    reaggregated(targets, bench.tokenizer.size)
    return [targets, bench.corpus]


@fault("all weight on one teacher", FAMILY, "effective-teachers")
def one_weight(bench: Workbench, out: Path) -> list[Path]:
    """Reliability weights went through a softmax at a far too low temperature: one teacher has it all."""
    targets = bench.copy(bench.targets, out / "targets")
    names = names_of(targets)
    best = {e.recording: p for e, p in rows_of(targets / "posteriors" / names[0] / "ctc")}
    weights = {name: 1.0 if name == names[0] else 1e-10 for name in names}
    rows = [(replace(e, weight=weights), best[e.recording]) for e, _ in rows_of(targets / "ctc")]
    rewrite(targets / "ctc", rows, weighting="reliability")
    return [targets, bench.corpus]


@fault("posteriors that do not sum to one", FAMILY, "normalisation")
def not_normalised(bench: Workbench, out: Path) -> list[Path]:
    """Exponentials of logits were stored without dividing by their sum."""
    random = np.random.default_rng(0)

    def scale(rows: list[Row]) -> list[Row]:
        return [
            (e, replace(p, probabilities=p.probabilities * random.uniform(1.3, 3.0, (len(p.ids), 1)))) for e, p in rows
        ]

    return [edit(bench, out, scale), bench.corpus]


@fault("targets at another temperature", FAMILY, "temperature")
def other_temperature(bench: Workbench, out: Path) -> list[Path]:
    """Targets are at T = 4, the objective's T is 2, nobody compares."""
    targets = out / "targets"
    make_targets(bench, targets, "--temperature", 4)
    with patch("xded.training.preflight.check_temperature"):
        run = bench.train(out / "run", *bench.from_parent, "--targets", targets, "--ctc-kd", 1)
    return [bench.evaluate(run), targets]


@fault("temperature relabelled", FAMILY, "temperature")
def relabelled(bench: Workbench, out: Path) -> list[Path]:
    """Targets were made at T = 1; somebody wrote 2 into index.json so that training would take them."""
    targets = out / "targets"
    make_targets(bench, targets, "--temperature", 1)
    for folder in (*every_store(targets), *sorted(targets.rglob("decoder"))):
        path = folder / "index.json"
        data = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps({**data, "temperature": 2.0}), encoding="utf-8")
    return [targets, bench.corpus]


@fault("teachers without a common parent", FAMILY, "spike-misalignment", "blank-average")
def independent(bench: Workbench, out: Path) -> list[Path]:
    """Every teacher was trained from scratch, with its own seed: their CTC spikes have no reason to line up."""
    teachers = out / "teachers"
    shutil.copytree(bench.teachers, teachers, ignore=shutil.ignore_patterns("teachers", "crosstest*"))
    for seed, speaker in enumerate(("T01", "T03"), start=11):
        run = teachers / "teachers" / speaker
        bench.train(run, *bench.from_scratch, "--tokenizer", teachers / "tokenizer.model", "--seed", seed)
    targets = out / "targets"
    words = ("targets", "--config", bench.recipe, "--teachers", teachers, "--no-controls", "--out", targets)
    xded(*words, "--jobs", 1)
    return [targets, bench.corpus]


@fault("one teacher delayed", FAMILY, "spike-misalignment", "blank-average")
def delayed(bench: Workbench, out: Path) -> list[Path]:
    """One teacher's front end pads 0.24 s in front and keeps the length: its frames come 6 late."""
    extract = aggregation.extract

    def late(original: Callable[..., np.ndarray], self: TrainingData, *asked: Any) -> np.ndarray:
        heard = original(self, *asked)
        return np.concatenate([np.zeros_like(heard[:24]), heard])[: len(heard)]

    def one_late(teacher: Path, speaker: str, *rest: Any) -> None:
        with around(TrainingData, "features", late) if speaker == "T02" else nullcontext():
            extract(teacher, speaker, *rest)

    with patch.object(aggregation, "extract", one_late):
        make_targets(bench, out / "targets")
    return [out / "targets", bench.corpus]


@fault("a teacher that knows nothing", FAMILY, "teacher-accuracy", "partial-load")
def empty_teacher(bench: Workbench, out: Path) -> list[Path]:
    """One teacher's weights were not loaded before it was saved again: it is as it was initialised."""
    teachers = bench.copy(bench.teachers, out / "teachers")
    path = teachers / "teachers" / "T03" / "best.pt"
    payload, recogniser = checkpoints.load(path), load_recogniser(path)
    torch.manual_seed(1)
    fresh = Student(recogniser.config.model, recogniser.tokenizer.size, recogniser.config.features)
    checkpoints.save({**payload, "model_state_dict": fresh.state_dict()}, path)
    with patch("xded.teachers.adapt.teach", lambda *args, **more: Teachers(teachers)):  # only the cross-test
        xded("teach", "--config", bench.recipe, "--out", teachers, "--jobs", 1)
    return [teachers]


@fault("teacher-forced posteriors as predictions", FAMILY, "teacher-forced")
def teacher_forced(bench: Workbench, out: Path) -> list[Path]:
    """Teachers are reported by the argmax of posteriors that were given the true text (the study's 'verification')."""
    teachers, config = bench.copy(bench.teachers, out / "teachers"), configs.load(bench.recipe)
    rows = {row.recording: row for row in bench.read().recordings}
    for path in sorted((teachers / "crosstest").glob("*.jsonl")):
        before, folder = read_predictions(path), out / "posteriors" / path.stem
        tested = [rows[p.recording] for p in before]
        posteriors.extract(teachers / "teachers" / path.stem / "best.pt", path.stem, tested, config, folder)
        said: list[Prediction] = []
        store = Store(folder / "decoder")
        for prediction in before:
            posterior = store.read(prediction.recording)
            best = np.take_along_axis(posterior.ids, posterior.probabilities.argmax(1)[:, None], 1)[:-1, 0]
            text, tokens = bench.tokenizer.decode(best.tolist()), tuple(best.tolist())
            said.append(replace(prediction, hypothesis=text, tokens=tokens))
        write_predictions(path, said)
    return [teachers, out / "posteriors"]


@fault("teacher-forced posteriors not marked", FAMILY, "teacher-forced")
def not_marked(bench: Workbench, out: Path) -> list[Path]:
    """Another tool wrote the decoder posteriors on the true text and calls them free-running."""
    targets = bench.copy(bench.targets, out / "targets")
    for folder in sorted(targets.rglob("decoder")):
        rewrite(folder, rows_of(folder), teacher_forced=False)
    return [targets, bench.corpus]


@fault("targets of half of the speakers", FAMILY, "target-coverage")
def half_covered(bench: Workbench, out: Path) -> list[Path]:
    """Making targets crashed after two of four speakers; the folder looks finished and training takes what is there."""
    speakers = {row.recording: row.speaker for row in bench.read().recordings}

    def first_two(rows: list[Row]) -> list[Row]:
        return [row for row in rows if speakers[row[0].recording] in ("T01", "T02")]

    targets = edit(bench, out, first_two)
    run = bench.train(out / "run", *bench.from_parent, "--targets", targets, "--ctc-kd", 1)
    return [bench.evaluate(run), targets]


@fault("targets of slowed-down audio", FAMILY, "frame-count")
def slowed_down(bench: Workbench, out: Path) -> list[Path]:
    """Teachers heard the audio through a speed perturbation of 0.8 that had been left on."""
    features = TrainingData.features

    def stretched(self: TrainingData, *asked: Any) -> np.ndarray:
        heard = features(self, *asked)
        return heard[np.minimum((np.arange(round(len(heard) / 0.8)) * 0.8).astype(int), len(heard) - 1)]

    with patch.object(TrainingData, "features", stretched):
        make_targets(bench, out / "targets")
    return [out / "targets", bench.corpus]


@fault("the held-out speaker's teacher in the targets", FAMILY, "leakage")
def held_out_teacher(bench: Workbench, out: Path) -> list[Path]:
    """Targets come from the teachers of another fold, the one adapted to the held-out speaker among them; no guard."""
    targets = out / "targets"
    words = ("targets", "--config", bench.recipe, "--teachers", bench.teachers_of_three, "--no-controls")
    with patch("xded.teachers.aggregation.guard"):
        xded(*words, "--exclude", "T03", "--held-out", "C01", "--out", targets, "--jobs", 1)
    with patch("xded.training.preflight.guard"):
        run = bench.train(out / "run", *bench.from_parent, "--exclude", "T03", "--targets", targets, "--ctc-kd", 1)
    assert HELD_OUT in names_of(targets)
    return [bench.evaluate(run, "--held-out", HELD_OUT), targets]
