"""Independent pieces of work in processes of this machine, one torch thread each."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from typing import TypeVar

from xded.errors import TrainingError

Argument = TypeVar("Argument")
Result = TypeVar("Result")


def default_jobs() -> int:
    """Processes that this machine has cores for."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start_worker() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    # Ctrl-C reaches every process of the terminal: the first one decides, a training run handles it by itself
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()
    import torch

    torch.set_num_threads(1)


def end_with_parent() -> None:
    """Ends this worker when the process that started it is killed; otherwise it would wait for work forever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@cache
def pool(jobs: int) -> ProcessPoolExecutor:
    """The processes of this run: kept, because a fresh one spends seconds on importing torch."""
    context = multiprocessing.get_context("spawn")  # torch and fork do not mix
    return ProcessPoolExecutor(jobs, mp_context=context, initializer=_start_worker)


def worker() -> ProcessPoolExecutor:
    """A process by itself. Ctrl-C does not reach it: whoever started it ends it, a training run with SIGTERM."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(1, mp_context=context, initializer=_start_apart)


def _start_apart() -> None:
    if hasattr(os, "setpgrp"):
        os.setpgrp()
    _start_worker()


def run_all(
    function: Callable[[Argument], Result],
    arguments: Sequence[Argument],
    jobs: int,
    done: Callable[[int], object] = lambda count: None,
) -> list[Result]:
    """`function` of every argument, in order; with more than one job in other processes.

    The first error is raised after the pieces under way have ended; finished pieces are on disk and are not lost.

    Args:
        function, arguments, jobs: what to do, with what, in how many processes.
        done: called with the number of finished pieces whenever one ends.

    Raises:
        TrainingError: a process was killed from outside.
    """
    if jobs <= 1 or len(arguments) <= 1:
        results = []
        for count, argument in enumerate(arguments, start=1):
            results.append(function(argument))
            done(count)
        return results
    try:
        futures = [pool(jobs).submit(function, argument) for argument in arguments]
        for count, future in enumerate(as_completed(futures), start=1):
            future.result()
            done(count)
        return [future.result() for future in futures]
    except BrokenProcessPool as error:
        drop_pool(jobs)
        raise TrainingError(
            f"One of {jobs} worker processes was killed; often the memory was not enough for all of them.",
            "Give the same command again with fewer --jobs: what is finished is kept.",
        ) from error
    except BaseException:
        drop_pool(jobs)
        raise


def drop_pool(jobs: int) -> None:
    """Ends the processes of `pool`; the next call makes new ones."""
    pool(jobs).shutdown(wait=True, cancel_futures=True)
    pool.cache_clear()
