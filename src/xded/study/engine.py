"""Runs the pieces of a study in the order of what they need: in processes of this machine, or on a Ray cluster.

A finished piece leaves `done.json` with its key; a piece that failed stops only what needs it.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch

from xded.errors import TrainingError, XdedError
from xded.parallel import worker
from xded.study.pieces import DECODES, predictions_in
from xded.study.steps import Step
from xded.training.energy import Meter
from xded.training.loop import InterruptedRunError
from xded.training.status import write_atomically

DONE = "done.json"
State = Literal["waiting", "running", "done", "failed", "left out", "not needed"]
HEARTBEAT_S = 5.0
MOST_LOSSES = 3  # times that a piece is started again because its worker died


class Workers(Protocol):
    """Where pieces run."""

    slots: int
    lost: tuple[type[Exception], ...]  # errors that say that the worker died, not that the piece failed

    def submit(self, step: Step) -> Future[float]:
        """Starts a piece; the result is its seconds."""

    def close(self) -> None:
        """Ends the workers; training that is under way saves first."""


@dataclass
class Progress:
    """What has happened to every piece."""

    states: dict[str, State]
    seconds: dict[str, float] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    joules: dict[str, float] = field(default_factory=dict)  # of pieces where it could be measured

    def finish(self, step: Step) -> None:
        """Notes that a piece is done, and what it says that it took."""
        mark = _mark_of(step)
        self.states[step.key] = "done"
        self.seconds[step.key] = float(mark.get("seconds", 0.0))
        if mark.get("joules") is not None:
            self.joules[step.key] = float(mark["joules"])

    def count(self, state: State) -> int:
        """Pieces in a state."""
        return sum(s == state for s in self.states.values())


def is_done(step: Step) -> bool:
    """Whether a piece's result is there, made from the same things."""
    if step.kind in ("attempt", "test") and not all(predictions_in(step.folder, d).is_file() for d in DECODES):
        return False
    return _mark_of(step).get("key") == step.key


