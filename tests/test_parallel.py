"""Work in other processes: order, threads, errors."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from xded.errors import LeakageError, TrainingError
from xded.parallel import default_jobs, run_all


def described(number: int) -> tuple[int, int]:
    import torch

    return number, torch.get_num_threads()


def refuse_odd(path: Path) -> None:
    if int(path.name) % 2:
        raise LeakageError(f"{path.name} is odd.", "Give an even one.")
    path.write_text("done")


def die(path: Path) -> None:
    os._exit(9)


def test_one_job_stays_in_this_process() -> None:
    seen: list[int] = []
    run_all(seen.append, [3, 1, 2], jobs=1)
    assert seen == [3, 1, 2]
    assert run_all(abs, [], jobs=4) == []
    assert default_jobs() >= 1


@pytest.mark.slow
def test_other_processes_hand_errors_back_whole_keep_order_and_use_one_thread(tmp_path: Path) -> None:
    with pytest.raises(LeakageError, match=r"1 is odd\. Give an even one\.") as error:
        run_all(refuse_odd, [tmp_path / "0", tmp_path / "1"], jobs=2)
    assert error.value.remedy == "Give an even one."
    assert (tmp_path / "0").read_text() == "done"  # finished pieces are not lost
    assert run_all(described, [3, 1, 2], jobs=2) == [(3, 1), (1, 1), (2, 1)]  # an error does not end what follows
    with pytest.raises(TrainingError, match="worker processes was killed"):
        run_all(die, [tmp_path, tmp_path], jobs=2)


@pytest.mark.slow
def test_workers_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    script = tmp_path / "sleepers.py"
    script.write_text(
        "import sys, time\nfrom pathlib import Path\nfrom xded.parallel import run_all\n"
        "def sleep(path):\n    Path(path).touch()\n    time.sleep(600)\n"
        "if __name__ == '__main__':\n    run_all(sleep, sys.argv[1:], 2)\n"
    )
    begun = [tmp_path / "a", tmp_path / "b"]
    process = subprocess.Popen([sys.executable, script, *begun], stdout=subprocess.PIPE)
    while not all(path.exists() for path in begun):
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.communicate(timeout=60)  # the pipe closes when the last process that holds it has ended
