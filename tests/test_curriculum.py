"""Curriculum: easiest first, all in the end, the same number of updates, and every order a function of its number."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tiny_corpus import job_for, tiny_config, write_corpus
from tiny_study import tiny_study
from xded.config import CurriculumConfig
from xded.corpus.manifest import Corpus
from xded.doctor.examine import examine_all
from xded.errors import ConfigError, LeakageError, TrainingError
from xded.models import collective
from xded.models.checkpoints import load
from xded.models.recogniser import load_recogniser
from xded.models.student import Student
from xded.study.plan import StudyError
from xded.targets.store import Entry, Index, Kind, Posterior, Store, StoreWriter
from xded.training import difficulty, preflight
from xded.training.curriculum import Curriculum, require_same_order, shares_of
from xded.training.data import TrainingData, collate
from xded.training.difficulty import DIFFICULTY, KEPT, difficulty_of
from xded.training.evaluation import batches
from xded.training.loop import Loop
from xded.training.losses import loss_parts, weighted_sum
from xded.training.order import Order, RunSampler
from xded.training.run import fit
from xded.training.status import read_status

LENGTHS = tuple(int(n) for n in np.random.default_rng(0).integers(300, 900, 50))
ORDER = tuple(np.random.default_rng(1).permutation(50).tolist())
SCHEDULES = ("linear", "sqrt", "step")
STAGES: dict[str, Any] = {"stages": [{"epochs": 4, "peak_lr": 1e-3}], "save_every_steps": 2}
LONGEST_LAST: dict[str, Any] = {**STAGES, "curriculum": {"schedule": "sqrt", "difficulty": "duration"}}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def parent(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fit(job_for(corpus, tmp_path_factory.mktemp("parent"), train=STAGES), quiet=True)


def made(schedule: str, epochs: int = 8, **more: Any) -> Curriculum:
    return Curriculum(ORDER, shares_of(CurriculumConfig(schedule=schedule, **more), epochs))


# --- shares and batches ------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [0.01, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("epochs", [2, 3, 8, 41])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_shares_grow_from_the_start_to_all(schedule: str, epochs: int, start: float) -> None:
    shares = shares_of(CurriculumConfig(schedule=schedule, start=start), epochs)
    assert len(shares) == epochs
    assert shares[0] == pytest.approx(start)
    assert shares[-1] == 1.0
    assert list(shares) == sorted(shares)


def test_shares_are_those_of_the_paper_and_of_the_quarters() -> None:
    assert shares_of(CurriculumConfig(schedule="linear", start=0.2), 5) == pytest.approx((0.2, 0.4, 0.6, 0.8, 1.0))
    root = [math.sqrt(t * (1 - 0.2**2) + 0.2**2) for t in (0, 0.25, 0.5, 0.75, 1)]
    assert shares_of(CurriculumConfig(schedule="sqrt", start=0.2), 5) == pytest.approx(root)
    assert shares_of(CurriculumConfig(schedule="step"), 8) == (0.3, 0.3, 0.6, 0.6, 0.8, 0.8, 1.0, 1.0)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_an_epoch_keeps_its_batches_and_draws_them_evenly_from_the_easiest(schedule: str) -> None:
    growing = made(schedule)
    for epoch, share in enumerate(growing.shares):
        drawn = Order(LENGTHS, 8, 0, growing).epoch(epoch)
        assert sorted(map(len, drawn)) == sorted(map(len, Order(LENGTHS, 8, 0).epoch(epoch)))
        copies = [copy for batch in drawn for copy in batch]
        assert len(set(copies)) == len(copies) == 50  # a recording comes again as another copy
        times = Counter(copy % 50 for copy in copies)
        assert set(times) == set(ORDER[: math.ceil(50 * share - 1e-9)])
        assert max(times.values()) - min(times.values()) <= 1


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_last_epoch_is_that_of_a_run_without_a_curriculum(schedule: str) -> None:
    growing, plain = Order(LENGTHS, 8, 3, made(schedule)), Order(LENGTHS, 8, 3)
    assert growing.epoch(7) == plain.epoch(7)
    assert growing.epoch(0) != plain.epoch(0)


def test_the_first_batches_hold_at_least_a_batch_of_recordings() -> None:
    drawn = Order(LENGTHS, 8, 0, made("linear", start=0.001)).epoch(0)
    assert {copy % 50 for batch in drawn for copy in batch} == set(ORDER[:8])


@pytest.mark.parametrize("first", [0, 3, 7, 20])
def test_a_sampler_with_a_curriculum_has_as_many_batches_and_can_start_anywhere(first: int) -> None:
    order = Order(LENGTHS, 8, 0, made("sqrt", 4))
    whole = list(RunSampler(order, 4))
    assert len(whole) == len(RunSampler(Order(LENGTHS, 8, 0), 4)) == 28
    assert list(RunSampler(order, 4, first)) == whole[first:]


def test_processes_share_the_batches_of_a_curriculum() -> None:
    order = Order(LENGTHS, 8, 0, made("sqrt", 4))
    whole = list(RunSampler(order, 4))
    one, two = (list(RunSampler(order, 4, rank=r, count=2)) for r in range(2))
    assert [sorted(a + b) for a, b in zip(one, two, strict=True)] == [sorted(batch) for batch in whole]


def test_processes_that_measured_another_order_are_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    require_same_order([1, 0])
    monkeypatch.setattr(collective, "everyones", lambda own: [own, "another"])
    with pytest.raises(TrainingError, match=r"measured the difficulty.*differently.*difficulty=duration"):
        require_same_order([1, 0])


def test_a_copy_is_augmented_in_another_way(corpus: Corpus, tmp_path: Path) -> None:
    job = job_for(corpus, tmp_path)
    data = data_of(job, Student(job.config.model, job.tokenizer.size, job.config.features))
    first, again, other = (data[(0, index)]["features"] for index in (2, 2, 2 + len(data)))
    assert torch.equal(first, again)
    assert first.shape == other.shape
    assert not torch.equal(first, other)
    assert torch.equal(data.plain()[(0, 2)]["features"], torch.from_numpy(data.features(2)))


# --- difficulty --------------------------------------------------------------------------------------------


def data_of(job: Any, student: Any, **stores: Any) -> TrainingData:
    return TrainingData(job.train, student.front_end, job.tokenizer, augmentation=job.config.augment, **stores)


def test_the_parents_difficulty_is_its_supervised_loss_of_each_recording_unaugmented(
    corpus: Corpus, parent: Path, tmp_path: Path
) -> None:
    train = {**STAGES, "init": parent, "curriculum": {"schedule": "linear"}}
    job = job_for(corpus, tmp_path, train=train, objective={"ctc": 0.3, "cross_entropy": 0.7})
    recogniser = load_recogniser(parent)
    data = data_of(job, recogniser.student)
    found = difficulty_of(job.config, recogniser.student, data, torch.device("cpu"))
    student = recogniser.student.eval()
    with torch.inference_mode():
        alone = [
            float(weighted_sum(loss_parts(student, collate([data.plain()[(0, i)]], job.tokenizer.eos), job.config,
                                          job.tokenizer), job.config))
            for i in range(len(data))
        ]  # fmt: skip
    np.testing.assert_allclose(found, alone, rtol=1e-4)
    assert len(set(found.round(6))) == len(found)


def targets_of(folder: Path, kind: Kind, size: int, steps: dict[str, list[int]], sure: list[float]) -> Store:
    """Targets that give each step of a recording's text the same probability, and the rest evenly to the others."""
    index = Index(kind=kind, temperature=2.0, top_k=1, vocabulary=size, frame_rate_hz=25.0, teacher_forced=False,
                  tokenizer="", teachers=("t9",), teacher_hashes={}, provenance=())  # fmt: skip
    writer = StoreWriter(folder, index)
    for (recording, ids), probability in zip(steps.items(), sure, strict=True):
        given = np.full((len(ids), 1), probability, np.float32)
        posterior = Posterior(np.array(ids)[:, None], given, 1.0 - given[:, 0], np.zeros(len(ids), np.float32))
        writer.add(Entry(recording, "0" * 64, len(ids)), posterior)
    writer.close()
    return Store(folder)


