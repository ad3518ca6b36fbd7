"""Parts of the loss as runs use them: from targets on disk to the batch, over a run, killed and resumed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from test_resume import assert_identical_runs, break_and_resume, in_batch, in_validation
from tiny_corpus import MODEL, WORDS, job_for, tiny_config, write_corpus
from xded.checks.training import trained_heads
from xded.config import Config, ObjectiveConfig
from xded.corpus.manifest import Corpus
from xded.errors import CheckpointError, ConfigError, LeakageError
from xded.models import checkpoints
from xded.models.recogniser import Recogniser, load_recogniser
from xded.models.student import Student
from xded.study.plan import uses_targets
from xded.targets.store import Store, StoreWriter, TargetError
from xded.teachers.posteriors import extract
from xded.training import guide, status
from xded.training.auxiliary import Auxiliary
from xded.training.data import Batch, TrainingData, collate
from xded.training.losses import loss_parts, temperature_at, weighted_sum
from xded.training.monitor import unused_parts
from xded.training.run import encode_once, fit

ALL_OF_TEACHERS = {"ctc_kd": 1.0, "decoder_kd": 1.0, "word_kd": 1.0, "text_kd": 1.0}
CHANGING = {"kd_end": 0.25, "temperature_end": 1.0}
AGREEING = {"consistency": 5.0, "word_consistency": 1.0}
STAGES: dict[str, Any] = {"stages": [{"epochs": 3, "peak_lr": 1e-3}], "save_every_steps": 2, "batch_size": 4}
BY_WORDS: dict[str, Any] = {**STAGES, "sampler": "words", "speakers_per_word": 2}
NO_DROPOUT = {**MODEL, "dropout": 0.0}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def parent(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    train = {"stages": [{"epochs": 30, "peak_lr": 3e-3}], "batch_size": 4}
    return fit(job_for(corpus, tmp_path_factory.mktemp("parent"), train=train, model=NO_DROPOUT), quiet=True)


@pytest.fixture(scope="module")
def wide(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = {**MODEL, "width": 24}
    return fit(job_for(corpus, tmp_path_factory.mktemp("wide"), name="guide", model=model), quiet=True)


@pytest.fixture(scope="module")
def targets(corpus: Corpus, parent: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the parent says of every recording, as all kinds of targets."""
    out = tmp_path_factory.mktemp("targets")
    config = tiny_config(objective={"word_kd": 1.0}, target={"top_k": 3})  # not all words, and not in their order
    extract(parent, "t1", corpus.recordings, config, out, WORDS)
    return out


def without(targets: Path, out: Path, recordings: tuple[str, ...], missing: tuple[str, ...] = ()) -> Path:
    """A copy of targets from which some recordings were dropped on purpose, and others are missing."""
    for kind in ("ctc", "decoder", "words"):
        (out / kind).mkdir(parents=True)
        store = Store(targets / kind)
        writer = StoreWriter(out / kind, store.index.model_copy(update={"spelled_only": True, "recordings": ()}))
        for entry in store.index.recordings:
            if entry.recording in recordings:
                writer.drop(entry.recording)
            elif entry.recording not in missing:
                writer.add(entry, store.read(entry.recording))
        writer.close()
    return out


def served(corpus: Corpus, recogniser: Recogniser, targets: Path, count: int = 6) -> Batch:
    data = TrainingData(
        corpus.recordings[:count], recogniser.student.front_end, recogniser.tokenizer,
        ctc_targets=Store(targets / "ctc"), decoder_targets=Store(targets / "decoder"),
        word_targets=Store(targets / "words"), text_targets=Store(targets / "ctc"),
        frame_rate_hz=recogniser.student.frame_rate_hz, reduce=recogniser.student.encoder.reduce,
    )  # fmt: skip
    return collate([data[(0, i)] for i in range(len(data))], recogniser.tokenizer.eos)


def parts_of(batch: Batch, recogniser: Recogniser, **objective: Any) -> dict[str, float]:
    config = tiny_config(objective={**ALL_OF_TEACHERS, "blank_threshold": 2.0, **objective})
    with torch.no_grad():
        return {k: float(v) for k, v in loss_parts(recogniser.student, batch, config, recogniser.tokenizer).items()}


