"""TensorBoard, MLflow and W&B get what metrics.jsonl gets, on this machine, and cannot end a run."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import TensorBoardLogger

from tiny_corpus import job_for, write_corpus
from xded.config import build
from xded.corpus.manifest import Corpus
from xded.errors import ConfigError
from xded.training import loggers, status
from xded.training.loggers import mirror_of, numbers
from xded.training.run import fit

HELD_OUT = {"held_out": ["t2"], "controls": False}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = dict(os.environ)
    for variable in ("MLFLOW_TRACKING_URI", "WANDB_MODE"):
        monkeypatch.delenv(variable, raising=False)
    yield
    os.environ.clear()
    os.environ.update(before)


def rows_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def records(path: Path) -> Iterator[bytes]:
    """TFRecords: length, its checksum, the bytes, their checksum."""
    data, place = path.read_bytes(), 0
    while place < len(data):
        (length,) = struct.unpack_from("<Q", data, place)
        yield data[place + 12 : place + 12 + length]
        place += 16 + length


def events(folder: Path) -> list[Any]:
    """What the event files of a folder hold, in order."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    return [
        event_pb2.Event.FromString(record)
        for path in sorted(folder.glob("events.out.tfevents.*"), key=lambda path: path.suffix)
        for record in records(path)
    ]


