"""One run on several processes: the same updates as on one, one set of files, one error, nothing that hangs."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny_corpus import MODEL, job_for, tiny_config, write_corpus
from xded.config import TrainConfig, build, to_yaml
from xded.corpus.manifest import read_corpus
from xded.errors import EXIT_INTERRUPTED, ConfigError, CorpusError, TrainingError
from xded.findings import Finding
from xded.models import checkpoints
from xded.models.collective import leave
from xded.training import processes, run, status
from xded.training.data import TrainingData
from xded.training.job import Job
from xded.training.launching import launch
from xded.training.loop import CollapsedRunError, InterruptedRunError, Loop
from xded.training.order import Order, RunSampler
from xded.training.processes import Place, device_of, place_of
from xded.training.run import fit

STAGES = [{"epochs": 3, "peak_lr": 0.05}]
# 14 recordings: in batches of 4 (the last one of 2), of 3 (2 and 1 for two processes), of 13 (nothing is left for the
# second process in the other batch), of 3 in updates of two batches
CASES: dict[str, dict[str, Any]] = {
    "even": {"train": {"stages": STAGES, "batch_size": 4}},
    "odd": {"train": {"stages": STAGES, "batch_size": 3}},
    "one left": {"train": {"stages": STAGES, "batch_size": 13}},
    "accumulate": {"train": {"stages": STAGES, "batch_size": 3, "accumulate": 2}},
    "frozen": {"train": {"stages": [{"epochs": 1, "peak_lr": 0.05, "freeze_encoder": True}, *STAGES]}},
    "layer": {"train": {"stages": STAGES, "freeze_layers": 1}},
    "ctc only": {"train": {"stages": STAGES}, "objective": {"cross_entropy": 0.0}},
    "curriculum": {"train": {"stages": STAGES, "batch_size": 3, "curriculum": {"schedule": "sqrt"}}},
    "layer by layer": {"train": {"stages": [{**STAGES[0], "epochs": 2, "freeze_layers": n} for n in (1, 0)]}},
    "words, ema": {
        "train": {"stages": STAGES, "batch_size": 4, "sampler": "words", "speakers_per_word": 2, "average": "ema"},
    },
}


def job_of(folder: Path, case: str, out: Path, devices: int) -> Job:
    """A run of a case without dropout, which differs between processes."""
    sections = dict(CASES[case])
    init = {"init": folder / "parent"} if case in ("frozen", "layer", "layer by layer", "curriculum") else {}
    sections["train"] = {**sections["train"], **init, "devices": devices, "save_every_steps": 2}
    return job_for(read_corpus(folder / "corpus"), out, model={**MODEL, "dropout": 0.0}, **sections)


def use_plain_descent(set_attribute: Callable[[Any, str, Any], object]) -> None:
    """AdamW makes of a gradient that is all rounding a step like any other; plain descent leaves it small."""

    class Descent(torch.optim.SGD):
        def clip(self, part: int, most: float) -> torch.Tensor:
            return torch.nn.utils.clip_grad_norm_(self.param_groups[part]["params"], most)

    def descent(self: Loop) -> torch.optim.Optimizer:
        return Descent(self.student.parameters(), lr=0.0, momentum=0.9)

    set_attribute(Loop, "configure_optimizers", descent)
    set_attribute(status, "METRICS_EVERY_UPDATES", 1)


def stop_in(number: int) -> Callable[..., torch.Tensor]:
    """A training step of a run that is asked to stop in a batch."""
    step = Loop.training_step

    def training_step(self: Loop, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.number(batch_idx) == number:
            self.stop_requested.set()
        return step(self, batch, batch_idx)

    return training_step


def on_each_of_two(folder: Path, rank: int, shared: Path) -> None:
    """All runs on two processes: starting them takes longer than the runs."""
    use_plain_descent(setattr)

    def train(job: Job, *, resume: bool = False) -> None:
        fit(job, resume=resume, quiet=True, place=Place(rank, 2, rank, shared / job.out.name))

    for case in CASES:
        train(job_of(folder, case, folder / f"{case} 2", 2))
    train(job_of(folder, "odd", folder / "1 then 2", 2), resume=True)
    step = Loop.training_step
    if rank == 1:  # only one of them is asked
        Loop.training_step = stop_in(6)  # type: ignore[method-assign]
    with pytest.raises(InterruptedRunError, match="Stopped on request after update 7"):
        train(job_of(folder, "odd", folder / "2 then 1", 2))
    leave()
    Loop.training_step = step  # type: ignore[method-assign]
    get = TrainingData.__getitem__

    def poisoned(self: TrainingData, item: tuple[int, int]) -> dict:
        row = get(self, item)
        if item == (1, 0) and self.augmentation is not None:
            row["features"] = row["features"] * math.nan
        return row

    TrainingData.__getitem__ = poisoned  # type: ignore[method-assign]
    with pytest.raises(TrainingError, match="the loss is nan") as error:
        train(job_of(folder, "even", folder / "nan", 2))
    (folder / f"nan said by {rank}").write_text(error.value.problem)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus, a parent, and every case on one and on two processes."""
    folder = tmp_path_factory.mktemp("processes")
    write_corpus(folder / "corpus")
    fit(job_of(folder, "even", folder / "parent", 1), quiet=True)
    with pytest.MonkeyPatch.context() as patch:
        use_plain_descent(patch.setattr)
        for case in CASES:
            fit(job_of(folder, case, folder / f"{case} 1", 1), quiet=True)
        with pytest.MonkeyPatch.context() as stop:
            stop.setattr(Loop, "training_step", stop_in(6))
            with pytest.raises(InterruptedRunError):
                fit(job_of(folder, "odd", folder / "1 then 2", 1), quiet=True)
        launch(partial(on_each_of_two, folder), 2)
        fit(job_of(folder, "odd", folder / "2 then 1", 1), resume=True, quiet=True)
    return folder


