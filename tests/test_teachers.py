"""Parent, teachers, their posteriors and targets, on a corpus of tones; training with the targets."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tiny_corpus import tiny_config, write_corpus
from xded.config import Config
from xded.corpus.folds import make_fold
from xded.corpus.manifest import Corpus
from xded.errors import CorpusError, LeakageError
from xded.models.checkpoints import load, sha256_of
from xded.models.recogniser import load_recogniser, provenance_of
from xded.scoring import Prediction
from xded.targets.aggregate import combine, dense
from xded.targets.store import Index, Store, TargetError, read_index
from xded.teachers import crosstest
from xded.teachers.adapt import Teachers, parts_of, teach
from xded.teachers.aggregation import make_targets
from xded.teachers.posteriors import posteriors_of
from xded.tokenizer import Tokenizer
from xded.training import run
from xded.training.data import TrainingData, collate
from xded.training.evaluation import batches
from xded.training.job import Job
from xded.training.loop import Loop
from xded.training.run import fit
from xded.training.status import read_status

ONE_EPOCH = {"batch_size": 8, "threads": 1, "device": "cpu", "stages": [{"epochs": 1, "peak_lr": 1e-3}]}
CONTROLS, TARGETS = ("c1", "c2"), ("t1", "t2", "t3", "t4", "t5", "t6")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return write_corpus(tmp_path_factory.mktemp("corpus"), CONTROLS, TARGETS)


def config_of(held_out: Sequence[str] = ("t6",), **sections: Any) -> Config:
    """A config in which the parent hears controls only (so that teachers of any fold may be left out)."""
    teach_section = {"parent": ONE_EPOCH, "teacher": ONE_EPOCH, "parent_on": "controls", **sections.pop("teach", {})}
    fold = {"held_out": held_out, **sections.pop("fold", {})}
    return tiny_config(teach=teach_section, fold=fold, target={"top_k": 3, **sections.pop("target", {})}, **sections)


@pytest.fixture(scope="module")
def teachers(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Teachers:
    """Of all target speakers but t6."""
    return teach(corpus, config_of(), tmp_path_factory.mktemp("teachers"), quiet=True)


def targets_of(
    corpus: Corpus, teachers: Teachers, config: Config, out: Path
) -> tuple[dict[Any, Index], Sequence[Any], Any]:
    fold = make_fold(corpus, config.fold)
    parts = parts_of(corpus, fold, config)
    return make_targets(corpus, teachers, fold, parts.train, config, out), parts.train, parts


def heard_by(checkpoint: Path) -> set[str]:
    return {speaker for p in provenance_of(load(checkpoint)) for speaker in p.speakers}


# --- parent and teachers -----------------------------------------------------------------------------------


def test_every_target_speaker_of_the_fold_gets_a_teacher_who_heard_no_one_else(teachers: Teachers) -> None:
    assert teachers.finished == ("t1", "t2", "t3", "t4", "t5")
    assert heard_by(teachers.parent / "best.pt") == {"c1", "c2"}
    for speaker in teachers.finished:
        payload = load(teachers.teacher(speaker) / "best.pt")
        assert payload["name"] == f"teacher {speaker}"
        assert heard_by(teachers.teacher(speaker) / "best.pt") == {"c1", "c2", speaker}
        assert payload["tokenizer_fingerprint"] == Tokenizer.load(teachers.tokenizer, "upper").fingerprint


def test_teaching_again_trains_nothing(corpus: Corpus, teachers: Teachers, monkeypatch: pytest.MonkeyPatch) -> None:
    files = sorted(teachers.folder.rglob("*.pt"))
    before = [path.stat().st_mtime_ns for path in files]
    monkeypatch.setattr(run, "Student", None)  # anything that builds a model would fail
    teach(corpus, config_of(), teachers.folder, quiet=True)
    assert [path.stat().st_mtime_ns for path in files] == before


def test_a_stopped_teach_goes_on_with_the_teacher_under_way(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(("t3", "t4", "t5", "t6"))
    step, calls = Loop.training_step, iter(range(100))

    def training_step(self: Loop, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.out.name == "t2" and next(calls) == 0:
            raise KeyboardInterrupt
        return step(self, batch, batch_idx)

    monkeypatch.setattr(Loop, "training_step", training_step)
    with pytest.raises(Exception, match="--resume"):
        teach(corpus, config, tmp_path, quiet=True)
    assert Teachers(tmp_path).finished == ("t1",)
    first = sha256_of(Teachers(tmp_path).teacher("t1") / "best.pt")
    teach(corpus, config, tmp_path, quiet=True)
    assert Teachers(tmp_path).finished == ("t1", "t2")
    assert sha256_of(Teachers(tmp_path).teacher("t1") / "best.pt") == first


@pytest.mark.parametrize(
    ("which", "heard"),
    [("controls", {"c1", "c2"}), ("fold", {"t1", "t2"}), ("both", {"c1", "c2", "t1", "t2"})],
)
def test_the_parent_hears_whom_it_should(corpus: Corpus, tmp_path: Path, which: str, heard: set[str]) -> None:
    config = config_of(("t6",), teach={"parent_on": which}, fold={"exclude": ("t3", "t4", "t5")})
    made = teach(corpus, config, tmp_path, quiet=True, speakers=["t1"])
    assert heard_by(made.parent / "best.pt") == heard
    assert made.finished == ("t1",)


def test_a_corpus_without_controls_needs_the_folds_speakers(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", takes=1)
    with pytest.raises(CorpusError, match="no control speaker to train a parent on") as error:
        teach(corpus, config_of(("t2",)), tmp_path / "teachers", quiet=True)
    assert "--parent-on fold" in error.value.remedy


def test_a_fold_without_target_speakers_has_no_teachers(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", ("c1",), ("t1",), takes=2)
    with pytest.raises(CorpusError, match="no target speaker left to be a teacher"):
        teach(corpus, config_of(("t1",)), tmp_path / "teachers", quiet=True)


def test_other_settings_do_not_pass_for_the_finished_ones(corpus: Corpus, teachers: Teachers) -> None:
    with pytest.raises(Exception, match=r"fold.held_out was \['t6'\], now \['t5'\]"):
        teach(corpus, config_of(("t5",)), teachers.folder, quiet=True)


def test_speakers_kept_for_validation_get_no_teacher(corpus: Corpus, tmp_path: Path) -> None:
    fold = {"exclude": ("t3", "t4"), "validation": "speakers", "validation_fraction": 0.3}
    config = config_of(("t6",), fold=fold)
    parts = parts_of(corpus, make_fold(corpus, config.fold), config)
    (kept,) = {r.speaker for r in parts.validation}
    made = teach(corpus, config, tmp_path, quiet=True)
    assert set(made.finished) == {"t1", "t2", "t5"} - {kept}


# --- targets -----------------------------------------------------------------------------------------------


def test_same_audio_targets_are_the_mean_of_what_every_teacher_says(
    corpus: Corpus, teachers: Teachers, tmp_path: Path
) -> None:
    config = config_of(fold={"exclude": ("t3", "t4", "t5")}, target={"top_k": 99, "aggregation": "prob_mean"})
    made, train, _ = targets_of(corpus, teachers, config, tmp_path)
    assert set(made) == {"ctc", "decoder"}
    assert {r.speaker for r in train} == {"c1", "c2", "t1", "t2"}
    for kind, index in made.items():
        assert index.teachers == ("t1", "t2")
        assert index.teacher_hashes == {s: sha256_of(teachers.teacher(s) / "best.pt") for s in ("t1", "t2")}
        assert (index.temperature, index.heard, index.teacher_forced) == (2.0, "same_audio", kind == "decoder")
        assert [e.recording for e in index.recordings] == [r.recording for r in train]
        assert index.recordings[0].audio_sha256 == sha256_of(train[0].audio_filepath)
        assert index.effective_teachers == pytest.approx(2.0)
    recogniser = {s: load_recogniser(teachers.teacher(s) / "best.pt") for s in ("t1", "t2")}
    data = TrainingData(train, recogniser["t1"].student.front_end, recogniser["t1"].tokenizer)
    places, batch = next(iter(batches(data, 8)))
    said = {s: posteriors_of(recogniser[s], batch, config) for s in recogniser}
    for row, place in enumerate(places):
        for kind in made:
            expected = combine([said[s][row][kind][0] for s in said], [1, 1], "prob_mean", 7)
            stored = Store(tmp_path / kind).read(train[place].recording)
            np.testing.assert_allclose(dense(stored, 7), expected, atol=2e-3)
            if kind == "ctc":
                blank = np.minimum(*(said[s][row]["ctc"][0].least_blank for s in said))
                np.testing.assert_allclose(stored.least_blank, blank, atol=2e-3)


def test_posteriors_do_not_depend_on_the_batch(corpus: Corpus, teachers: Teachers) -> None:
    recogniser, config = load_recogniser(teachers.teacher("t1")), config_of()
    data = TrainingData(corpus.recordings[:6], recogniser.student.front_end, recogniser.tokenizer)
    rows = [data[(0, i)] for i in range(6)]
    together = posteriors_of(recogniser, collate(rows, 2), config)
    for row, heard in zip(rows, together, strict=True):
        (alone,) = posteriors_of(recogniser, collate([row], 2), config)
        for kind in ("ctc", "decoder"):
            np.testing.assert_allclose(alone[kind][0].probabilities, heard[kind][0].probabilities, atol=1e-5)
            assert alone[kind][1] == pytest.approx(heard[kind][1], abs=1e-4)
            assert heard[kind][1] < 0  # a log-probability


def test_a_text_that_does_not_fit_is_improbable_not_certain(corpus: Corpus, teachers: Teachers) -> None:
    recogniser = load_recogniser(teachers.teacher("t1"))
    long = corpus.recordings[0].model_copy(update={"text": "ABAB" * 10})
    data = TrainingData([long], recogniser.student.front_end, recogniser.tokenizer)
    (said,) = posteriors_of(recogniser, collate([data[(0, 0)]], 2), config_of())
    assert said["ctc"][1] == -100.0


def test_teachers_of_another_fold_are_refused_before_they_are_asked(corpus: Corpus, tmp_path: Path) -> None:
    everyone = config_of(("t6",), teach={"parent_on": "fold"}, fold={"exclude": ("t3", "t4", "t5")})
    made = teach(corpus, everyone, tmp_path / "teachers", quiet=True)
    with pytest.raises(LeakageError, match="parent has heard held-out speaker t1") as error:
        targets_of(corpus, made, config_of(("t1",)), tmp_path / "targets")
    assert "xded teach" in error.value.remedy
    assert not (tmp_path / "targets").exists()


def test_a_fold_without_a_finished_teacher_is_an_error(corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="no finished teacher for this fold"):
        targets_of(corpus, Teachers(tmp_path / "none"), config_of(), tmp_path)


def test_what_is_there_is_kept_and_what_changed_or_broke_is_made_anew(
    corpus: Corpus, teachers: Teachers, tmp_path: Path
) -> None:
    config = config_of(fold={"exclude": ("t3", "t4", "t5")})
    targets_of(corpus, teachers, config, tmp_path)
    shards = sorted(tmp_path.glob("posteriors/*/*/*.safetensors"))
    assert len(shards) == 4

    def written() -> list[int]:
        return [path.stat().st_mtime_ns for path in shards]

    before = written()
    targets_of(corpus, teachers, config, tmp_path)
    assert written() == before
    warmer = config_of(fold={"exclude": ("t3", "t4", "t5")}, objective={"temperature": 3.0})
    made, _, _ = targets_of(corpus, teachers, warmer, tmp_path)
    assert made["ctc"].temperature == 3.0
    assert all(now != then for now, then in zip(written(), before, strict=True))
    (tmp_path / "posteriors" / "t1" / "ctc" / "index.json").write_text("{")
    targets_of(corpus, teachers, warmer, tmp_path)
    assert read_index(tmp_path / "posteriors" / "t1" / "ctc").temperature == 3.0


def test_same_prompt_targets_come_from_the_teachers_own_speakers(
    corpus: Corpus, teachers: Teachers, tmp_path: Path
) -> None:
    config = config_of(target={"heard": "same_prompt", "top_k": 99})
    made, train, _ = targets_of(corpus, teachers, config, tmp_path)
    assert set(made) == {"decoder"}
    assert made["decoder"].heard == "same_prompt"
    asked = {
        s: {e.recording for e in read_index(tmp_path / "posteriors" / s / "decoder").recordings} for s in TARGETS[:5]
    }
    assert asked == {s: {r.recording for r in corpus.select(speakers=[s])} for s in TARGETS[:5]}
    mine = next(r for r in train if r.speaker == "c1" and r.take.endswith("_0"))
    stores = [Store(tmp_path / "posteriors" / s / "decoder") for s in TARGETS[:5]]
    said = [store.read(f"{s}_{mine.prompt}_0") for s, store in zip(TARGETS[:5], stores, strict=True)]
    stored = Store(tmp_path / "decoder").read(mine.recording)
    np.testing.assert_allclose(dense(stored, 7), combine(said, [1] * 5, "logprob_mean", 7), atol=2e-3)


@pytest.mark.parametrize("heard", ["same_audio", "same_prompt"])
def test_an_included_held_out_speaker_gives_targets_without_the_test_takes(
    corpus: Corpus, tmp_path: Path, heard: str
) -> None:
    """The diagnostic trains on half of the held-out takes (some choose the best checkpoint); the rest stays unheard."""
    fold = {"include_held_out": True, "exclude": ("t3", "t4", "t5"), "validation_fraction": 0.3}
    config = config_of(("t6",), fold=fold, target={"heard": heard}, teach={"parent_on": "fold"})
    made = teach(corpus, config, tmp_path / "teachers", quiet=True)
    assert "t6" in made.finished
    indices, train, parts = targets_of(corpus, made, config, tmp_path / "targets")
    assert {r.speaker for r in parts.test} == {"t6"}
    assert any(r.speaker == "t6" for r in train)
    test = {r.recording for r in parts.test}
    for path in (tmp_path / "targets").rglob("index.json"):
        assert not test & {entry.recording for entry in read_index(path.parent).recordings}
    assert not {r.take for r in parts.test} & {t for p in indices["decoder"].provenance for t in p.takes}


# --- training with targets ---------------------------------------------------------------------------------


def student_job(corpus: Corpus, teachers: Teachers, config: Config, out: Path) -> Job:
    fold = make_fold(corpus, config.fold)
    parts = parts_of(corpus, fold, config)
    tokenizer = Tokenizer.load(teachers.tokenizer, "upper")
    test_takes = frozenset(r.take for r in parts.test)
    return Job("student", config, parts.train, parts.validation, fold, test_takes, tokenizer, out)


@pytest.mark.parametrize("stages", [1, 2])
def test_training_with_both_kinds_of_distillation(
    corpus: Corpus, teachers: Teachers, tmp_path: Path, stages: int
) -> None:
    plain = config_of(fold={"exclude": ("t3", "t4", "t5")})
    targets_of(corpus, teachers, plain, tmp_path / "targets")
    train = dict(ONE_EPOCH)
    if stages == 2:
        frozen = {"epochs": 1, "peak_lr": 1e-3, "freeze_encoder": True}
        train |= {"init": teachers.parent / "best.pt", "stages": [frozen, {"epochs": 1, "peak_lr": 1e-3}]}
    config = config_of(
        fold={"exclude": ("t3", "t4", "t5")}, objective={"ctc_kd": 1.0, "decoder_kd": 1.0}, train=train,
        targets=tmp_path / "targets",
    )  # fmt: skip
    job = student_job(corpus, teachers, config, tmp_path / "run")
    fit(job, quiet=True)
    status = read_status(job.out)
    assert status["state"] == "finished"
    assert "28 of 28 training recordings covered" in status["targets"]
    assert all(f"{part} " in status["progress"] for part in ("ctc", "ctc_kd", "cross_entropy", "decoder_kd"))
    assert {"teacher t1", "teacher t2", "parent"} <= set(status["provenance"])
    assert heard_by(job.out / "best.pt") == {"c1", "c2", "t1", "t2"}


def test_targets_of_another_fold_are_refused_by_training(corpus: Corpus, teachers: Teachers, tmp_path: Path) -> None:
    targets_of(corpus, teachers, config_of(), tmp_path / "targets")
    config = config_of(("t5",), objective={"decoder_kd": 1.0}, targets=tmp_path / "targets")
    with pytest.raises(LeakageError, match="teacher t5 has heard held-out speaker t5"):
        fit(student_job(corpus, teachers, config, tmp_path / "run"), quiet=True)


def test_targets_that_cover_nothing_are_refused(corpus: Corpus, teachers: Teachers, tmp_path: Path) -> None:
    targets_of(corpus, teachers, config_of(fold={"controls": False}), tmp_path / "targets")
    config = config_of(objective={"decoder_kd": 1.0}, targets=tmp_path / "targets")
    job = student_job(corpus, teachers, config, tmp_path / "run")
    job.train = [r for r in job.train if r.speaker == "c1"]
    with pytest.raises(TargetError, match=r"cover none of the \d+ training recordings"):
        fit(job, quiet=True)


def test_a_training_step_costs_the_same_for_two_and_five_teachers(
    corpus: Corpus, teachers: Teachers, tmp_path: Path
) -> None:
    """What a step reads and holds: bytes of the targets on disk, and every tensor of a batch."""
    kept, sizes, shapes = {}, {}, {}
    common = [r for r in corpus.recordings if r.speaker in ("c1", "c2", "t1", "t2")]
    for count in (2, 5):
        config = config_of(fold={"exclude": TARGETS[count:5]})
        fold, out = make_fold(corpus, config.fold), tmp_path / str(count)
        kept[count] = make_targets(corpus, teachers, fold, common, config, out)["ctc"]
        sizes[count] = {
            kind: sum(p.stat().st_size for p in (out / kind).glob("*.safetensors")) for kind in ("ctc", "decoder")
        }
        student = load_recogniser(teachers.parent).student
        data = TrainingData(
            common, student.front_end, Tokenizer.load(teachers.tokenizer, "upper"),
            ctc_targets=Store(out / "ctc"), decoder_targets=Store(out / "decoder"),
            reduce=student.encoder.subsampling.reduce,
        )  # fmt: skip
        batch = collate([data[(0, i)] for i in range(8)], 2)
        assert batch.ctc_target is not None
        assert batch.decoder_target is not None
        assert batch.least_blank is not None
        tensors = [*batch.ctc_target, *batch.decoder_target, batch.least_blank]
        shapes[count] = [(tuple(t.shape), t.dtype) for t in tensors]
    assert (len(kept[2].teachers), len(kept[5].teachers)) == (2, 5)
    assert sizes[2] == sizes[5]
    assert min(sizes[2].values()) > 0
    assert shapes[2] == shapes[5]


# --- cross-test --------------------------------------------------------------------------------------------


def said(speaker: str, *words: str) -> list[Prediction]:
    return [
        Prediction(
            recording=f"{speaker}{i}", take=f"{speaker}{i}", speaker=speaker, band=None, word_type=None,
            prompt="w", reference="AB", hypothesis=word, tokens=(), seed=0,
        )
        for i, word in enumerate(words)
    ]  # fmt: skip


def test_vote_oracle_and_best_teacher() -> None:
    rows = {
        "a": [*said("x", "AB", "DA"), *said("y", "DA", "DA")],
        "b": [*said("x", "BAD", "DA"), *said("y", "AB", "AB")],
        "c": [*said("x", "BAD", "CAB"), *said("y", "BAD", "CAB")],
    }
    assert [p.hypothesis for p in crosstest.vote(rows)] == ["BAD", "DA", "DA", "DA"]  # a tie goes to the first name
    assert [p.hypothesis for p in crosstest.oracle(rows, "upper")] == ["AB", "DA", "AB", "AB"]
    best = crosstest.best_by_speaker(rows, "upper")
    assert [(p.speaker, p.hypothesis) for p in best] == [("x", "AB"), ("x", "DA"), ("y", "AB"), ("y", "AB")]
    assert crosstest.matrix(rows, "upper")["b"]["y"].value == 100.0


def test_every_teacher_is_tested_on_what_no_one_was_trained_on(
    corpus: Corpus, teachers: Teachers, tmp_path: Path
) -> None:
    copied = Teachers(Path(shutil.copytree(teachers.folder, tmp_path / "teachers")))
    config = config_of()
    heard = crosstest.crosstest(corpus, copied, config)
    parts = parts_of(corpus, make_fold(corpus, config.fold), config)
    trained = {r.recording for r in parts.train}
    assert set(heard) == set(copied.finished)
    for predictions in heard.values():
        assert {"t6", "t1"} <= {p.speaker for p in predictions}
        assert not {p.recording for p in predictions} & trained
        assert {p.speaker for p in predictions}.isdisjoint(CONTROLS)
    kept = {path: path.stat().st_mtime_ns for path in (copied.folder / "crosstest").glob("*.jsonl")}
    assert len(kept) == len(heard)
    crosstest.crosstest(corpus, copied, config)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    decoder = config.decode.model_copy(update={"mode": "decoder"})
    crosstest.crosstest(corpus, copied, config.model_copy(update={"decode": decoder}))
    assert all(path.stat().st_mtime_ns > before for path, before in kept.items())  # decoded otherwise: asked anew