@pytest.mark.parametrize("kind", ["ctc", "decoder"])
def test_difficulty_under_targets_is_what_they_think_of_the_text(corpus: Corpus, tmp_path: Path, kind: Kind) -> None:
    job = job_for(corpus, tmp_path, train={"curriculum": {"schedule": "linear", "difficulty": "targets"}})
    student = Student(job.config.model, job.tokenizer.size, job.config.features)
    sure = np.linspace(0.9, 0.3, len(job.train)).tolist()
    tokens = {r.recording: job.tokenizer.encode(r.text) for r in job.train}
    spelled = {
        name: [*ids, job.tokenizer.eos] if kind == "decoder" else [t for i in ids for t in (i, job.tokenizer.blank)]
        for name, ids in tokens.items()
    }
    store = targets_of(tmp_path / kind, kind, job.tokenizer.size, spelled, sure)
    data = data_of(job, student, **{f"{kind}_targets": store})
    found = difficulty_of(job.config, student, data, torch.device("cpu"))
    if kind == "decoder":
        np.testing.assert_allclose(found, -np.log(sure), rtol=1e-2)
    else:  # a token and the blank after it, and with little probability other ways to spell it
        assert (found < -2 * np.log(sure) + 1e-2).all()
        by_length = {n: found[[len(ids) == n for ids in tokens.values()]] for n in (2, 3)}
        assert all(list(values) == sorted(values) for values in by_length.values())