def rows_of(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["event"] != "start"]


def assert_alike(one: Path, two: Path) -> None:
    """Weights, optimiser state and metrics, but for rounding; and nothing more was written."""
    first, second = checkpoints.load(one / "latest.pt"), checkpoints.load(two / "latest.pt")
    assert first.keys() == second.keys()
    for key in ("batch", "with_gradient", "trainable", "skipped", "tokenizer_fingerprint", "provenance"):
        assert first[key] == second[key], key
    torch.testing.assert_close(second["model_state_dict"], first["model_state_dict"], rtol=1e-4, atol=2e-6)
    if "average" in first:
        weights = [checkpoint["average"]["weights"] for checkpoint in (first, second)]
        torch.testing.assert_close(weights[1], weights[0], rtol=1e-4, atol=2e-6)
    states = [checkpoint["optimizer_states"][0]["state"] for checkpoint in (first, second)]
    torch.testing.assert_close(states[1], states[0], rtol=1e-3, atol=1e-5)
    assert len(rows_of(one)) == len(rows_of(two)) > 0
    for a, b in zip(rows_of(one), rows_of(two), strict=True):
        assert a.keys() == b.keys()
        for key in a.keys() - {"frames", "train_frames"}:  # of padded frames: each process pads its share by itself
            same = pytest.approx(a[key], rel=1e-4, abs=1e-5) if isinstance(a[key], int | float | dict) else a[key]
            assert b[key] == same, (key, a, b)
    assert {path.name for path in one.iterdir()} == {path.name for path in two.iterdir()}
    assert (one / "data.json").read_text() == (two / "data.json").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_processes_learn_what_one_learns(folder: Path, case: str) -> None:
    assert_alike(folder / f"{case} 1", folder / f"{case} 2")
    assert status.read_status(folder / f"{case} 2")["state"] == "finished"


@pytest.mark.slow
def test_the_comparison_above_can_fail(folder: Path) -> None:
    with pytest.raises(AssertionError):
        assert_alike(folder / "odd 1", folder / "even 2")