# --- from the disk to the loss ------------------------------------------------------------------------------


def test_teacher_equal_to_student_gives_zero_through_the_store(corpus: Corpus, parent: Path, targets: Path) -> None:
    recogniser = load_recogniser(parent)
    batch = served(corpus, recogniser, targets)
    parts = parts_of(batch, recogniser)
    other = replace(recogniser, student=Student(recogniser.config.model, recogniser.tokenizer.size).eval())
    for name, value in parts_of(batch, other).items():
        if name in ("ctc_kd", "decoder_kd", "word_kd"):
            assert abs(parts[name]) < 1e-3 * value
    assert parts["text_kd"] < parts_of(batch, other)["text_kd"]


def test_the_guides_outputs_go_with_their_recordings(corpus: Corpus, parent: Path) -> None:
    recogniser = load_recogniser(parent)
    data = TrainingData(corpus.recordings, recogniser.student.front_end, recogniser.tokenizer)
    data.guide = encode_once(recogniser.student, data, 3)
    batch = collate([data[(0, i)] for i in (5, 0, 9, 3)], recogniser.tokenizer.eos)
    auxiliary = Auxiliary(recogniser.student.encoder.width, None, (), 0)
    config = tiny_config(objective={"feature_kd": 1.0})
    with torch.no_grad():
        same = loss_parts(recogniser.student, batch, config, recogniser.tokenizer, auxiliary)["feature_kd"]
    assert abs(float(same)) < 1e-5


def test_texts_and_words_are_those_of_the_store(corpus: Corpus, parent: Path, targets: Path) -> None:
    recogniser = load_recogniser(parent)
    batch = served(corpus, recogniser, targets)
    assert batch.words is not None
    assert batch.heard is not None
    assert batch.heard_lengths is not None
    index = Store(targets / "words").index
    for row, name in enumerate(batch.recordings):
        words = {
            recogniser.tokenizer.decode(tokens[:length].tolist()): probability
            for tokens, length, probability in zip(*(part[row] for part in batch.words), strict=True)
            if length
        }
        posterior = Store(targets / "words").read(name)
        expected = {index.words[i]: p for i, p in zip(posterior.ids[0], posterior.probabilities[0], strict=True) if p}
        assert {word: float(p) for word, p in words.items()} == pytest.approx(expected, abs=1e-6)
        said = recogniser.tokenizer.decode(batch.heard[row, : batch.heard_lengths[row]].tolist())
        assert said == Store(targets / "ctc").entry(name).text
    assert batch.to(torch.device("cpu")).words is not None


def test_a_recording_without_a_target_counts_nothing_and_needs_no_nan(
    corpus: Corpus, parent: Path, targets: Path, tmp_path: Path
) -> None:
    recogniser = load_recogniser(parent)
    other = replace(recogniser, student=Student(recogniser.config.model, recogniser.tokenizer.size).eval())
    count = 6
    left_out = tuple(r.recording for r in corpus.recordings[2:4])
    some = without(targets, tmp_path / "some", left_out)
    rest = replace(corpus, recordings=tuple(r for r in corpus.recordings if r.recording not in left_out))
    whole, alone = served(corpus, other, some, count), served(rest, other, some, count - 2)
    parts, kept = parts_of(whole, other), parts_of(alone, other)
    for name in ALL_OF_TEACHERS:
        assert parts[name] == pytest.approx(kept[name] * (count - 2) / count, rel=1e-4), name
    nobody = served(replace(corpus, recordings=corpus.recordings[2:4]), other, some, 2)
    for name in ALL_OF_TEACHERS:
        assert parts_of(nobody, other, temperature_end=1.0)[name] == 0.0
    gaps = without(targets, tmp_path / "gaps", left_out[:1], left_out[1:])
    with pytest.raises(TargetError, match=f"holds nothing about recording '{left_out[1]}'"):  # not on purpose
        served(corpus, other, gaps, count)