def test_what_a_run_does_not_have_cannot_tell_difficulty(corpus: Corpus, tmp_path: Path) -> None:
    for kind, missing in (("parent", "never trained"), ("targets", "has none")):
        train = {**STAGES, "curriculum": {"schedule": "linear", "difficulty": kind}}
        with pytest.raises(ConfigError, match=missing):
            fit(job_for(corpus, tmp_path / kind, train=train), quiet=True)


@pytest.mark.parametrize(
    ("objective", "spelled_only", "said"),
    [
        (
            {"text_kd": 1.0},
            False,
            r"ctc_kd or decoder_kd.*has none\..*Give it objective\.ctc_kd or objective\.decoder_kd",
        ),
        ({"word_kd": 1.0}, False, r"ctc_kd or decoder_kd.*has none\."),
        ({"ctc_kd": 1.0}, True, r"spelled_only leaves some without one\..*without spelled_only"),
    ],
)
def test_targets_that_tell_no_difficulty_are_refused_by_study_and_run(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    objective: dict[str, float], spelled_only: bool, said: str,
) -> None:  # fmt: skip
    curriculum = {"schedule": "sqrt", "difficulty": "targets"}
    keys = {f"train.curriculum.{key}": value for key, value in curriculum.items()}
    weights = {f"objective.{key}": value for key, value in objective.items()}
    with pytest.raises(StudyError, match=rf"attempt 'a' orders recordings by .*{said}"):
        tiny_study(corpus, {"a": {"set": {**keys, **weights, "target.spelled_only": spelled_only}}})
    job = job_for(corpus, tmp_path, objective=objective, train={**STAGES, "curriculum": curriculum})
    student = Student(job.config.model, job.tokenizer.size, job.config.features)
    steps = {r.recording: job.tokenizer.encode(r.text) for r in job.train}
    store = targets_of(tmp_path / "ctc", "ctc", job.tokenizer.size, steps, [0.9] * len(steps))
    store.index = store.index.model_copy(update={"spelled_only": spelled_only})
    monkeypatch.setattr(preflight, "open_targets", lambda job, gate: {"ctc": store})
    with pytest.raises(ConfigError, match=said):
        preflight.preflight(job, student, preflight.Gate(frozenset()))


def test_one_epoch_has_no_order(corpus: Corpus, tmp_path: Path) -> None:
    train = {**LONGEST_LAST, "stages": [{"epochs": 1, "peak_lr": 1e-3}]}
    with pytest.raises(ConfigError, match=r"1 epoch.*schedule=none"):
        fit(job_for(corpus, tmp_path, train=train), quiet=True)


