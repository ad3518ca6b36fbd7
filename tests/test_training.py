"""The training loop: stages, schedule, what stops a run and with which words, what a run writes down."""

from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny_corpus import job_for, write_corpus
from xded import objectives
from xded.audio import read_audio
from xded.config import StageConfig, build
from xded.corpus.folds import Fold
from xded.corpus.manifest import Corpus
from xded.errors import CheckpointError, ConfigError, CorpusError, LeakageError, TrainingError, XdedError
from xded.models.checkpoints import load
from xded.models.student import Student
from xded.tokenizer import Tokenizer
from xded.training import evaluation, loop, status
from xded.training.data import TrainingData
from xded.training.loop import Loop
from xded.training.optimizer import AdamW
from xded.training.run import fit
from xded.training.schedule import Schedule
from xded.training.status import read_status

ONE_EPOCH = {"stages": [{"epochs": 1, "peak_lr": 1e-3}]}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def parent(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fit(job_for(corpus, tmp_path_factory.mktemp("parent"), name="parent"), quiet=True)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "run"


def weights(path: Path) -> dict[str, torch.Tensor]:
    return dict(load(path)["model_state_dict"])


def steps_of(out: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["event"] == "step"]


# --- learning rate -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_optimiser_really_uses_the_schedule(
    corpus: Corpus, out: Path, monkeypatch: pytest.MonkeyPatch, accumulate: int
) -> None:
    used: list[float] = []
    step = AdamW.step

    def stepping(self: AdamW, closure: Any = None) -> Any:
        result = step(self, closure)
        used.append(self.param_groups[0]["lr"])
        assert {group["lr"] for group in self.param_groups} == {used[-1]}
        return result

    monkeypatch.setattr(AdamW, "step", stepping)
    stages = [{"epochs": 4, "peak_lr": 3e-3}, {"epochs": 1, "peak_lr": 1e-3}]
    fit(job_for(corpus, out, train={"stages": stages, "accumulate": accumulate}), quiet=True)
    schedule = Schedule(tuple(StageConfig(**s) for s in stages), 5, accumulate, 2_000, "cosine")
    assert used == [schedule.learning_rate(update) for update in range(math.ceil(25 / accumulate))]
    assert {row["lr"] for row in steps_of(out)} <= set(used)


# --- stages ------------------------------------------------------------------------------------------------


