"""Averaged weights: which mean it is, when they are used, and that they are nowhere else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tiny_corpus import job_for, write_corpus
from xded.config import TrainConfig
from xded.corpus.manifest import Corpus
from xded.models.checkpoints import load
from xded.models.recogniser import load_recogniser
from xded.training import run
from xded.training.averaging import Average
from xded.training.evaluation import validate
from xded.training.run import fit

# 14 recordings in batches of 4: 4 updates an epoch
TRAIN: dict[str, Any] = {
    "stages": [{"epochs": 4, "peak_lr": 3e-3}], "batch_size": 4, "checkpoint_every_epochs": 1, "save_every_steps": 1,
}  # fmt: skip
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[State]:
    """The weights after every update of the runs of a test; those of the start first, where an average is made."""
    states: list[State] = []
    init, take = Average.__init__, Average.take

    def made(self: Average, *args: Any) -> None:
        init(self, *args)
        states.append({name: value.detach().clone() for name, value in self.own.items()})

    def taken(self: Average, update: int) -> None:
        states.append({name: value.detach().clone() for name, value in self.own.items()})
        take(self, update)

    monkeypatch.setattr(Average, "__init__", made)
    monkeypatch.setattr(Average, "take", taken)
    return states


def trained(corpus: Corpus, out: Path, **train: Any) -> Path:
    fit(job_for(corpus, out, train={**TRAIN, **train}), quiet=True)
    return out


def assert_close(found: State, wanted: State) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def moving_average(states: list[State], decay: float) -> State:
    mean = dict(states[0])
    for n, state in enumerate(states[1:], start=1):
        kept = min(decay, (1 + n) / (10 + n))
        for name, value in state.items():
            mean[name] = kept * mean[name] + (1 - kept) * value if value.is_floating_point() else value
    return mean


@pytest.mark.parametrize("decay", [0.999, 0.3])
def test_best_holds_the_moving_average_and_latest_holds_both(
    corpus: Corpus, tmp_path: Path, seen: list[State], decay: float
) -> None:
    out = trained(corpus, tmp_path / "run", average="ema", ema_decay=decay)
    assert len(seen) == 1 + 16
    latest, last = load(out / "latest.pt"), load(out / "checkpoint_epoch_4.pt")
    for name, value in latest["model_state_dict"].items():
        assert value.equal(seen[-1][name]), name
    assert latest["average"]["count"] == last["averaged"] == 16
    assert_close(latest["average"]["weights"], moving_average(seen, decay))
    for name, value in last["model_state_dict"].items():
        assert value.equal(latest["average"]["weights"][name]), name
    best = load(out / "best.pt")
    assert_close(best["model_state_dict"], moving_average(seen[: 1 + 4 * best["epoch"]], decay))
    assert "average" not in best
    statistics = [name for name in best["model_state_dict"] if name.endswith("running_var")]
    assert statistics
    counted = [name for name in last["model_state_dict"] if name.endswith("num_batches_tracked")]
    assert all(last["model_state_dict"][name] == 16 for name in counted)


def test_the_mean_of_the_last_begins_late_and_is_plain(corpus: Corpus, tmp_path: Path, seen: list[State]) -> None:
    out = trained(corpus, tmp_path / "run", average="last", average_last=0.3)  # 5 of 16 updates
    kept = {epoch: load(out / f"checkpoint_epoch_{epoch}.pt") for epoch in (2, 3, 4)}
    assert [kept[epoch]["averaged"] for epoch in (2, 3, 4)] == [0, 1, 5]
    for name, value in kept[2]["model_state_dict"].items():
        assert value.equal(seen[8][name]), name  # none yet: the weights themselves
    wanted = {
        name: torch.stack([state[name] for state in seen[-5:]]).mean(0) if value.is_floating_point() else value
        for name, value in seen[-1].items()
    }
    assert_close(kept[4]["model_state_dict"], wanted)
    assert not torch.equal(kept[4]["model_state_dict"]["ctc_head.weight"], seen[-1]["ctc_head.weight"])


def test_what_is_validated_is_what_is_kept(
    corpus: Corpus, tmp_path: Path, seen: list[State], monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[State] = []

    def validating(student: nn.Module, *args: Any, **named: Any) -> dict[str, float]:
        heard.append({name: value.detach().clone() for name, value in student.state_dict().items()})
        return validate(student, *args, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(run, "validate", validating)
    out = trained(corpus, tmp_path / "run", average="ema")
    for epoch, state in enumerate(heard, start=1):
        kept = load(out / f"checkpoint_epoch_{epoch}.pt")["model_state_dict"]
        assert all(value.equal(kept[name]) for name, value in state.items())
    best = load(out / "best.pt")
    assert max(best["history"], key=lambda row: (row["wra"], -row["val_loss"]))["epoch"] == best["epoch"]
    student = load_recogniser(out).student
    assert all(value.equal(best["model_state_dict"][name]) for name, value in student.state_dict().items())


def test_best_is_averaged_even_where_an_epoch_before_the_mean_was_better(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wra = iter([0.9, 0.8, 0.3, 0.2])
    monkeypatch.setattr(run, "validate", lambda *args, **named: {**validate(*args, **named), "wra": next(wra)})
    out = trained(corpus, tmp_path / "run", average="last", average_last=0.5)  # epochs 3 and 4
    best = load(out / "best.pt")
    assert (best["epoch"], best["averaged"], best["best"]["wra"]) == (3, 4, 0.3)


@pytest.mark.parametrize("average", ["ema", "last"])
def test_averaging_changes_nothing_of_the_training(corpus: Corpus, tmp_path: Path, average: str) -> None:
    plain, averaged = (trained(corpus, tmp_path / kind, average=kind) for kind in ("none", average))
    one, two = load(plain / "latest.pt"), load(averaged / "latest.pt")
    assert two.keys() - one.keys() == {"average"}
    assert not {"average", "averaged"} & load(plain / "best.pt").keys()
    for name, value in one["model_state_dict"].items():
        assert value.equal(two["model_state_dict"][name]), name
    assert [row["train_loss"] for row in one["history"]] == [row["train_loss"] for row in two["history"]]
    assert [row["val_loss"] for row in one["history"]] != [row["val_loss"] for row in two["history"]]


def test_a_frozen_part_is_its_own_average(corpus: Corpus, tmp_path: Path) -> None:
    parent = trained(corpus, tmp_path / "parent")
    out = trained(corpus, tmp_path / "run", average="ema", freeze_layers=1, init=parent)
    before, after = load(parent / "best.pt")["model_state_dict"], load(out / "best.pt")["model_state_dict"]
    frozen = [name for name in before if name.startswith(("encoder.subsampling", "encoder.layers.0"))]
    assert len(frozen) > 10
    assert all(before[name].equal(after[name]) for name in frozen)
    assert not before["ctc_head.weight"].equal(after["ctc_head.weight"])


def test_the_weights_are_back_even_when_what_is_done_with_the_mean_fails() -> None:
    module = nn.Linear(2, 2)
    average = Average(module, TrainConfig(average="ema"), 10)
    before = module.weight.detach().clone()
    with torch.no_grad():
        module.weight += 1.0
    pointer = module.weight.data_ptr()
    tested = average.in_place()
    tested.__enter__()
    assert module.weight.equal(before)
    assert not tested.__exit__(KeyError, KeyError(), None)
    assert module.weight.equal(before + 1.0)
    assert module.weight.data_ptr() == pointer  # where the optimiser and DDP know it


def test_one_more_copy_and_before_it_is_needed_none() -> None:
    module = nn.Linear(2, 2)
    average = Average(module, TrainConfig(average="last", average_last=0.2), 10)
    for update in range(1, 9):
        average.take(update)
    assert average.kept == {}
    average.take(9)
    assert average.kept.keys() == dict(module.named_parameters()).keys()