@pytest.mark.slow
@pytest.mark.parametrize("order", ["1 then 2", "2 then 1"])
def test_a_run_goes_on_with_another_number_of_processes(folder: Path, order: str) -> None:
    """In the run on two, one process was asked to stop: both did, after the same update."""
    starts = [json.loads(line) for line in (folder / order / "metrics.jsonl").read_text().splitlines()]
    assert [row["update"] for row in starts if row["event"] == "start"] == [0, 7]
    first = checkpoints.load(folder / "odd 1" / "latest.pt")
    second = checkpoints.load(folder / order / "latest.pt")
    torch.testing.assert_close(second["model_state_dict"], first["model_state_dict"], rtol=1e-4, atol=2e-6)
    assert len(rows_of(folder / order)) == len(rows_of(folder / "odd 1"))


@pytest.mark.slow
def test_a_loss_that_is_not_finite_in_one_process_names_the_whole_batch(folder: Path) -> None:
    train = job_of(folder, "even", folder / "nan", 1).train
    epoch = Order(tuple(round(1000 * r.duration) for r in train), 4, 0).epoch(1)
    batch = next(batch for batch in epoch if 0 in batch)
    said = {(folder / f"nan said by {rank}").read_text() for rank in (0, 1)}
    assert len(said) == 1
    text = said.pop()
    assert [r.recording for r in train if r.recording in text] == [train[i].recording for i in sorted(batch)]
    assert status.read_status(folder / "nan")["state"] == "failed"
    assert text in (folder / "nan" / "STATUS.md").read_text()


# --- how processes end ---------------------------------------------------------------------------------------


def refuse_in_one(job: Job, rank: int, shared: Path) -> None:
    """The second process finds a file gone in the second epoch, the first one trains on."""
    get = TrainingData.__getitem__

    def getting(self: TrainingData, item: tuple[int, int]) -> dict:
        if item[0] == 1 and rank == 1:
            raise CorpusError("a.wav is gone.", "Put it back.")
        return get(self, item)

    TrainingData.__getitem__ = getting  # type: ignore[method-assign]
    fit(job, quiet=True, place=Place(rank, 2, rank, shared / "meeting"))