def test_gradient_reaches_the_encoder_from_every_part(corpus: Corpus, parent: Path, targets: Path) -> None:
    recogniser = load_recogniser(parent)
    student = Student(recogniser.config.model, recogniser.tokenizer.size)
    batch = served(corpus, recogniser, targets, len(corpus.recordings))
    with torch.no_grad():
        assert batch.features is not None
        batch.guide = recogniser.student.encode(batch.features, batch.feature_lengths)[0]
    auxiliary = Auxiliary(student.encoder.width, None, corpus.speakers, 0)
    objective = {**ALL_OF_TEACHERS, **AGREEING, "feature_kd": 1.0, "adversary": 1.0}
    config = Config.model_construct(objective=ObjectiveConfig(**objective))
    parts = loss_parts(student, batch, config, recogniser.tokenizer, auxiliary, 0.5)
    assert set(parts) == {*objective, "ctc", "cross_entropy", "frames"}
    for name in objective:
        student.zero_grad()
        parts[name].backward(retain_graph=True)
        assert any(p.grad is not None and p.grad.any() for p in student.encoder.parameters()), name


# --- schedules ------------------------------------------------------------------------------------------------


def test_weights_and_temperature_move_linearly_over_the_run(corpus: Corpus, parent: Path, targets: Path) -> None:
    objective = ObjectiveConfig(ctc=0.5, ctc_kd=2.0, adversary=1.0, temperature=4.0, kd_end=0.25, temperature_end=1.0)
    config = Config.model_construct(objective=objective)
    parts = {name: torch.tensor(1.0) for name in ("ctc", "ctc_kd", "adversary", "frames")}
    for progress, kd, temperature in ((0.0, 2.0, 4.0), (0.5, 1.25, 2.5), (1.0, 0.5, 1.0)):
        assert float(weighted_sum(parts, config, progress)) == pytest.approx(0.5 + kd + 1.0)
        assert temperature_at(objective, progress) == pytest.approx(temperature)
    recogniser = load_recogniser(parent)
    batch = served(corpus, recogniser, targets)
    config = tiny_config(objective={**ALL_OF_TEACHERS, "temperature_end": 1.0, "blank_threshold": 2.0})
    with torch.no_grad():
        parts = loss_parts(recogniser.student, batch, config, recogniser.tokenizer, progress=1.0)
    for name in ("ctc_kd", "decoder_kd", "word_kd"):  # the teacher still is the student
        assert abs(float(parts[name])) < 5e-3