def test_frozen_means_frozen_and_its_outputs_are_computed_once(
    corpus: Corpus, parent: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = {"cached": 0, "training": 0}
    encode = Student.encode

    def encoding(self: Student, *arguments: Any) -> Any:
        if not torch.is_inference_mode_enabled():  # validation encodes, but other recordings
            calls["training" if torch.is_grad_enabled() else "cached"] += 1
        return encode(self, *arguments)

    monkeypatch.setattr(Student, "encode", encoding)
    stages = [{"epochs": 2, "peak_lr": 3e-3, "freeze_encoder": True}, {"epochs": 1, "peak_lr": 1e-3}]
    job = job_for(corpus, out, train={"stages": stages, "init": parent, "checkpoint_every_epochs": 2})
    fit(job, quiet=True)
    assert calls == {"cached": 1, "training": 5}  # all 14 recordings in one batch; five batches of the second stage
    before, frozen, after = weights(parent), weights(out / "checkpoint_epoch_2.pt"), weights(out / "latest.pt")
    encoder = [name for name in before if name.startswith("encoder.")]
    assert any("running_mean" in name for name in encoder)
    assert all(torch.equal(before[name], frozen[name]) for name in encoder)
    assert not torch.equal(before["ctc_head.weight"], frozen["ctc_head.weight"])
    assert not any(torch.equal(frozen[name], after[name]) for name in encoder if "running" in name)
    counts = read_status(out)["parameters"]
    assert (counts["frozen"], counts["trainable"]) == (0, counts["total"])


def test_a_frozen_stage_says_so_in_the_status(corpus: Corpus, parent: Path, out: Path) -> None:
    train = {"stages": [{"epochs": 1, "peak_lr": 1e-3, "freeze_encoder": True}], "init": parent}
    fit(job_for(corpus, out, train=train), quiet=True)
    student = Student(job_for(corpus, out).config.model, 7)
    encoder = sum(p.numel() for p in student.encoder.parameters())
    counts = read_status(out)["parameters"]
    assert (counts["frozen"], counts["trainable"]) == (encoder, counts["total"] - encoder)
    assert counts["with_gradient"] <= counts["trainable"]
    assert f"{encoder:,} frozen" in (out / "STATUS.md").read_text()
    assert "encoder frozen" in (out / "STATUS.md").read_text()


def test_frozen_layers_never_move(corpus: Corpus, parent: Path, out: Path) -> None:
    fit(job_for(corpus, out, train={**ONE_EPOCH, "init": parent, "freeze_layers": 1}), quiet=True)
    before, after = weights(parent), weights(out / "latest.pt")
    for name, value in before.items():
        frozen = name.startswith(("encoder.subsampling.", "encoder.layers.0."))
        assert torch.equal(value, after[name]) == frozen or not frozen, name
    assert not torch.equal(before["decoder_head.weight"], after["decoder_head.weight"])


def test_impossible_stages_are_refused(corpus: Corpus, parent: Path, out: Path) -> None:
    frozen, free = {"epochs": 1, "freeze_encoder": True}, {"epochs": 1}
    with pytest.raises(ConfigError, match="Put the frozen stages first"):
        fit(job_for(corpus, out, train={"stages": [free, frozen], "init": parent}), quiet=True)
    with pytest.raises(ConfigError, match="starts from scratch"):
        fit(job_for(corpus, out, train={"stages": [frozen]}), quiet=True)
    with pytest.raises(ConfigError, match=r"freeze_layers is 99, and the encoder has \d layers"):
        fit(job_for(corpus, out, train={"stages": [free], "freeze_layers": 99}), quiet=True)


def test_from_scratch_the_frozen_stage_is_left_out(corpus: Corpus, out: Path) -> None:
    stages = [{"epochs": 3, "freeze_encoder": True}, {"epochs": 1}]
    fit(job_for(corpus, out, train={"stages": stages}), quiet=True)
    assert [stage["freeze_encoder"] for stage in read_status(out)["stages"]] == [False]
    assert steps_of(out)[-1]["updates"] == 5


# --- who receives a gradient -------------------------------------------------------------------------------


def with_gradient(out: Path) -> set[str]:
    return set(load(out / "latest.pt")["with_gradient"])


def test_every_parameter_receives_a_gradient(corpus: Corpus, out: Path) -> None:
    job = job_for(corpus, out, train=ONE_EPOCH)
    fit(job, quiet=True)
    student = Student(job.config.model, job.tokenizer.size)
    assert with_gradient(out) == {name for name, _ in student.named_parameters()}
    counts = read_status(out)["parameters"]
    assert counts["with_gradient"] == counts["total"] == sum(p.numel() for p in student.parameters())


def test_without_cross_entropy_the_decoder_learns_nothing_and_the_counts_say_so(corpus: Corpus, out: Path) -> None:
    job = job_for(corpus, out, train=ONE_EPOCH, objective={"cross_entropy": 0.0})
    fit(job, quiet=True)
    assert not [name for name in with_gradient(out) if not name.startswith(("encoder.", "ctc_head."))]
    student = Student(job.config.model, job.tokenizer.size)
    reached = sum(p.numel() for n, p in student.named_parameters() if n.startswith(("encoder.", "ctc_head.")))
    assert read_status(out)["parameters"]["with_gradient"] == reached
    assert f"{reached:,} really received a gradient" in (out / "STATUS.md").read_text()


def test_without_ctc_its_head_learns_nothing(corpus: Corpus, out: Path) -> None:
    fit(job_for(corpus, out, train=ONE_EPOCH, objective={"ctc": 0.0}, decode={"mode": "decoder"}), quiet=True)
    assert not [name for name in with_gradient(out) if name.startswith("ctc_head.")]
    assert "decoder_head.weight" in with_gradient(out)


# --- what stops a run ----------------------------------------------------------------------------------------


def test_a_nan_loss_stops_before_the_update_and_names_the_recordings(
    corpus: Corpus, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_for(corpus, out, train={"stages": [{"epochs": 2, "peak_lr": 1e-3}], "save_every_steps": 1})
    poisoned = job.train[3].recording
    get = TrainingData.__getitem__

    def getting(self: TrainingData, item: tuple[int, int]) -> dict:
        row = get(self, item)
        if row["recording"] == poisoned and item[0] == 1 and self.augmentation is not None:
            row["features"] = row["features"] * math.nan
        return row

    seen: list[tuple[str, ...]] = []
    step = Loop.training_step

    def training_step(self: Loop, batch: Any, batch_idx: int) -> torch.Tensor:
        seen.append(tuple(batch.recordings))
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingData, "__getitem__", getting)
        patch.setattr(Loop, "training_step", training_step)
        with pytest.raises(TrainingError, match="the loss is nan") as error:
            fit(job, quiet=True)
    assert poisoned in seen[-1]
    assert all(recording in str(error.value) for recording in seen[-1])
    assert "xded corpus check" in error.value.remedy
    assert load(out / "latest.pt")["batch"] == len(seen) - 2  # all that was learnt before is saved
    assert all(torch.isfinite(value).all() for value in weights(out / "latest.pt").values())
    assert read_status(out)["state"] == "failed"
    assert poisoned in (out / "STATUS.md").read_text()
    fit(job, resume=True, quiet=True)  # with the recording mended
    assert read_status(out)["state"] == "finished"


def test_a_gradient_that_is_not_finite_stops_before_the_update(
    corpus: Corpus, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ctc = objectives.ctc

    def bad_backward(logits: torch.Tensor, *arguments: Any) -> torch.Tensor:
        return ctc(logits, *arguments) + (logits * 0.0).sum().sqrt()  # value 0, gradient NaN

    monkeypatch.setattr(objectives, "ctc", bad_backward)
    with pytest.raises(TrainingError, match=r"gradient's norm is nan, in the batch of recordings t\d_"):
        fit(job_for(corpus, out, train=ONE_EPOCH), quiet=True)


def test_a_full_disk_keeps_the_checkpoint_and_the_run_goes_on_later(
    corpus: Corpus, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing can be written any more, neither a checkpoint nor the status."""
    job = job_for(corpus, out, train={"stages": [{"epochs": 2, "peak_lr": 1e-3}], "save_every_steps": 2})

    def refuse(*args: Any, **named: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    save, calls = torch.save, iter(range(100))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", lambda *a, **n: save(*a, **n) if next(calls) < 2 else refuse())
        patch.setattr(status.RunLog, "close", refuse)
        with pytest.raises(TrainingError, match="The disk is full") as error:
            fit(job, quiet=True)
    assert "--resume" in error.value.remedy
    assert load(out / "latest.pt")["batch"] == 3
    fit(job, resume=True, quiet=True)
    assert read_status(out)["state"] == "finished"


def test_a_disk_that_is_full_for_the_status_is_said_in_words(
    corpus: Corpus, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **named: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(status.RunLog, "_step", refuse)
    with pytest.raises(TrainingError, match=r"The disk is full: nothing more can be written to .*run"):
        fit(job_for(corpus, out, train=ONE_EPOCH), quiet=True)


# --- what is refused before the first step -------------------------------------------------------------------


def refused(job: Any, kind: type[XdedError]) -> str:
    """The message of a job that is refused; no checkpoint may have been written."""
    with pytest.raises(kind) as error:
        fit(job, quiet=True)
    assert not list(job.out.glob("*.pt"))
    return str(error.value)


def test_a_text_longer_than_its_frames_names_the_recordings(corpus: Corpus, out: Path) -> None:
    job = job_for(corpus, out)
    long = job.train[2].model_copy(update={"text": "ABBA" * 10})
    job.train = [*job.train[:2], long]
    said = refused(job, CorpusError)
    assert f"{long.recording} ('{long.text}': 59 frames needed, " in said
    assert "1 recordings are too short for CTC" in said
    assert "--ctc 0" in said
    job = job_for(corpus, out, train=ONE_EPOCH, objective={"ctc": 0.0}, decode={"mode": "decoder"})
    job.train = [*job.train[:2], long]
    fit(job, quiet=True)  # the decoder alone can write it


def test_tempo_leaves_fewer_frames_for_ctc(corpus: Corpus, out: Path) -> None:
    """Without it the shortest augmented copy would stop the run with an infinite loss."""
    job = job_for(corpus, out, augment={"tempo": 0.95})
    assert "too short for CTC" in refused(job, CorpusError)
    assert "augment.tempo" in refused(job, CorpusError)


def test_a_word_that_the_tokenizer_cannot_write_is_named(corpus: Corpus, out: Path) -> None:
    job = job_for(corpus, out)
    job.tokenizer = Tokenizer.train(["AB"], "char", 64, "upper")
    said = refused(job, XdedError)
    assert "'BAD'" in said
    assert "<unk> for D" in said


def test_no_recording_to_train_on(corpus: Corpus, out: Path) -> None:
    job = job_for(corpus, out)
    job.train = []
    assert "student has no recording to train on" in refused(job, CorpusError)


@pytest.mark.parametrize("side", ["train", "validation"])
def test_held_out_material_is_refused_in_training_and_in_model_selection(corpus: Corpus, out: Path, side: str) -> None:
    job = job_for(corpus, out, fold={"held_out": ["t2"]})
    setattr(job, side, [*getattr(job, side), *corpus.select(speakers=["t2"])])
    said = refused(job, LeakageError)
    assert ("model selection of student" if side == "validation" else "student has heard") in said
    assert "t2" in said


def test_a_parent_that_has_heard_the_held_out_speaker_is_refused(corpus: Corpus, parent: Path, out: Path) -> None:
    job = job_for(corpus, out, fold={"held_out": ["t2"]}, train={**ONE_EPOCH, "init": parent})
    assert "parent has heard held-out speaker t2" in refused(job, LeakageError)


def test_a_start_of_another_tokenizer_is_refused(corpus: Corpus, parent: Path, out: Path) -> None:
    job = job_for(corpus, out, train={**ONE_EPOCH, "init": parent})
    job.tokenizer = Tokenizer.train([*corpus.texts, "XYZ"], "char", 64, "upper")
    said = refused(job, CheckpointError)
    assert f"{parent} was trained with another tokenizer" in said
    assert job.tokenizer.fingerprint[:12] in said


def test_a_start_of_another_size_lists_the_weights(corpus: Corpus, parent: Path, out: Path) -> None:
    job = job_for(corpus, out, train={**ONE_EPOCH, "init": parent})
    model = job.config.model.model_copy(update={"encoder_layers": 2, "decoder_feed_forward": 8})
    job.config = job.config.model_copy(update={"model": model})
    said = refused(job, CheckpointError)
    assert "missing: encoder.layers.1." in said
    assert "of another shape: decoder.layers.0.linear1.bias (16,) for (8,)" in said


def test_a_start_of_other_features_is_refused(corpus: Corpus, parent: Path, out: Path) -> None:
    """The weights fit, what they hear does not."""
    job = job_for(corpus, out, train={**ONE_EPOCH, "init": parent}, features={"hop_s": 0.0125})
    assert "other features: hop_s 0.01 (here 0.0125)" in refused(job, CheckpointError)


def test_kd_without_targets_is_refused(corpus: Corpus, out: Path) -> None:
    assert "no targets are given" in refused(job_for(corpus, out, objective={"decoder_kd": 1.0}), ConfigError)


# --- what a run leaves behind --------------------------------------------------------------------------------


def test_a_run_folder_holds_what_the_design_lists(corpus: Corpus, out: Path) -> None:
    job = job_for(corpus, out, train={"checkpoint_every_epochs": 1})
    assert fit(job, quiet=True) == out / "best.pt"
    names = {path.name for path in out.iterdir()}
    listed = {
        "config.yaml",
        "env.json",
        "STATUS.md",
        "status.json",
        "metrics.jsonl",
        "train.log",
        "best.pt",
        "latest.pt",
    }
    assert listed | {"checkpoint_epoch_1.pt", "checkpoint_epoch_2.pt", "best.pt.sha256"} <= names
    assert build(job.config.model_dump(mode="json"), "x") == job.config
    assert load(out / "checkpoint_epoch_2.pt")["epoch"] == 2
    text = (out / "STATUS.md").read_text()
    for said in ("student: finished", "14 recordings", "epoch 2/2", "100.0%", "best: epoch"):
        assert said in text


def test_the_last_update_of_an_accumulating_run_is_the_hundredth_per_cent(corpus: Corpus, out: Path) -> None:
    fit(job_for(corpus, out, train={"stages": [{"epochs": 3, "peak_lr": 1e-3}], "accumulate": 2}), quiet=True)
    assert "100.0%" in read_status(out)["progress"]  # 15 batches are 8 updates, the last one of a single batch
    assert load(out / "latest.pt")["batch"] == 14


def test_best_is_the_best_validation_wra_and_then_loss(
    corpus: Corpus, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = [(0.5, 2.0), (0.7, 3.0), (0.7, 1.0), (0.7, 1.5), (0.6, 0.1)]
    rows = iter([{"wra": w, "val_loss": v, "empty": 0.0, "distinct": 1.0} for w, v in scores])
    monkeypatch.setattr("xded.training.run.validate", lambda *a, **n: next(rows))
    fit(job_for(corpus, out, train={"stages": [{"epochs": 5, "peak_lr": 1e-3}]}), quiet=True)
    assert load(out / "best.pt")["epoch"] == 3
    assert load(out / "latest.pt")["best"]["epoch"] == 3


def test_without_validation_the_last_epoch_is_the_best(corpus: Corpus, out: Path) -> None:
    job = job_for(corpus, out)
    job.validation = []
    fit(job, quiet=True)
    assert load(out / "best.pt")["epoch"] == 2


def test_a_new_run_does_not_keep_the_metrics_of_one_that_saved_nothing(
    corpus: Corpus, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_for(corpus, out, train=ONE_EPOCH)
    with monkeypatch.context() as patch:
        patch.setattr(Loop, "save", Schedule.of)  # fails at the first save
        with pytest.raises((TypeError, AttributeError)):
            fit(job, quiet=True)
    fit(job, quiet=True)
    assert [row["update"] for row in steps_of(out)] == [1]


def test_global_normalisation_is_of_the_training_recordings_and_is_inherited(corpus: Corpus, tmp_path: Path) -> None:
    features = {"normalisation": "global"}
    job = job_for(corpus, tmp_path / "parent", name="parent", train=ONE_EPOCH, features=features)
    best = fit(job, quiet=True)
    student = Student(job.config.model, job.tokenizer.size, job.config.features)
    student.front_end.fit([read_audio(r.audio_filepath) for r in job.train])
    assert torch.equal(weights(best)["front_end.mean"], student.front_end.mean)
    assert "normaliser of parent" in read_status(job.out)["provenance"]
    own = job_for(corpus, tmp_path / "child", train={**ONE_EPOCH, "init": best}, features=features)
    own.train = [r for r in own.train if r.speaker == "t1"]
    assert torch.equal(weights(fit(own, quiet=True))["front_end.mean"], student.front_end.mean)
    assert "normaliser of student" not in read_status(own.out)["provenance"]


def test_loss_parts_are_weighted_as_the_objective_says(corpus: Corpus, out: Path) -> None:
    fit(job_for(corpus, out, train=ONE_EPOCH, objective={"ctc": 0.25, "cross_entropy": 2.0}), quiet=True)
    row = steps_of(out)[0]
    assert row["loss"] == pytest.approx(0.25 * row["ctc"] + 2.0 * row["cross_entropy"], rel=1e-5)


def test_a_fold_says_who_is_held_out(corpus: Corpus, out: Path) -> None:
    job = job_for(corpus, out, train=ONE_EPOCH, fold={"held_out": ["t2"]})
    assert job.fold == Fold(("t2",))
    fit(job, quiet=True)
    assert read_status(out)["held_out"] == "t2"
    assert {speaker for p in load(out / "best.pt")["provenance"] for speaker in p["speakers"]} == {"t1"}


def test_gradient_watch_covers_a_thawed_encoder(corpus: Corpus, parent: Path, out: Path) -> None:
    """Encoder weights first receive a gradient in the second stage."""
    assert loop.GRADIENT_WATCH >= 1
    stages = [{"epochs": 1, "freeze_encoder": True}, {"epochs": 1}]
    fit(job_for(corpus, out, train={"stages": stages, "init": parent}), quiet=True)
    assert any(name.startswith("encoder.layers") for name in with_gradient(out))


def test_batches_without_gradients_hold_few_long_recordings(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_for(corpus, tmp_path)
    data = TrainingData(job.train, Student(job.config.model, 20).front_end, job.tokenizer)
    longest = max(data.lengths)
    for most_ms, batch_size, first in ((3 * longest, 100, 3), (longest // 2, 100, 1), (1_000 * longest, 4, 4)):
        monkeypatch.setattr(evaluation, "MOST_AT_ONCE_MS", most_ms)
        served = [places for places, _ in evaluation.batches(data, batch_size)]
        assert sorted(place for places in served for place in places) == list(range(len(data)))
        for places in served:
            padded_ms = len(places) * max(data.lengths[place] for place in places)
            assert len(places) == 1 or (padded_ms <= most_ms and len(places) <= batch_size)
        assert len(served[0]) == first  # the longest ones