def _mark_of(step: Step) -> dict[str, Any]:
    try:
        mark = json.loads((step.folder / DONE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return mark if isinstance(mark, dict) else {}


def do(step: Step) -> float:
    """Does a piece and leaves its mark; returns the seconds that it took.

    One thread, unless the piece's config says otherwise: pieces run side by side, and sums in another order would give
    another engine another table.
    """
    torch.set_num_threads(1)
    begun = time.monotonic()
    with Meter() as meter:
        step.work()
    seconds = round(time.monotonic() - begun, 2)
    step.folder.mkdir(parents=True, exist_ok=True)
    mark = {
        "key": step.key, "kind": step.kind, "title": step.title, "seconds": seconds, "joules": meter.joules
    }  # fmt: skip
    write_atomically(step.folder / DONE, json.dumps(mark))
    return seconds


class LocalWorkers:
    """Processes of this machine; with one slot this process. One that is killed takes only its own piece with it."""

    lost: tuple[type[Exception], ...] = (BrokenProcessPool, InterruptedRunError)

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self._idle: list[_Process] = []
        self._busy: dict[Future[float], _Process] = {}

    def submit(self, step: Step) -> Future[float]:
        """Starts a piece; with one slot, it has ended when this returns.

        Raises:
            InterruptedRunError: with one slot, when training was asked to stop.
        """
        return self._submit_elsewhere(step) if self.slots > 1 else _do_here(step)

    def _submit_elsewhere(self, step: Step) -> Future[float]:
        for future in [future for future in self._busy if future.done()]:
            self._idle.append(self._busy.pop(future))
        while True:
            process = self._idle.pop() if self._idle else _Process()
            try:
                future = process.executor.submit(do, step)
            except BrokenProcessPool:  # it was killed
                continue
            self._busy[future] = process
            return future

    def close(self) -> None:
        """Ends the processes."""
        processes = [*self._busy.values(), *self._idle]
        for future, process in self._busy.items():
            if not future.done():
                process.ask_to_stop()
        for process in processes:
            process.executor.shutdown(wait=True, cancel_futures=True)
        self._busy, self._idle = {}, []


class _Process:
    """A process for pieces."""

    def __init__(self) -> None:
        self.executor: ProcessPoolExecutor = worker()
        self._number = self.executor.submit(os.getpid)

    def ask_to_stop(self) -> None:
        """What trains saves and stops; what does not ends at once."""
        if self._number.done() and self._number.exception() is None:
            with suppress(ProcessLookupError):
                os.kill(self._number.result(), signal.SIGTERM)


def _do_here(step: Step) -> Future[float]:
    future: Future[float] = Future()
    try:
        future.set_result(do(step))
    except InterruptedRunError:
        raise
    except Exception as error:
        future.set_exception(error)
    return future


def run(
    steps: Sequence[Step],
    workers: Workers,
    *,
    fits: Callable[[Step, Progress], bool] = lambda step, progress: True,
    watch: Callable[[Progress], object] = lambda progress: None,
) -> Progress:
    """Runs every piece that is not done and that something needs.

    Args:
        steps: in an order that satisfies their needs.
        workers: where; they are not closed.
        fits: asked before a piece is started; false: it is left out (the budget is used up).
        watch: told whenever something changed, and every few seconds.

    Returns:
        What became of each piece. Failures are in it; they are not raised.
    """
    progress = begin(steps)
    running: dict[Future[float], Step] = {}
    losses: Counter[str] = Counter()
    while True:
        for step in _startable(steps, progress, workers.slots - len(running)):
            if not fits(step, progress):
                progress.states[step.key] = "left out"
                continue
            progress.states[step.key] = "running"
            watch(progress)
            running[workers.submit(step)] = step
        watch(progress)
        if not running and not any(_startable(steps, progress, 1)):
            break
        finished = wait(running, timeout=HEARTBEAT_S, return_when=FIRST_COMPLETED).done if running else set()
        for future in finished:
            step, error = running.pop(future), future.exception()
            if error is None:
                progress.finish(step)
            elif not isinstance(error, workers.lost):
                _settle(step, error, steps, progress)
            elif losses[step.key] < MOST_LOSSES:
                losses[step.key] += 1
                progress.states[step.key] = "waiting"  # it goes on from its last checkpoint
            else:
                _settle(step, _given_up(step), steps, progress)
    for key, state in progress.states.items():
        if state == "waiting":  # for what was left out
            progress.states[key] = "left out"
    return progress


def begin(steps: Sequence[Step]) -> Progress:
    """What is done, what is to be done, and what is not there but only served pieces that are done."""
    done = {step.key for step in steps if is_done(step)}
    wanted: set[str] = set()
    for step in reversed(steps):
        if step.key not in done and (step.kind in ("attempt", "test") or step.key in wanted):
            wanted |= {step.key, *step.needs}
    states: dict[str, State] = {
        s.key: "done" if s.key in done else "waiting" if s.key in wanted else "not needed" for s in steps
    }
    progress = Progress(states)
    for step in steps:
        if step.key in done:
            progress.finish(step)
    return progress


def _given_up(step: Step) -> XdedError:
    return TrainingError(
        f"The worker of '{step.title}' was killed {MOST_LOSSES + 1} times; often the memory was not enough.",
        "Use fewer --jobs, or with Ray more --memory-gb: what is finished is kept.",
    )


def _startable(steps: Sequence[Step], progress: Progress, free: int) -> Iterator[Step]:
    """Pieces whose needs are done, at most as many as there are free slots."""
    for step in steps:
        if free <= 0:
            return
        ready = all(progress.states.get(need, "done") == "done" for need in step.needs)
        if progress.states[step.key] == "waiting" and ready:
            free -= 1
            yield step


def _settle(step: Step, error: BaseException, steps: Sequence[Step], progress: Progress) -> None:
    """Notes that a piece has failed; what needs it is left out."""
    progress.states[step.key] = "failed"
    progress.errors[step.key] = str(error) if isinstance(error, XdedError) else f"{type(error).__name__}: {error}"
    lost = {step.key}
    for other in steps:
        if progress.states[other.key] == "waiting" and lost & set(other.needs):
            progress.states[other.key] = "left out"
            progress.errors[other.key] = f"needs '{step.title}', which failed"
            lost.add(other.key)
