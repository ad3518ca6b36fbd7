"""A study's folder: one writer at a time, and a state that others can read while it runs. Imports no torch."""

from __future__ import annotations

import json
import os
import platform
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from xded.errors import XdedError
from xded.study.plan import StudyError
from xded.training.status import is_alive, write_atomically

STATE = "state.json"
STUDY = "study.yaml"
LOCK = "lock.json"
FORMAT = 1  # raised whenever pieces of an older version can no longer be used
HEARTBEAT_S = 15.0
STALE_S = 120.0  # a lock of another machine without a heartbeat for so long is dead
_ME = uuid.uuid4().hex  # this process: in a container the next one may get the same number


class BusyError(XdedError):
    """Another process works on the study."""


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Keeps other processes off a study's folder; the lock's time of change is the heartbeat.

    Raises:
        BusyError: one is at work.
    """
    out.mkdir(parents=True, exist_ok=True)
    path, over = out / LOCK, threading.Event()
    _take(path)
    heart = threading.Thread(target=_beat, args=(path, over), daemon=True)
    heart.start()
    try:
        yield
    finally:
        over.set()
        heart.join()
        if owner_of(path).get("process") == _ME:
            path.unlink(missing_ok=True)


def _take(path: Path) -> None:
    while True:
        try:
            handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            owner = owner_of(path)
            if alive(owner, path):
                who = f"process {owner['pid']} on {owner['host']}" if owner else "another process"
                raise BusyError(
                    f"{path.parent} is being worked on by {who}.",
                    f"Watch it with 'xded status {path.parent} --watch', or choose another --out.",
                ) from None
            _put_aside(path, owner)
            continue
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump({"pid": os.getpid(), "host": platform.node(), "process": _ME}, file)
        return


def _put_aside(path: Path, dead: dict[str, Any]) -> None:
    """Takes a dead lock away; one that another process has put there in the meantime is put back."""
    aside = path.with_name(f"{path.name}.{_ME}")
    with suppress(FileNotFoundError):
        path.rename(aside)
        if owner_of(aside) == dead:
            aside.unlink()
        else:
            aside.rename(path)


def _beat(path: Path, over: threading.Event) -> None:
    while not over.wait(HEARTBEAT_S):
        with suppress(OSError):
            os.utime(path)


def owner_of(path: Path) -> dict[str, Any]:
    """Process and machine that hold a lock; empty when there is none, or it cannot be read."""
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}


def alive(owner: dict[str, Any], path: Path) -> bool:
    """Whether the holder of a lock still lives."""
    if owner.get("host") == platform.node():
        if owner.get("pid") == os.getpid():
            return owner.get("process") == _ME
        return is_alive(owner.get("pid"))
    try:
        return time.time() - path.stat().st_mtime < STALE_S
    except OSError:
        return False


def read_state(out: Path) -> dict[str, Any]:
    """OUT/state.json; a study that says `running` while nobody holds its lock is `killed`.

    Raises:
        StudyError: the folder holds no study that has begun, or its state cannot be read.
    """
    path, lock = out / STATE, out / LOCK
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise StudyError(
            f"{out} holds no study that has begun (no {STATE}).", "Give the folder of 'xded study run --out'."
        ) from error
    except (OSError, ValueError) as error:
        raise StudyError(f"{path} cannot be read: {error}.", f"Write it anew: xded study run {out / STUDY}.") from error
    if not isinstance(state, dict) or not isinstance(state.get("pieces"), list):
        raise StudyError(f"{path} is no state of a study.", f"Write it anew: xded study run {out / STUDY}.")
    if state.get("state") == "running" and not (lock.is_file() and alive(owner_of(lock), lock)):
        state["state"] = "killed"
    return state


def require_format(out: Path) -> None:
    """Raises when the study in a folder was made by a version whose pieces mean something else.

    Raises:
        StudyError: so it was.
    """
    try:
        state = json.loads((out / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # it has not begun, or its state will be written anew
    found = state.get("format") if isinstance(state, dict) else None
    if found != FORMAT:
        raise StudyError(
            f"{out} was made by another version of xded (format {found}; this one writes format {FORMAT}).",
            "Go on with that version, or choose another --out: nothing there was changed.",
        )


def write_state(out: Path, state: dict[str, Any]) -> None:
    """OUT/state.json."""
    write_atomically(out / STATE, json.dumps({"format": FORMAT, **state}, indent=1))
