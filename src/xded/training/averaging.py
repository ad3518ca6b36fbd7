"""Averaged weights: what a run is tested with, and keeps, in the place of its last weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from xded.config import TrainConfig


class Average:
    """The mean of a module's weights after each update, beside them: one more copy, and nothing else.

    `ema` is their exponential moving average from the start on (Polyak and Juditsky 1992; Tarvainen and Valpola 2017,
    arXiv:1703.01780, section 2), whose n-th update keeps min(decay, (1 + n) / (10 + n)) of it, so that the weights of
    the start are soon forgotten. `last` is the plain mean of the last updates (Izmailov et al. 2018, arXiv:1803.05407,
    without its own learning rate); before them there is none yet.

    Buffers are averaged like parameters (statistics of batch norms; whole numbers are copied). What does not move, such
    as a frozen part, is bit by bit its own average.

    Args:
        module: whose tensors stay the same objects from now on, on the device where they are.
        train: says which mean; updates: of the whole run.
    """

    def __init__(self, module: nn.Module, train: TrainConfig, updates: int) -> None:
        self.own: dict[str, Tensor] = module.state_dict(keep_vars=True)
        self.decay = train.ema_decay if train.average == "ema" else None
        self.after = 0 if train.average == "ema" else updates - max(1, round(train.average_last * updates))
        self.kept: dict[str, Tensor] = {}  # the mean; empty before the first update that counts
        self.count = 0  # updates in it
        if train.average == "ema":
            self._begin()

    def _begin(self) -> None:
        self.kept = {name: value.detach().clone() for name, value in self.own.items()}

    @torch.no_grad()
    def take(self, update: int) -> None:
        """Adds the weights after an update (from 1)."""
        if update <= self.after:
            return
        if not self.kept:
            self._begin()
        self.count += 1
        n = self.count
        new = 1 / n if self.decay is None else 1 - min(self.decay, (1 + n) / (10 + n))
        floating = [name for name, value in self.own.items() if value.is_floating_point()]
        torch._foreach_lerp_([self.kept[name] for name in floating], [self.own[name] for name in floating], new)
        for name in self.own.keys() - set(floating):
            self.kept[name].copy_(self.own[name])

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """For as long as this lasts, the module has the mean (where there is one) and this has its weights."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        for name, kept in self.kept.items():  # memory changes hands: nothing is copied
            own = self.own[name]
            own.data, kept.data = kept.data, own.data

    def state(self) -> dict[str, Any]:
        """What `restore` needs."""
        return {"count": self.count, "weights": dict(self.kept)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state`."""
        self.count = state["count"]
        self.kept = {name: value.to(self.own[name].device, copy=True) for name, value in state["weights"].items()}
