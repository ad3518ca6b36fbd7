"""A study's folder: one process at a time, dead ones do not block, and pieces of another version are not touched."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from xded.study import folder
from xded.study.folder import FORMAT, LOCK, STALE_S, STATE, BusyError, locked, read_state, require_format, write_state
from xded.study.plan import StudyError


def leave_lock(out: Path, age_s: float = 0.0, **owner: Any) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    path = out / LOCK
    path.write_text(json.dumps({"pid": os.getpid(), "host": platform.node(), "process": "x", **owner}))
    os.utime(path, (time.time() - age_s,) * 2)
    return path


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_two_processes_cannot_work_on_one_study(tmp_path: Path) -> None:
    with locked(tmp_path / "out"):
        with (
            pytest.raises(BusyError, match=rf"worked on by process {os.getpid()} on .*xded status .* --watch"),
            locked(tmp_path / "out"),
        ):
            pytest.fail("two at once")
        assert (tmp_path / "out" / LOCK).is_file()
    assert not (tmp_path / "out" / LOCK).exists()


@pytest.mark.parametrize(
    ("owner", "age_s", "busy"),
    [
        ({"pid": os.getppid()}, 10 * STALE_S, True),  # here, and alive, however busy
        ({"pid": "dead"}, 0.0, False),
        ({"pid": os.getpid()}, 0.0, False),  # this process's number, but not this process: a container was restarted
        ({"host": "elsewhere"}, STALE_S - 60, True),
        ({"host": "elsewhere"}, STALE_S + 60, False),
    ],
)
def test_a_lock_counts_while_its_holder_lives(tmp_path: Path, owner: dict[str, Any], age_s: float, busy: bool) -> None:
    if owner.get("pid") == "dead":
        owner = {**owner, "pid": dead_process()}
    path = leave_lock(tmp_path, age_s, **owner)
    if busy:
        with pytest.raises(BusyError), locked(tmp_path):
            pass
        assert path.is_file()
    else:
        with locked(tmp_path):
            assert json.loads(path.read_text())["pid"] == os.getpid()
        assert list(tmp_path.iterdir()) == []


def test_a_lock_that_is_being_written_counts(tmp_path: Path) -> None:
    path = tmp_path / LOCK
    path.touch()
    with pytest.raises(BusyError, match="worked on by another process"), locked(tmp_path):
        pass
    os.utime(path, (time.time() - 2 * STALE_S,) * 2)
    with locked(tmp_path):
        pass


def test_the_heart_beats_while_work_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "HEARTBEAT_S", 0.02)
    with locked(tmp_path):
        os.utime(tmp_path / LOCK, (0, 0))
        deadline = time.monotonic() + 10
        while (tmp_path / LOCK).stat().st_mtime < 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert time.time() - (tmp_path / LOCK).stat().st_mtime < 60


def test_a_lock_that_another_one_took_over_is_not_removed(tmp_path: Path) -> None:
    with locked(tmp_path):
        leave_lock(tmp_path, host="elsewhere")
    assert (tmp_path / LOCK).is_file()


def test_of_many_that_find_a_dead_lock_one_at_a_time_gets_in(tmp_path: Path) -> None:
    """Each process holds a file of its own making while it is in; a second one could not make it."""
    script = (
        "import os, sys, time\nfrom pathlib import Path\nfrom xded.study.folder import BusyError, locked\n"
        "out = Path(sys.argv[1])\n"
        "while not (out / 'go').exists(): time.sleep(0.001)\n"
        "for turn in range(40):\n"
        "    try:\n"
        "        with locked(out):\n"
        "            (out / 'inside').mkdir()\n"
        "            time.sleep(0.002)\n"
        "            (out / 'inside').rmdir()\n"
        "            print('in', flush=True)\n"
        "            if turn >= int(sys.argv[2]): os._exit(0)\n"  # with the lock in its hand
        "    except BusyError:\n        time.sleep(0.001)\n"
    )
    dead = dead_process()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, tmp_path, str(turns)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for turns in (5, 10, 20, 30)
    ]
    leave_lock(tmp_path, pid=dead)
    (tmp_path / "go").touch()
    said = [process.communicate(timeout=60) for process in processes]
    assert [error.decode() for _, error in said if error] == []
    assert sum(out.count(b"in") for out, _ in said) >= 1


def test_a_study_of_another_version_is_left_alone(tmp_path: Path) -> None:
    require_format(tmp_path)  # nothing is there
    write_state(tmp_path, {"state": "finished", "pieces": []})
    require_format(tmp_path)
    for other in ({"format": FORMAT + 1}, {}):
        (tmp_path / STATE).write_text(json.dumps({"state": "finished", "pieces": [], **other}))
        with pytest.raises(StudyError, match=rf"another version of xded .*format {FORMAT}\).*choose another --out"):
            require_format(tmp_path)
    (tmp_path / STATE).write_text("{")  # it is written anew
    require_format(tmp_path)


def test_a_state_without_its_process_is_killed(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="holds no study that has begun"):
        read_state(tmp_path)
    write_state(tmp_path, {"state": "running", "pieces": []})
    assert read_state(tmp_path)["state"] == "killed"
    with locked(tmp_path):
        assert read_state(tmp_path)["state"] == "running"
    for text in ("{", "[]", "{}"):
        (tmp_path / STATE).write_text(text)
        with pytest.raises(StudyError, match="xded study run"):
            read_state(tmp_path)