def test_tensorboard_files_hold_the_numbers_of_metrics_jsonl(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(status, "METRICS_EVERY_UPDATES", 1)
    run = fit(job_for(corpus, tmp_path / "run", fold=HELD_OUT, train={"loggers": ["tensorboard"]})).parent
    logged = {
        (value.tag, event.step): value.simple_value
        for event in events(run / "tensorboard")
        for value in event.summary.value
    }
    expected = {
        (name, row["update"]): pytest.approx(value)
        for row in rows_of(run)
        for name, value in numbers({k: v for k, v in row.items() if k != "event"}, f"{row['event']}/").items()
    }
    assert logged == expected
    names = {name for name, _ in logged}
    assert {"step/loss", "step/ctc", "step/lr", "step/gradient_norm", "gradients/norms/ctc_head"} <= names
    assert {"epoch/wra", "epoch/val_loss", "epoch/distinct", "epoch/empty"} <= names


def test_a_run_that_goes_on_hides_what_was_logged_after_its_checkpoint(tmp_path: Path) -> None:
    config = build({"train": {"loggers": ["tensorboard"]}}, "the test")
    for first_update in (0, 7):
        mirror = mirror_of(config, "student", tmp_path, first_update)
        assert mirror is not None
        assert mirror.row("step", {"update": first_update + 1, "loss": 1.0}) == []
        assert mirror.close("stopped") == []
    starts = [event.step for event in events(tmp_path / "tensorboard") if event.HasField("session_log")]
    assert starts == [1, 8]


def test_without_loggers_nothing_is_opened(tmp_path: Path) -> None:
    assert mirror_of(build({}, "the test"), "student", tmp_path, 0) is None


def test_a_missing_package_is_said_before_anything_is_written(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loggers, "find_spec", lambda name: None)
    job = job_for(corpus, tmp_path / "run", fold=HELD_OUT, train={"loggers": ["mlflow"]})
    with pytest.raises(ConfigError, match=r"asks for mlflow, which is not installed.*'pip install mlflow'"):
        fit(job)
    assert not job.out.exists()


def test_an_unknown_logger_is_a_wrong_config() -> None:
    with pytest.raises(ConfigError, match=r"train.loggers.0.*tensorboard.*given: 'tensorbord'"):
        build({"train": {"loggers": ["tensorbord"]}}, "the test")


def test_loggers_may_change_while_a_run_goes_on(corpus: Corpus, tmp_path: Path) -> None:
    first = job_for(corpus, tmp_path / "run", fold=HELD_OUT)
    best = fit(first, quiet=True)
    assert fit(job_for(corpus, first.out, fold=HELD_OUT, train={"loggers": ["tensorboard"]}), resume=True) == best


def test_a_logger_that_fails_is_said_once_and_the_run_goes_on(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: TensorBoardLogger, metrics: Any, step: int | None = None) -> None:
        raise ConnectionError("server gone")

    monkeypatch.setattr(TensorBoardLogger, "log_metrics", refuse)
    run = fit(job_for(corpus, tmp_path / "run", fold=HELD_OUT, train={"loggers": ["tensorboard"]})).parent
    log = (run / "train.log").read_text(encoding="utf-8")
    assert log.count("logger tensorboard has failed and gets no more rows: ConnectionError: server gone") == 1
    assert status.read_status(run)["state"] == "finished"
    assert {row["event"] for row in rows_of(run)} >= {"start", "step", "epoch"}


def test_a_logger_that_cannot_be_started_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError("no")

    monkeypatch.setattr(loggers, "TensorBoardLogger", refuse)
    with pytest.raises(ConfigError, match=r"Logger tensorboard cannot be started: PermissionError: no"):
        mirror_of(build({"train": {"loggers": ["tensorboard"]}}, "the test"), "student", tmp_path, 0)


class Recorded:
    """In place of Lightning's MLflow and W&B loggers, whose packages need not be there."""

    made: list[dict[str, Any]] = []  # noqa: RUF012

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        self.made.append(settings)
        self.run_id = settings.get("run_id") or f"id{len(self.made)}"
        self.experiment = self
        self.id = settings.get("id") or f"id{len(self.made)}"
        os.environ["MLFLOW_TRACKING_URI"] = "file:elsewhere"  # as MLflow itself does

    def log_hyperparams(self, values: Any) -> None:
        assert values["seed"] == 0

    def finalize(self, state: str) -> None:
        pass

    def finish(self, code: int) -> None:
        Recorded.made.append({"finished with": code})


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    monkeypatch.setattr(loggers, "find_spec", lambda name: True)
    monkeypatch.setattr(loggers, "MLFlowLogger", Recorded)
    monkeypatch.setattr(loggers, "WandbLogger", Recorded)
    monkeypatch.setattr(Recorded, "made", [])
    return Recorded.made


def test_mlflow_writes_files_into_the_run_folder_and_goes_on_in_its_run(
    tmp_path: Path, recorded: list[dict[str, Any]]
) -> None:
    config = build({"train": {"loggers": ["mlflow"]}}, "the test")
    for _ in range(2):
        mirror_of(config, "student", tmp_path, 0)
    assert [made["tracking_uri"] for made in recorded] == [f"file:{tmp_path / 'mlruns'}"] * 2
    assert [made["run_id"] for made in recorded] == [None, "id1"]
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"


def test_mlflow_writes_to_a_server_only_when_asked(
    tmp_path: Path, recorded: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://localhost:5000")
    mirror_of(build({"train": {"loggers": ["mlflow"]}}, "the test"), "student", tmp_path, 0)
    assert recorded[0]["tracking_uri"] == "http://localhost:5000"


@pytest.mark.parametrize(("mode", "offline"), [(None, True), ("dryrun", True), ("online", False)])
def test_wandb_stays_offline_unless_asked(
    mode: str | None, offline: bool, tmp_path: Path, recorded: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    if mode is not None:
        monkeypatch.setenv("WANDB_MODE", mode)
    mirror = mirror_of(build({"train": {"loggers": ["wandb"]}}, "the test"), "student", tmp_path, 0)
    assert (recorded[0]["offline"], recorded[0]["save_dir"]) == (offline, tmp_path)
    assert os.environ["WANDB_ERROR_REPORTING"] == "false"
    assert mirror is not None
    assert mirror.close("stopped") == []
    assert recorded[-1] == {"finished with": 1}, "the process's next run would be logged as part of this one"


def test_only_numbers_are_logged() -> None:
    row = {"update": 3, "updates": 9, "loss": 1, "resumed": True, "moved": ["a"], "norms": {"encoder.0": 0.5}}
    assert numbers(row, "x/") == {"x/loss": 1.0, "x/norms/encoder.0": 0.5}
