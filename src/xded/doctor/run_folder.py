"""A run folder as far as it can be read: half written, in progress or damaged, it never raises. Imports no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xded import config as configs
from xded.config import Config
from xded.errors import XdedError
from xded.training.status import read_status

CHECKPOINT_SUFFIX = ".pt"
# any of them makes a folder a run; other folders hold a config.yaml too
TELLING = ("status.json", "metrics.jsonl", "best.pt", "latest.pt", "latest.previous.pt")


@dataclass
class RunFolder:
    """What could be read of one run.

    Attributes:
        path: the folder, or the file where a single checkpoint was given.
        config: of config.yaml; status: of status.json, with the state as it is now; rows: of metrics.jsonl.
        data: the data card; checkpoints: file name -> path; scores: of scores.json.
        predictions: predictions.jsonl, when it is there.
        problems: what could not be read, and why.
    """

    path: Path
    config: Config | None = None
    status: dict[str, Any] | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    data: dict[str, Any] | None = None
    checkpoints: dict[str, Path] = field(default_factory=dict)
    scores: dict[str, Any] | None = None
    predictions: Path | None = None
    problems: list[str] = field(default_factory=list)

    @property
    def state(self) -> str:
        """`running`, `finished`, `stopped`, `failed`, `killed`, or `unknown`."""
        return str((self.status or {}).get("state", "unknown"))


def looks_like_run(path: Path) -> bool:
    """Whether a folder is (half) a run folder, or a file a checkpoint, by names alone."""
    if path.is_dir():
        return any((path / name).exists() for name in TELLING)
    return path.is_file() and path.suffix == CHECKPOINT_SUFFIX


def read_run(path: Path) -> RunFolder:
    """Everything of a run that can be read; what cannot is in `problems`."""
    run = RunFolder(path)
    if path.is_file():
        run.checkpoints = {path.name: path}
        return run
    run.checkpoints = {file.name: file for file in sorted(path.glob(f"*{CHECKPOINT_SUFFIX}")) if file.is_file()}
    _read_config(run)
    run.status = _read_json(run, "status.json", needed=True)
    if run.status is not None and "state" in run.status:
        _look_whether_alive(run)
    run.data = _read_json(run, "data.json")
    run.scores = _read_json(run, "scores.json")
    _read_rows(run)
    if (path / "predictions.jsonl").is_file():
        run.predictions = path / "predictions.jsonl"
    return run


def _read_config(run: RunFolder) -> None:
    path = run.path / "config.yaml"
    if not path.is_file():
        run.problems.append("config.yaml is missing")
        return
    try:
        run.config = configs.load(path)
    except XdedError as error:
        run.problems.append(error.problem)


def _read_json(run: RunFolder, name: str, *, needed: bool = False) -> dict[str, Any] | None:
    path = run.path / name
    if not path.is_file():
        if needed:
            run.problems.append(f"{name} is missing")
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # no UTF-8 is a ValueError too
        run.problems.append(f"{name} cannot be read: {error}")
        return None
    if not isinstance(data, dict):
        run.problems.append(f"{name} holds a {type(data).__name__}, not a table")
        return None
    return data


def _look_whether_alive(run: RunFolder) -> None:
    try:
        run.status = read_status(run.path)
    except (XdedError, OSError, ValueError, TypeError, OverflowError) as error:  # a process id that is none
        run.problems.append(f"whether the run is still alive: {error}")


def _read_rows(run: RunFolder) -> None:
    path = run.path / "metrics.jsonl"
    if not path.is_file():
        run.problems.append("metrics.jsonl is missing")
        return
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        run.problems.append(f"metrics.jsonl cannot be read: {error}")
        return
    damaged = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        row = _row(line)
        if row is not None:
            run.rows.append(row)
        elif number < len(lines) or run.state != "running":  # of a run in progress the last line may be half written
            damaged.append(number)
    if damaged:
        shown = ", ".join(map(str, damaged[:5])) + (" ..." if len(damaged) > 5 else "")
        total = len(run.rows) + len(damaged)
        run.problems.append(f"metrics.jsonl: {len(damaged)} of {total} lines cannot be read ({shown})")


def _row(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and isinstance(row.get("event"), str) else None
