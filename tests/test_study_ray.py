"""A study on a Ray cluster of this machine: the same table as without, workers that are killed, clusters that are gone.

Left out where the extra `ray` is not installed.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from cli_calls import call, done, refused
from test_study_engine import begun, fails, piece, states, times
from test_study_run import FOUR, tables, written
from tiny_corpus import write_corpus
from tiny_study import tiny_study
from xded.study.engine import run
from xded.study.ray_workers import ClusterError, RayWorkers

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="the extra 'ray' is not installed"),
]


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> Iterator[RayWorkers]:
    # Ray's processes have to find the functions of this module
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ["PYTHONPATH"]]))
    workers = RayWorkers(slots=2, memory_gb=0.2)
    yield workers
    workers.close()


def is_killed(deaths: int, folder: Path) -> None:
    if begun(folder) <= deaths:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.5)


def test_a_killed_worker_costs_its_own_piece_a_start_and_errors_come_whole(tmp_path: Path, workers: RayWorkers) -> None:
    steps = [
        piece(tmp_path, "killed once", partial(is_killed, 1)),
        piece(tmp_path, "neighbour", partial(is_killed, 0)),
        piece(tmp_path, "error", fails),
        piece(tmp_path, "after", needs=("killed once",)),
    ]
    progress = run(steps, workers)
    assert states(steps, progress) == {"killed once": "done", "neighbour": "done", "error": "failed", "after": "done"}
    assert [times(step) for step in steps] == [2, 1, 1, 1]
    assert progress.errors["key of error"] == "t1 was heard. Hold it out."


def test_the_table_is_that_of_the_local_engine(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", controls=("c1", "c2"), targets=("t1", "t2", "t3"))
    path = written(tiny_study(corpus, FOUR, held_out=["t1"], baselines=True), tmp_path / "s.yaml")
    done("study", "run", path, "--out", tmp_path / "local", "--jobs", 1)
    done("study", "run", path, "--out", tmp_path / "ray", "--engine", "ray", "--jobs", 2, "--memory-gb", 0.2)
    assert tables(tmp_path / "ray") == tables(tmp_path / "local") != {}


def test_a_cluster_that_is_gone_or_too_small_is_said_before_any_training(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", targets=("t1", "t2"))
    path = written(tiny_study(corpus, {"a": {}}), tmp_path / "s.yaml")
    with pytest.raises(ClusterError, match=r"No machine of the cluster has 1e\+06 GB of memory .*--memory-gb"):
        RayWorkers(slots=1, memory_gb=1e6)
    with pytest.raises(ClusterError, match=r"No machine of the cluster has 64 GPUs .*--gpus"):
        RayWorkers(slots=1, gpus=64, memory_gb=0.1)
    command = ("study", "run", path, "--out", tmp_path / "out", "--engine", "ray")
    called = call(*command, "--address", "127.0.0.1:1")
    refused(called, 1, "No Ray cluster answers at 127.0.0.1:1", "ray start --head", "what is finished is kept")
    assert not (tmp_path / "out").exists()
