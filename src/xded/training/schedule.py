"""The learning rate as a pure function of the update's number, so that a resumed run continues the curve."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from xded.config import StageConfig, TrainConfig

COSINE_FLOOR = 0.05  # share of the peak at the end of a cosine stage
WARMUP_SHARE = 0.1  # warm-up takes at most this share of a stage


@dataclass(frozen=True)
class Schedule:
    """Stages in updates. `batches_per_epoch` and `accumulate` turn epochs into updates."""

    stages: tuple[StageConfig, ...]
    batches_per_epoch: int
    accumulate: int
    warmup_steps: int
    decay: str

    @classmethod
    def of(cls, config: TrainConfig, stages: Sequence[StageConfig], batches_per_epoch: int) -> Schedule:
        """The schedule of a run."""
        return cls(tuple(stages), batches_per_epoch, config.accumulate, config.warmup_steps, config.decay)

    @property
    def epochs(self) -> int:
        """Epochs of all stages."""
        return sum(stage.epochs for stage in self.stages)

    @property
    def updates(self) -> int:
        """Updates of all stages."""
        return -(-self.epochs * self.batches_per_epoch // self.accumulate)

    def epoch_of_batch(self, batch: int) -> int:
        """Epoch (from 0) that a batch number (from 0) belongs to."""
        return batch // self.batches_per_epoch

    def stage_of_epoch(self, epoch: int) -> int:
        """Number (from 0) of the stage that an epoch (from 0) belongs to."""
        for number, stage in enumerate(self.stages):
            if epoch < stage.epochs:
                return number
            epoch -= stage.epochs
        return len(self.stages) - 1

    def first_update(self, stage: int) -> int:
        """First update of a stage."""
        epochs = sum(s.epochs for s in self.stages[:stage])
        return -(-epochs * self.batches_per_epoch // self.accumulate)

    def warmup(self, stage: int) -> int:
        """Updates of warm-up, capped at a tenth of the stage."""
        length = (self.first_update(stage + 1) if stage + 1 < len(self.stages) else self.updates) - self.first_update(
            stage
        )
        return max(1, min(self.warmup_steps, int(WARMUP_SHARE * length)))

    def learning_rate(self, update: int) -> float:
        """Learning rate of an update (from 0): linear warm-up to the stage's peak, then the decay."""
        number = self.stage_of_epoch(self.epoch_of_batch(update * self.accumulate))
        stage, first = self.stages[number], self.first_update(number)
        last = self.first_update(number + 1) if number + 1 < len(self.stages) else self.updates
        step, warmup = update - first, self.warmup(number)
        if step < warmup:
            return stage.peak_lr * (step + 1) / warmup
        if self.decay == "constant":
            return stage.peak_lr
        if self.decay == "noam":  # Vaswani et al. 2017, equation 3, scaled so that its peak is peak_lr
            return stage.peak_lr * math.sqrt(warmup / (step + 1))
        progress = (step - warmup) / max(1, last - first - warmup)
        return stage.peak_lr * (COSINE_FLOOR + (1 - COSINE_FLOOR) * 0.5 * (1 + math.cos(math.pi * progress)))
