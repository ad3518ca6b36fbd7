"""Easy recordings first: from what share of the recordings the batches of each epoch are drawn."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from xded.config import CurriculumConfig
from xded.errors import ConfigError, TrainingError
from xded.models import collective

FEWEST_EPOCHS = 2
STEPS = (0.6, 0.8, 1.0)  # shares of the second, third and last quarter of a `step` schedule


def shares_of(config: CurriculumConfig, epochs: int) -> tuple[float, ...]:
    """Share of the recordings that each epoch is drawn from: grows from `start` to 1, which the last epoch has.

    `linear` and `sqrt` are the competence functions of Platanios et al. 2019 (arXiv:1903.09848, equations 6 and 7), by
    epochs: sqrt adds fewer and fewer recordings, so that the new ones stay the same share of all. `step` adds some
    after every quarter.

    Raises:
        ConfigError: a run of one epoch has no order of epochs.
    """
    if epochs < FEWEST_EPOCHS:
        raise ConfigError(
            f"train.curriculum.schedule is {config.schedule}, and the run has {epochs} epoch.",
            "Train for more epochs, or set train.curriculum.schedule=none.",
        )
    first, shares = config.start, []
    for epoch in range(epochs):
        done = epoch / (epochs - 1)
        if config.schedule == "linear":
            share = first + (1.0 - first) * done
        elif config.schedule == "sqrt":
            share = math.sqrt(first**2 + (1.0 - first**2) * done)
        else:
            share = max(first, (first, *STEPS)[4 * epoch // epochs])
        shares.append(min(1.0, share))
    return (*shares[:-1], 1.0)


@dataclass(frozen=True, eq=False)  # of a run there is one: comparing its 100,000 numbers at every batch would cost
class Curriculum:
    """Which recordings each epoch is drawn from.

    Attributes:
        order: indices of the training recordings, easiest first; shares: of them, by epoch.
    """

    order: tuple[int, ...]
    shares: tuple[float, ...]

    def offered(self, epoch: int, batch_size: int) -> np.ndarray:
        """Indices of the easiest recordings, in ascending order: at least a batch of them."""
        count = max(batch_size, math.ceil(self.shares[epoch] * len(self.order) - 1e-9))
        return np.sort(np.array(self.order[:count]))


def require_same_order(order: Sequence[int]) -> None:
    """Compares the order of the recordings in all processes of a run.

    Raises:
        TrainingError: they differ, as measurements on unlike machines may.
    """
    own = hashlib.sha256(json.dumps(list(order)).encode()).hexdigest()
    if len(set(collective.everyones(own))) > 1:
        raise TrainingError(
            "The processes of this run have measured the difficulty of the recordings differently.",
            "Use machines of one kind, or set train.curriculum.difficulty=duration.",
        )