def test_a_run_starts_at_the_first_value_and_ends_at_the_last(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    from xded.training import loop

    plain = loop.weighted_sum
    monkeypatch.setattr(loop, "weighted_sum", lambda p, c, progress: (seen.append(progress), plain(p, c, progress))[1])
    fit(job_for(corpus, tmp_path / "run", train={**STAGES, "accumulate": 2}), quiet=True)
    assert (seen[0], seen[-1]) == (0.0, 1.0)
    assert seen == sorted(seen)
    assert len(set(seen)) == 6  # 12 batches, 2 an update


# --- runs ----------------------------------------------------------------------------------------------------


def everything(guide: Path, targets: Path) -> dict[str, Any]:
    objective = {**ALL_OF_TEACHERS, **CHANGING, **AGREEING, "feature_kd": 1.0, "adversary": 0.3}
    return {"objective": objective, "targets": targets, "train": {**BY_WORDS, "guide": guide}}


@pytest.mark.parametrize("kill", [in_batch(5), in_validation(1)])
def test_a_killed_run_with_every_part_ends_like_an_unbroken_one(
    corpus: Corpus, wide: Path, targets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kill: Any
) -> None:
    monkeypatch.setattr(status, "METRICS_EVERY_UPDATES", 1)
    sections = everything(wide, targets)
    fit(job_for(corpus, tmp_path / "unbroken", **sections), quiet=True)
    break_and_resume(job_for(corpus, tmp_path / "run", **sections), monkeypatch, kill)
    assert_identical_runs(tmp_path / "unbroken", tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["event"] == "step"]
    assert {*ALL_OF_TEACHERS, *AGREEING, "feature_kd", "adversary", "ctc", "cross_entropy"} <= steps[-1].keys()
    kept = checkpoints.load(tmp_path / "run" / "latest.pt")
    assert {"projection.weight", "classifier.2.weight"} <= kept["auxiliary"].keys()
    best = checkpoints.load(tmp_path / "run" / "best.pt")
    assert "auxiliary" not in best
    assert best["model_state_dict"].keys() == load_recogniser(tmp_path / "run").student.state_dict().keys()
    assert {"guide", "student"} <= {p["what"] for p in best["provenance"]}  # the guide's own, and the run's


def test_the_auxiliary_weights_are_trained_and_come_back(
    corpus: Corpus, wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = {"feature_kd": 1.0, "adversary": 0.3}
    job = job_for(corpus, tmp_path / "run", objective=objective, train={**STAGES, "guide": wide})
    fit(job, quiet=True)
    kept = checkpoints.load(tmp_path / "run" / "latest.pt")["auxiliary"]
    first = Auxiliary(16, 24, {r.speaker for r in job.train}, 0).state_dict()
    assert kept.keys() == first.keys()
    assert all(not torch.equal(kept[name], first[name]) for name in first)


def test_the_guide_is_read_once(corpus: Corpus, wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    monkeypatch.setattr(guide, "load_recogniser", lambda path: (read.append(path), load_recogniser(path))[1])
    fit(job_for(corpus, tmp_path, objective={"feature_kd": 1.0}, train={**STAGES, "guide": wide}), quiet=True)
    assert read == [wide]


@pytest.mark.filterwarnings("error:.*empty generator:UserWarning")
def test_a_guide_of_the_same_width_has_nothing_to_learn_beside(corpus: Corpus, parent: Path, tmp_path: Path) -> None:
    fit(job_for(corpus, tmp_path, objective={"feature_kd": 1.0}, train={**STAGES, "guide": parent}), quiet=True)
    assert not checkpoints.load(tmp_path / "latest.pt").get("auxiliary")


def test_what_has_no_weight_changes_nothing(corpus: Corpus, wide: Path, tmp_path: Path) -> None:
    """Also the schedules: without teachers they have nothing to change."""
    fit(job_for(corpus, tmp_path / "plain", train=STAGES), quiet=True)
    idle = {**CHANGING, "consistency_temperature": 2.0}
    fit(job_for(corpus, tmp_path / "idle", train={**STAGES, "guide": wide}, objective=idle), quiet=True)
    one, other = (checkpoints.load(tmp_path / name / "latest.pt") for name in ("plain", "idle"))
    assert one.keys() == other.keys()
    for name, value in one["model_state_dict"].items():
        assert torch.equal(value, other["model_state_dict"][name]), name
    assert one["sums"] == other["sums"]


def test_recordings_that_teachers_do_not_spell_still_train(corpus: Corpus, targets: Path, tmp_path: Path) -> None:
    some = without(targets, tmp_path / "some", tuple(r.recording for r in corpus.recordings[:5]))
    job = job_for(corpus, tmp_path / "run", objective={"ctc_kd": 1.0}, train=STAGES, targets=some)
    count = len(job.train)
    fit(job, quiet=True)
    assert len(job.train) == count
    assert f"of {count} training recordings covered" in status.read_status(job.out)["targets"]


def test_a_gap_beside_what_was_dropped_is_no_purpose(corpus: Corpus, targets: Path, tmp_path: Path) -> None:
    """It is said, and left out of training, as without `spelled_only`."""
    job = job_for(corpus, tmp_path / "run", objective={"ctc_kd": 1.0}, train=STAGES)
    names = [r.recording for r in job.train]
    gaps = without(targets, tmp_path / "gaps", tuple(names[:3]), tuple(names[3:5]))
    job = job_for(corpus, tmp_path / "run", objective={"ctc_kd": 1.0}, train=STAGES, targets=gaps)
    fit(job, quiet=True)
    assert [r.recording for r in job.train] == [*names[:3], *names[5:]]
    findings = json.loads((job.out / "findings.json").read_text())["findings"]
    said = [f["what"] for f in findings if f["check"] == "target-coverage"]
    assert any(f"cover {len(names) - 5} of {len(names) - 3} training recordings" in what for what in said)
    assert any(what.startswith(f"3 of {len(names)} training recordings have no ctc target on purpose") for what in said)


# --- refusals --------------------------------------------------------------------------------------------------


def test_a_guide_that_cannot_guide_is_refused(corpus: Corpus, parent: Path, tmp_path: Path) -> None:
    def refused(error: type[Exception], match: str, guide: Path | None, **sections: Any) -> None:
        job = job_for(
            corpus, tmp_path / "run", objective={"feature_kd": 1.0}, train={**STAGES, "guide": guide}, **sections
        )
        with pytest.raises(error, match=match):
            fit(job, quiet=True)

    refused(ConfigError, "feature_kd has no recogniser to imitate", None)
    refused(CheckpointError, "no such checkpoint", tmp_path / "nobody.pt")
    refused(
        CheckpointError, r"does not hear what the student hears: mels 80 \(here 40\)", parent, features={"mels": 40}
    )
    refused(LeakageError, "has heard held-out speaker t2", parent, fold={"held_out": ["t2"]})
    job = job_for(corpus, tmp_path / "run", objective={"feature_kd": 1.0}, train={**STAGES, "guide": parent})
    job.tokenizer = type(job.tokenizer).train(("AB", "XYZ"), "char", 64, "upper")
    with pytest.raises((CheckpointError, Exception), match=r"another tokenizer|cannot write"):
        fit(job, quiet=True)


def test_nobody_to_tell_apart_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    job = job_for(corpus, tmp_path / "run", objective={"adversary": 1.0}, train=STAGES, fold={"exclude": ["t2"]})
    with pytest.raises(ConfigError, match=r"the run has one \(t1\)"):
        fit(job, quiet=True)


def test_targets_without_what_is_asked_are_refused(corpus: Corpus, targets: Path, tmp_path: Path) -> None:
    silent = without(targets, tmp_path / "silent", ())
    path = silent / "ctc" / "index.json"
    index = json.loads(path.read_text())
    for entry in index["recordings"]:
        entry["text"] = None
    path.write_text(json.dumps(index))
    job = job_for(corpus, tmp_path / "run", objective={"text_kd": 1.0}, train=STAGES, targets=silent)
    with pytest.raises(TargetError, match="the text that the teachers hear is not on record"):
        fit(job, quiet=True)
    (silent / "words" / "index.json").unlink()
    job = job_for(corpus, tmp_path / "run", objective={"word_kd": 1.0}, train=STAGES, targets=silent)
    with pytest.raises(TargetError, match="words holds no finished posteriors"):
        fit(job, quiet=True)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"objective": {"consistency": 5.0}}, "set train.sampler to words"),
        ({"objective": {"consistency": 5.0, "cross_entropy": 0.0}, "train": BY_WORDS}, "decoder head say the same"),
        ({"objective": {"word_consistency": 5.0, "ctc": 0.0}, "train": BY_WORDS}, "ctc head say the same"),
        ({"objective": {"adversary": 1.0}, "train": {**STAGES, "devices": 2}}, "adversary needs whole batches"),
        ({"objective": {"feature_kd": 1.0}, "train": {**STAGES, "devices": 2}}, "feature_kd needs whole batches"),
        ({"objective": {"consistency": 1.0}, "train": {**BY_WORDS, "devices": 2}}, "consistency needs whole batches"),
        ({"objective": {"text_kd": 1.0}, "target": {"heard": "same_prompt"}}, "text_kd needs heard: same_audio"),
    ],
)
def test_bad_combinations_are_refused(sections: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, ValidationError), match=message):
        tiny_config(**sections)


def test_heads_and_kinds_follow_the_objective() -> None:
    words = ObjectiveConfig(ctc=0.0, word_kd=1.0)
    assert trained_heads(words) == {"ctc", "decoder"}
    assert words.kinds == ("words",)
    texts = ObjectiveConfig(cross_entropy=0.0, text_kd=1.0)
    assert unused_parts(texts) == ("embedding", "decoder", "decoder_head")
    assert texts.kinds == ("ctc",)
    assert texts.supervised == ObjectiveConfig(cross_entropy=0.0)
    assert ObjectiveConfig(**AGREEING, adversary=1.0).supervised == ObjectiveConfig()
    assert not uses_targets(Config(objective=ObjectiveConfig(feature_kd=1.0)))
    assert uses_targets(Config(objective=texts))
