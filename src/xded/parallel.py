"""Independent pieces of work in processes of this machine, one torch thread each."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
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


def run_all(function: Callable[[Argument], Result], arguments: Sequence[Argument], jobs: int) -> list[Result]:
    """`function` of every argument, in order; with more than one job in fresh processes.

    The first error is raised after the pieces under way have ended; finished pieces are on disk and are not lost.
    """
    if jobs <= 1 or len(arguments) <= 1:
        return [function(argument) for argument in arguments]
    context = multiprocessing.get_context("spawn")  # torch and fork do not mix
    with ProcessPoolExecutor(min(jobs, len(arguments)), mp_context=context, initializer=_one_thread) as pool:
        futures = [pool.submit(function, argument) for argument in arguments]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
