"""A run folder is read as far as it goes, whatever state it is in."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

import pytest

from xded import config as configs
from xded.config import Config
from xded.doctor.run_folder import looks_like_run, read_run

ROWS = [{"event": "step", "update": 1, "lr": 1e-3}, {"event": "epoch", "epoch": 1, "wra": 0.5}]


def write_run(folder: Path, state: str = "finished", **status: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(configs.to_yaml(Config()), encoding="utf-8")
    (folder / "status.json").write_text(json.dumps({"state": state, "update": 10, **status}), encoding="utf-8")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    for name in ("best.pt", "latest.pt"):
        (folder / name).write_bytes(b"weights")
    return folder


def test_a_whole_run(tmp_path: Path) -> None:
    write_run(tmp_path)
    (tmp_path / "data.json").write_text('{"train": {}}', encoding="utf-8")
    (tmp_path / "scores.json").write_text('{"conditions": {}}', encoding="utf-8")
    (tmp_path / "predictions.jsonl").write_text("", encoding="utf-8")
    run = read_run(tmp_path)
    assert run.problems == []
    assert run.config == Config()
    assert run.state == "finished"
    assert run.rows == ROWS
    assert (run.data, run.scores) == ({"train": {}}, {"conditions": {}})
    assert run.predictions == tmp_path / "predictions.jsonl"
    assert list(run.checkpoints) == ["best.pt", "latest.pt"]
    assert looks_like_run(tmp_path)


def test_half_a_run(tmp_path: Path) -> None:
    (tmp_path / "best.pt").write_bytes(b"")
    run = read_run(tmp_path)
    assert looks_like_run(tmp_path)
    assert run.problems == ["config.yaml is missing", "status.json is missing", "metrics.jsonl is missing"]
    assert (run.config, run.status, run.rows, run.state) == (None, None, [], "unknown")


def test_a_run_in_progress_may_be_in_the_middle_of_a_line(tmp_path: Path) -> None:
    write_run(tmp_path, "running", pid=os.getpid(), host=platform.node())
    with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"event": "step", "upd')
    run = read_run(tmp_path)
    assert (run.state, run.rows, run.problems) == ("running", ROWS, [])


def test_a_killed_run_is_recognised_and_its_half_line_is_named(tmp_path: Path) -> None:
    write_run(tmp_path, "running", pid=2**22 + 1, host=platform.node())  # above the largest process id of Linux
    with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"event": "step", "upd')
    run = read_run(tmp_path)
    assert run.state == "killed"
    assert run.problems == ["metrics.jsonl: 1 of 3 lines cannot be read (3)"]


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("config.yaml", b"train: [", "is not valid YAML"),
        ("config.yaml", b"trian: {}", "did you mean 'train'?"),
        ("config.yaml", b"\xff\xfe\x00", "cannot be read"),
        ("status.json", b'{"state": "fin', "status.json cannot be read"),
        ("status.json", b"[1, 2]", "status.json holds a list, not a table"),
        ("status.json", b"\xff\xfe", "status.json cannot be read"),
        ("status.json", b"[" * 100_000, "status.json cannot be read"),
        ("data.json", b"", "data.json cannot be read"),
        ("scores.json", b"7", "scores.json holds a int, not a table"),
        (
            "metrics.jsonl",
            b'{"event": 3}\n[]\n\x00\n{"event": "step"}\n',
            "metrics.jsonl: 3 of 4 lines cannot be read (1, 2, 3)",
        ),
    ],
)
def test_a_damaged_file_is_named_and_the_rest_is_read(tmp_path: Path, name: str, content: bytes, problem: str) -> None:
    write_run(tmp_path)
    (tmp_path / name).write_bytes(content)
    run = read_run(tmp_path)
    assert len(run.problems) == 1
    assert problem in run.problems[0]
    assert run.checkpoints
    assert run.rows == ([{"event": "step"}] if name == "metrics.jsonl" else ROWS)


@pytest.mark.parametrize("pid", ["many", [1], 2**80, None])
def test_a_process_id_that_is_none(tmp_path: Path, pid: object) -> None:
    write_run(tmp_path, "running", pid=pid, host=platform.node())
    assert read_run(tmp_path).state in ("running", "killed")


def test_a_checkpoint_alone(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(b"")
    run = read_run(path)
    assert looks_like_run(path)
    assert (run.path, run.checkpoints, run.problems, run.config) == (path, {"model.pt": path}, [], None)


def test_other_files_and_folders_are_no_runs(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("{}", encoding="utf-8")
    (tmp_path / "F02_ctc_logits.pt").write_bytes(b"")
    assert not looks_like_run(tmp_path)
    assert not looks_like_run(tmp_path / "config.yaml")
    assert not looks_like_run(tmp_path / "absent")
