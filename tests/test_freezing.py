"""Layers that thaw stage by stage."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tiny_corpus import MODEL, job_for, write_corpus
from xded.config import StageConfig, TrainConfig
from xded.corpus.manifest import Corpus
from xded.errors import ConfigError
from xded.models.checkpoints import load
from xded.training import run
from xded.training.run import fit

SIZES = {**MODEL, "encoder_layers": 2}
PARTS = ("encoder.subsampling.", "encoder.layers.0.", "encoder.layers.1.", "decoder.", "ctc_head.")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def stages(*frozen: int | None) -> list[dict[str, Any]]:
    return [{"epochs": 1, "peak_lr": 1e-3, "freeze_layers": count} for count in frozen]


def trained(corpus: Corpus, out: Path, **train: Any) -> list[dict[str, Tensor]]:
    """Weights after each epoch."""
    train = {"checkpoint_every_epochs": 1, "batch_size": 3, **train}
    fit(job_for(corpus, out, model=SIZES, train=train), quiet=True)
    epochs = sorted(out.glob("checkpoint_epoch_*.pt"))
    return [load(path)["model_state_dict"] for path in epochs]


def moved(one: dict[str, Tensor], other: dict[str, Tensor]) -> set[str]:
    """Parts of which anything moved, batch-norm statistics included."""
    names = [name for name in one if not one[name].equal(other[name])]
    return {part for part in PARTS if any(name.startswith(part) for name in names)}


@pytest.mark.parametrize("accumulate", [1, 2])  # 5 batches an epoch: the fourth stage begins within an update
def test_each_stage_trains_what_it_does_not_freeze(corpus: Corpus, tmp_path: Path, accumulate: int) -> None:
    found = trained(corpus, tmp_path / "run", stages=stages(2, 1, 0, 2, None), freeze_layers=1, accumulate=accumulate)
    head = {"decoder.", "ctc_head."}
    steps = [moved(a, b) for a, b in pairwise(found)]
    assert steps == [{*PARTS[2:]}, {*PARTS}, head, {*PARTS[2:]}]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    watched = [row for row in rows if row["event"] == "frozen"]
    assert [(row["stage"], row["moved"]) for row in watched] == [(1, []), (2, []), (4, []), (5, [])]
    sizes = [row["of"] for row in watched]
    assert sizes[0] == sizes[2] > sizes[1] == sizes[3] > 0


def test_a_stage_that_says_nothing_freezes_what_the_run_says() -> None:
    train = TrainConfig(freeze_layers=1)
    assert train.frozen_parts(StageConfig()) == ("encoder.subsampling", "encoder.layers.0")
    assert train.frozen_parts(StageConfig(freeze_layers=0)) == ()
    assert train.frozen_parts(StageConfig(freeze_encoder=True, freeze_layers=1)) == ("encoder",)


def test_the_same_for_all_stages_is_what_the_run_says(corpus: Corpus, tmp_path: Path) -> None:
    one = trained(corpus, tmp_path / "one", stages=stages(1, 1))
    other = trained(corpus, tmp_path / "other", stages=stages(None, None), freeze_layers=1)
    assert moved(one[-1], other[-1]) == set()


def test_more_layers_than_there_are_are_refused_in_any_stage(corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"freeze_layers is 3, and the encoder has 2 layers.*at most 2"):
        trained(corpus, tmp_path / "run", stages=stages(0, 3))


@pytest.mark.parametrize(("frozen", "some"), [((0, 1), True), ((0, 0), False)])
def test_processes_are_told_when_a_stage_leaves_parameters_out(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, frozen: tuple[int, int], some: bool
) -> None:
    told: list[bool] = []

    def strategy(place: object, device: torch.device, some_unused: bool) -> tuple[str, list[Any]]:
        told.append(some_unused)
        return "auto", []

    monkeypatch.setattr(run, "strategy_of", strategy)
    trained(corpus, tmp_path / "run", stages=stages(*frozen))
    assert told == [some]