@pytest.mark.slow
def test_the_error_of_one_process_ends_all_and_is_in_the_status(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_of(folder, "odd", tmp_path / "run", 2)
    monkeypatch.setattr(run, "launch", lambda work, count: launch(partial(refuse_in_one, job), count))
    with pytest.raises(CorpusError, match=r"a\.wav is gone") as error:
        fit(job, quiet=True)
    assert error.value.remedy == "Put it back."
    now = status.read_status(job.out)
    assert (now["state"], now["message"]) == ("failed", "a.wav is gone. Put it back.")
    assert "a.wav is gone" in (job.out / "STATUS.md").read_text()
    fit(job_of(folder, "odd", tmp_path / "run", 1), resume=True, quiet=True)


@pytest.mark.slow
def test_ctrl_c_on_the_command_line_saves_and_one_process_goes_on(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    sections = job_of(folder, "odd", out, 2).config.model_dump(mode="json")
    sections["train"]["stages"] = [{"epochs": 400, "peak_lr": 1e-3}]
    (tmp_path / "config.yaml").write_text(to_yaml(build(sections, "the test")))
    command = [str(Path(sys.executable).with_name("xded")), "train", "--corpus", str(folder / "corpus"), "--out"]
    command += [str(out), "--config", str(tmp_path / "config.yaml")]
    process = subprocess.Popen([*command, "--devices", "2"], start_new_session=True, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (out / "latest.pt").is_file():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does: all processes of the command get it
    _, said = process.communicate(timeout=60)
    assert process.returncode == EXIT_INTERRUPTED
    assert "xded: Stopped on request after update" in said
    assert said.count("pre-flight pass   leakage") == 1  # one process talks
    now = status.read_status(out)
    assert (now["state"], now["update"]) == ("stopped", checkpoints.load(out / "latest.pt")["batch"] + 1)


@pytest.mark.slow
def test_processes_that_torchrun_has_started_train_one_run(folder: Path, tmp_path: Path) -> None:
    """Two machines with a device each, as torchrun shows them to its processes."""
    config = job_of(folder, "odd", tmp_path, 1).config.model_dump(mode="json")
    config["train"]["nodes"] = 2
    (tmp_path / "config.yaml").write_text(to_yaml(build(config, "the test")))
    command = [str(Path(sys.executable).with_name("xded")), "train", "--corpus", str(folder / "corpus"), "--out"]
    command += [str(tmp_path / "run"), "--config", str(tmp_path / "config.yaml"), "--quiet"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = [
        subprocess.Popen(
            command,
            env={**os.environ, **common, "TORCHELASTIC_RUN_ID": "test", "RANK": rank, "GROUP_RANK": rank},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    said = [process.communicate(timeout=120)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0]
    assert "Test it: xded evaluate" in said[0]
    assert said[1] == ""
    assert status.read_status(tmp_path / "run")["state"] == "finished"
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {"tokenizer.model", "metrics.jsonl", "best.pt"}
    step = next(row for row in rows_of(tmp_path / "run") if row["event"] == "step")
    expected = next(row for row in rows_of(folder / "odd 1") if row["event"] == "step")
    assert step["loss"] == pytest.approx(expected["loss"], rel=1e-5)


def test_a_collapse_travels_from_process_to_process_whole() -> None:
    error = CollapsedRunError(Finding("collapse", "refuse", "run", "It says nothing.", "no use", "Warm up longer."))
    there = ForkingPickler.loads(ForkingPickler.dumps(error))
    assert (str(there), there.finding) == ("Stopped: It says nothing. Warm up longer.", error.finding)


# --- what needs no second process ----------------------------------------------------------------------------


def test_processes_share_every_batch_of_one() -> None:
    count, order = 3, Order(tuple(range(400, 417)), 4, 7)
    whole = list(RunSampler(order, 3, 2))
    shares = [list(RunSampler(order, 3, 2, rank=rank, count=count)) for rank in range(count)]
    for batch, *parts in zip(whole, *shares, strict=True):
        kept = [part for rank, part in enumerate(parts) if rank < len(batch)]
        assert sorted(item for part in kept for item in part) == sorted(batch)
        assert all(part == batch[:1] for part in parts[len(kept) :])  # nothing is left: a stand-in
    assert min(len(batch) for batch in whole) == 1


def test_more_devices_than_recordings_in_a_batch_are_refused() -> None:
    with pytest.raises(ConfigError, match="a batch of 2 cannot be shared by 4 devices"):
        tiny_config(train={"batch_size": 2, "devices": 2, "nodes": 2})


def test_several_machines_need_something_that_starts_them(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"train\.nodes is 2, but nothing.*torchrun --nnodes"):
        place_of(TrainConfig(nodes=2))
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert place_of(TrainConfig(devices=2, nodes=2)) == Place(3, 4, 1)
    with pytest.raises(ConfigError, match=r"4 processes were started, but train.devices 1 times train.nodes 1 is 1"):
        place_of(TrainConfig())  # all four would write the same files


def test_srun_starts_the_processes_of_a_run_or_many_runs_of_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    slurm = {"NTASKS": "2", "NTASKS_PER_NODE": "2", "PROCID": "1", "LOCALID": "1", "NODEID": "0", "JOB_NAME": "x"}
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert place_of(TrainConfig(devices=2)) == Place(1, 2, 1)
    assert place_of(TrainConfig()) == Place()


def test_a_device_for_each_process(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device_of(TrainConfig(devices=2, device="cpu"), Place(1, 2, 1)) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda number: None)
    assert device_of(TrainConfig(devices=2), Place(1, 2, 1)) == torch.device("cuda", 1)
    with pytest.raises(ConfigError, match="This machine has 2 GPUs, not 3"):
        device_of(TrainConfig(devices=3), Place(1, 3, 1))
    monkeypatch.setattr(processes, "pick_device", torch.device)
    with pytest.raises(ConfigError, match=r"device 'cuda:1' is one device, and train\.devices is 2"):
        device_of(TrainConfig(devices=2, device="cuda:1"), Place(1, 2, 1))
