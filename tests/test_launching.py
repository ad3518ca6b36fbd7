"""Processes that work together: none waits for one that has ended, requests to stop reach them. Imports no torch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from xded.errors import LeakageError, TrainingError
from xded.training import launching
from xded.training.launching import launch


def write(out: Path, rank: int, folder: Path) -> None:
    (folder / str(rank)).touch()
    while len(list(folder.iterdir())) < 3:  # all of them are there
        time.sleep(0.01)
    (out / str(rank)).write_text(str(folder))


def end(how: str, rank: int, folder: Path) -> None:
    """The second process ends in some way while the first one waits."""
    if rank == 0:
        time.sleep(600)
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "terminated":
        os.kill(os.getpid(), signal.SIGTERM)
    if how == "left":
        os._exit(7)
    raise LeakageError("t1 was heard.", "Hold t1 out.") if how == "refused" else ValueError("a bug")


def test_all_work_at_once_and_their_folder_goes(tmp_path: Path) -> None:
    launch(partial(write, tmp_path), 3)
    folders = {path.read_text() for path in tmp_path.iterdir()}
    assert len(list(tmp_path.iterdir())) == 3
    assert len(folders) == 1
    assert not Path(folders.pop()).exists()


@pytest.mark.parametrize(
    ("how", "kind", "said"),
    [
        ("killed", TrainingError, r"Process 1 of 2 was killed by SIGKILL; .* fewer --devices"),
        ("left", TrainingError, r"Process 1 of 2 was ended with exit code 7"),
        ("terminated", KeyboardInterrupt, "^$"),
        ("refused", LeakageError, r"t1 was heard\. Hold t1 out\."),
        ("raises", RuntimeError, r"(?s)In process 1:.*ValueError: a bug"),
    ],
)
def test_no_process_waits_for_one_that_has_ended(
    monkeypatch: pytest.MonkeyPatch, how: str, kind: type[BaseException], said: str
) -> None:
    monkeypatch.setattr(launching, "GRACE_S", 0.1)
    with pytest.raises(kind, match=said):
        launch(partial(end, how), 2)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_what_cannot_be_sent_to_a_process_ends_the_others() -> None:
    with pytest.raises(AttributeError, match="local object"):
        launch(lambda rank, folder: None, 2)


STOP = """
import signal, sys, time
from functools import partial
from pathlib import Path
from xded.training.launching import launch
def work(out, rank, folder):
    def handle(number, frame):
        (out / f"{rank} got {signal.Signals(number).name}").touch()
        sys.exit(0)
    signal.signal(signal.SIGTERM, handle)
    (out / f"{rank} is there").touch()
    time.sleep(600)
if __name__ == "__main__":
    launch(partial(work, Path(sys.argv[1])), 2)
"""


@pytest.mark.parametrize(("group", "number"), [(True, signal.SIGINT), (False, signal.SIGTERM), (False, signal.SIGKILL)])
def test_a_request_to_stop_reaches_every_process_once(tmp_path: Path, group: bool, number: signal.Signals) -> None:
    """Ctrl-C, which a terminal gives to all of them; a SIGTERM to the first; and its end without a word."""
    script, out = tmp_path / "script.py", tmp_path / "out"
    script.write_text(STOP)
    out.mkdir()
    process = subprocess.Popen([sys.executable, script, out], start_new_session=True, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while len(list(out.iterdir())) < 2:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    (os.killpg if group else os.kill)(process.pid, number)
    process.communicate(timeout=60)  # the pipe closes when the last of them has ended
    got = sorted(path.name for path in out.iterdir() if "got" in path.name)
    assert got == ([] if number == signal.SIGKILL else ["0 got SIGTERM", "1 got SIGTERM"])
