"""Spawns the processes that train one run together, waits for them, and ends them all when one fails.

Lightning's own way, giving the command again, needs a command line, and nothing may be forked that has threads;
spawning serves every caller. The caller's process does no work itself: so it can pass on a request to stop, and
notice an end that the others would wait for. Imports no torch.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import connection, get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

from xded.errors import GO_ON, TrainingError, XdedError
from xded.parallel import end_with_parent

GRACE_S = 10.0  # after the first error, for the others to end by themselves

Work = Callable[[int, Path], object]


def launch(work: Work, count: int) -> None:
    """Runs `work` in `count` processes of this machine and waits for all of them.

    Args:
        work: called in each with its number, from 0, and a folder that they share as long as they run.

    Raises:
        XdedError: what ended the first process that failed; the others have been ended too.
        KeyboardInterrupt: one was ended by a SIGTERM, which `work` may handle in a better way.
    """
    context = get_context("spawn")
    processes: list[BaseProcess] = []
    waiting: dict[connection.Connection, BaseProcess] = {}
    with tempfile.TemporaryDirectory(prefix="xded-") as folder, _stop_requests_passed_on(processes):
        try:
            for number in range(count):
                receiving, sending = context.Pipe(duplex=False)
                arguments = (work, number, Path(folder), sending)
                processes.append(context.Process(target=_work, args=arguments, name=f"process {number} of {count}"))
                processes[-1].start()
                sending.close()
                waiting[receiving] = processes[-1]
            _wait(waiting)
        finally:
            for process in _started(processes):
                process.kill()
                process.join()


def _work(work: Work, number: int, folder: Path, sending: connection.Connection) -> None:
    """What a spawned process does: works, and says how that ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # reaches every process of a terminal: the one that waits passes it on
    threading.Thread(target=end_with_parent, daemon=True).start()
    try:
        work(number, folder)
    except (XdedError, OSError) as error:
        sending.send(error)
    except BaseException:  # of any type, which may not survive the journey: its text does
        sending.send(RuntimeError(f"In process {number}:\n{traceback.format_exc()}"))
    else:
        sending.send(None)
        return
    sys.stderr.flush()
    os._exit(1)  # at once: the connections to the others would wait for them, and they are waiting for this process


def _wait(waiting: dict[connection.Connection, BaseProcess]) -> None:
    errors: list[BaseException] = []
    deadline = None
    while waiting:
        ready = connection.wait(list(waiting), None if deadline is None else max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        ended = [(channel, waiting.pop(channel)) for channel in list(waiting) if channel in ready]
        for channel, process in sorted(ended, key=lambda pair: pair[1].is_alive()):  # the dead failed before the others
            error = _last_words(channel, process)
            errors += [] if error is None else [error]
        if errors and deadline is None:
            deadline = time.monotonic() + GRACE_S
    if errors:
        raise errors[0]


def _last_words(channel: connection.Connection, process: BaseProcess) -> BaseException | None:
    try:
        error: BaseException | None = channel.recv()
        return error
    except EOFError:
        process.join()
    code = process.exitcode or 0
    if code == -signal.SIGTERM:
        return KeyboardInterrupt()
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return TrainingError(
        f"{process.name.capitalize()} was {how}; often the memory was not enough for all of them.",
        f"Use fewer --devices or a smaller --batch-size. {GO_ON}",
    )


def _started(processes: list[BaseProcess]) -> list[BaseProcess]:
    return [process for process in processes if process.pid is not None]


@contextmanager
def _stop_requests_passed_on(processes: list[BaseProcess]) -> Iterator[None]:
    """While it is open, Ctrl-C and SIGTERM go to the processes as a SIGTERM (in the main thread only)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def pass_on(number: int, frame: object) -> None:
        for process in _started(processes):
            process.terminate()

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