def test_recordings_that_are_all_as_hard_are_refused(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(difficulty, "difficulty_of", lambda config, student, data, device: np.full(len(data), 0.5))
    with pytest.raises(ConfigError, match=r"All \d+ difficulty scores are 0\.5.*Choose another"):
        fit(job_for(corpus, tmp_path, train=LONGEST_LAST), quiet=True)


def test_a_parent_that_has_heard_the_held_out_speaker_tells_nothing(
    corpus: Corpus, parent: Path, tmp_path: Path
) -> None:
    train = {**STAGES, "init": parent, "curriculum": {"schedule": "linear"}}
    with pytest.raises(LeakageError):
        fit(job_for(corpus, tmp_path, train=train, fold={"held_out": ["t2"]}), quiet=True)
    assert not (tmp_path / DIFFICULTY).exists()


# --- runs --------------------------------------------------------------------------------------------------


class KilledError(BaseException):
    """Stands in for the end of the process."""


STEP = Loop.training_step


def heard(monkeypatch: pytest.MonkeyPatch, killed_in: int | None = None) -> list[list[str]]:
    """Recordings of every batch from now on; the process ends in a batch, if it is said in which."""
    seen: list[list[str]] = []

    def training_step(self: Loop, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.number(batch_idx) == killed_in:
            raise KilledError
        seen.append(list(batch.recordings))
        return STEP(self, batch, batch_idx)

    monkeypatch.setattr(Loop, "training_step", training_step)
    return seen


def test_a_run_hears_the_easiest_first_all_in_the_end_and_makes_as_many_updates(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = heard(monkeypatch)
    job = job_for(corpus, tmp_path / "run", train=LONGEST_LAST)
    fit(job, quiet=True)
    per_epoch = -(-len(job.train) // 3)
    assert len(seen) == 4 * per_epoch
    by_length = [r.recording for r in sorted(job.train, key=lambda r: r.duration)]
    first, last = ({name for batch in part for name in batch} for part in (seen[:per_epoch], seen[-per_epoch:]))
    assert first == set(by_length[: math.ceil(0.3 * len(by_length))])
    assert last == set(by_length)
    plain = heard(monkeypatch)
    fit(job_for(corpus, tmp_path / "plain", train=STAGES), quiet=True)
    assert len(plain) == len(seen)
    assert plain[-per_epoch:] == seen[-per_epoch:]
    kept = json.loads((tmp_path / "run" / DIFFICULTY).read_text())
    assert kept["utterance_scores"] == {r.recording: float(f"{r.duration:.6g}") for r in job.train}
    assert "length in seconds" in read_status(tmp_path / "run")["curriculum"]
    assert load(tmp_path / "run" / "best.pt")[KEPT].tolist() == [r.duration for r in job.train]
    assert KEPT not in load(tmp_path / "plain" / "best.pt")


def test_a_run_that_goes_on_draws_the_same_batches_and_measures_nothing_again(
    corpus: Corpus, parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = {**STAGES, "init": parent, "curriculum": {"schedule": "step"}}
    whole = heard(monkeypatch)
    unbroken = load(fit(job_for(corpus, tmp_path / "a", train=train), quiet=True))["model_state_dict"]
    heard(monkeypatch, killed_in=8)
    with pytest.raises(KilledError):
        fit(job_for(corpus, tmp_path / "b", train=train), quiet=True)
    monkeypatch.setattr(difficulty, "difficulty_of", lambda *_: pytest.fail("measured again"))
    rest = heard(monkeypatch)
    resumed = load(fit(job_for(corpus, tmp_path / "b", train=train), resume=True, quiet=True))["model_state_dict"]
    assert 0 < len(rest) < len(whole)
    assert rest == whole[-len(rest) :]
    assert all(torch.equal(unbroken[name], resumed[name]) for name in unbroken)


def test_what_a_frozen_encoder_says_is_computed_without_augmentation(
    corpus: Corpus, parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = [{"epochs": 1, "peak_lr": 1e-3, "freeze_encoder": True}, {"epochs": 1, "peak_lr": 1e-3}]
    given: list[torch.Tensor] = []
    step = Loop.training_step

    def training_step(self: Loop, batch: Any, batch_idx: int) -> torch.Tensor:
        if batch.encoded is not None:
            given.append(self.data.encoded[0])  # type: ignore[index]
        return step(self, batch, batch_idx)

    monkeypatch.setattr(Loop, "training_step", training_step)
    job = job_for(corpus, tmp_path, train={"stages": stages, "init": parent})
    fit(job, quiet=True)
    recogniser = load_recogniser(parent)
    data = TrainingData(job.train, recogniser.student.front_end, job.tokenizer)
    for places, batch in batches(data, job.config.decode.batch_size):
        if 0 in places:
            with torch.no_grad():
                encoded, lengths = recogniser.student.encode(batch.features, batch.feature_lengths)  # type: ignore[arg-type]
            row = places.index(0)
            torch.testing.assert_close(given[0], encoded[row, : int(lengths[row])])


def test_the_doctor_sees_the_curriculum_of_a_run(corpus: Corpus, tmp_path: Path) -> None:
    out = tmp_path / "run"
    fit(job_for(corpus, out, train=LONGEST_LAST), quiet=True)
    assert "curriculum" in {p.check for p in examine_all([out]).passed}
    card = json.loads((out / DIFFICULTY).read_text())
    card["utterance_scores"] = dict.fromkeys(card["utterance_scores"], 0.5)
    (out / DIFFICULTY).write_text(json.dumps(card))
    assert "curriculum" in {f.check for f in examine_all([out]).at_least("refuse")}


# --- studies -----------------------------------------------------------------------------------------------


def test_a_study_says_its_curricula_in_its_attempts(corpus: Corpus) -> None:
    sqrt = {"set": {"train.curriculum.schedule": "sqrt"}, "start": "parent"}
    study = tiny_study(corpus, {"all at once": {"start": "parent"}, "easy first": sqrt})
    assert study.config_of("easy first").train.curriculum == CurriculumConfig(schedule="sqrt")
    assert study.config_of("all at once").train.curriculum.schedule == "none"
    with pytest.raises(StudyError, match=r"'a' orders recordings by the parent's loss.*start: parent"):
        tiny_study(corpus, {"a": {**sqrt, "start": "scratch"}})
    targets = {"set": {"train.curriculum.schedule": "sqrt", "train.curriculum.difficulty": "targets"}}
    with pytest.raises(StudyError, match=r"'a' orders recordings by targets.*has none"):
        tiny_study(corpus, {"a": targets})


def test_an_unknown_schedule_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"curriculum\.schedule.*'none', 'linear', 'sqrt' or 'step'"):
        tiny_config(train={"curriculum": {"schedule": "cubic"}})
