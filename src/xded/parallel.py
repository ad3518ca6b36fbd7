"""Independent pieces of work in processes of this machine, one torch thread each."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from typing import TypeVar

Argument = TypeVar("Argument")
Result = TypeVar("Result")


def default_jobs() -> int:
    """Processes that this machine has cores for."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _one_thread() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)


@cache
def _pool(jobs: int) -> ProcessPoolExecutor:
    """The processes of this run: kept, because a fresh one spends seconds on importing torch."""
    context = multiprocessing.get_context("spawn")  # torch and fork do not mix
    return ProcessPoolExecutor(jobs, mp_context=context, initializer=_one_thread)


def run_all(function: Callable[[Argument], Result], arguments: Sequence[Argument], jobs: int) -> list[Result]:
    """`function` of every argument, in order; with more than one job in other processes.

    The first error is raised after the pieces under way have ended; finished pieces are on disk and are not lost.
    """
    if jobs <= 1 or len(arguments) <= 1:
        return [function(argument) for argument in arguments]
    futures = [_pool(jobs).submit(function, argument) for argument in arguments]
    try:
        return [future.result() for future in futures]
    except BaseException:
        _pool(jobs).shutdown(wait=True, cancel_futures=True)
        _pool.cache_clear()
        raise
