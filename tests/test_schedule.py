"""Order of the batches and learning rate: pure functions of the batch number."""

from __future__ import annotations

import math

import numpy as np
import pytest

from xded.config import StageConfig
from xded.training.order import Order, RunSampler
from xded.training.schedule import COSINE_FLOOR, Schedule


def test_every_epoch_holds_every_recording_once_in_another_order() -> None:
    lengths = tuple(int(n) for n in np.random.default_rng(0).integers(300, 900, 100))
    epochs = [Order(lengths, 8, 0).epoch(epoch) for epoch in range(2)]
    for batches in epochs:
        assert sorted(i for batch in batches for i in batch) == list(range(100))
        assert [len(batch) for batch in batches].count(8) == 12
    assert epochs[0] != epochs[1]
    assert epochs[0] != Order(lengths, 8, 1).epoch(0)


def test_like_lengths_share_a_batch_where_there_are_many() -> None:
    lengths = tuple(int(n) for n in np.random.default_rng(0).integers(300, 900, 128))
    spreads = [max(lengths[i] for i in b) - min(lengths[i] for i in b) for b in Order(lengths, 8, 0).epoch(0)]
    assert np.mean(spreads) < 100


@pytest.mark.parametrize("first", [0, 1, 5, 13, 20])
def test_a_sampler_that_starts_later_gives_the_rest(first: int) -> None:
    order = Order(tuple(range(400, 417)), 4, 0)
    whole, rest = list(RunSampler(order, 4)), RunSampler(order, 4, first)
    assert len(whole) == 20
    assert list(rest) == whole[first:]
    assert len(rest) == 20 - first


STAGES = (StageConfig(epochs=4, peak_lr=3e-3, freeze_encoder=True), StageConfig(epochs=10, peak_lr=2e-3))


@pytest.mark.parametrize("accumulate", [1, 2, 3])
@pytest.mark.parametrize("decay", ["constant", "cosine", "noam"])
def test_schedule_peaks_and_warms_up_for_a_tenth_of_each_stage(accumulate: int, decay: str) -> None:
    schedule = Schedule(STAGES, 25, accumulate, warmup_steps=2_000, decay=decay)
    rates = [schedule.learning_rate(update) for update in range(schedule.updates)]
    assert schedule.updates == math.ceil(350 / accumulate)
    border = schedule.first_update(1)
    assert border == math.ceil(100 / accumulate)
    for part, peak in ((rates[:border], 3e-3), (rates[border:], 2e-3)):
        warmup = len(part) // 10
        assert max(part) == pytest.approx(peak)
        np.testing.assert_allclose(part[:warmup], peak * np.arange(1, warmup + 1) / warmup)
        if decay == "constant":
            assert set(part[warmup:]) == {peak}
        else:
            assert (np.diff(part[warmup:]) < 0).all()
            assert part[-1] > 0
        if decay == "cosine":
            assert part[-1] == pytest.approx(peak * COSINE_FLOOR, rel=0.1)


@pytest.mark.parametrize("asked", [0, 1, 5])
def test_a_short_warm_up_is_kept_as_asked(asked: int) -> None:
    schedule = Schedule((StageConfig(epochs=10, peak_lr=1.0),), 10, 1, warmup_steps=asked, decay="constant")
    rates = [schedule.learning_rate(update) for update in range(6)]
    expected = [(i + 1) / asked if i < asked else 1.0 for i in range(6)]
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_epochs_and_stages_follow_from_the_batch(accumulate: int) -> None:
    schedule = Schedule(STAGES, 5, accumulate, 0, "constant")
    assert schedule.epochs == 14
    assert [schedule.epoch_of_batch(batch) for batch in (0, 4, 5, 69)] == [0, 0, 1, 13]
    assert [schedule.stage_of_epoch(epoch) for epoch in (0, 3, 4, 13)] == [0, 0, 1, 1]
    # an update whose batches lie in two stages has the rate of the first of them
    assert schedule.learning_rate(schedule.first_update(1) - 1) == STAGES[0].peak_lr
    assert schedule.learning_rate(schedule.first_update(1)) == STAGES[1].peak_lr
