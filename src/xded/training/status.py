"""What a run is doing, for people: `metrics.jsonl`, `status.json`, `STATUS.md`, log lines. Imports no torch."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Protocol

from xded.config import LOSS_PARTS
from xded.errors import GO_ON, XdedError

STATUS_EVERY_S = 5.0
LINE_EVERY_S = 30.0
METRICS_EVERY_UPDATES = 10


class StatusError(XdedError):
    """The folder holds no run."""


def is_logged(update: int) -> bool:
    """Whether an update gets a row in metrics.jsonl."""
    return update == 1 or update % METRICS_EVERY_UPDATES == 0


def write_atomically(path: Path, text: str) -> None:
    """Replaces a small text file so that a reader never sees half of it."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def read_status(run: Path) -> dict[str, Any]:
    """The status of a run folder, with what can only be known now (checkpoints, whether it is still alive).

    Raises:
        StatusError: no run is there, or its status cannot be read.
    """
    path = run / "status.json"
    if not path.is_file():
        raise StatusError(f"{run} holds no run (no status.json).", "Give the folder that was named with --out.")
    try:
        status: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        status["state"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StatusError(f"{path} cannot be read: {error!r}.", "Delete it, then go on with --resume.") from error
    status["checkpoints"] = [
        {"name": file.name, "bytes": file.stat().st_size, "whole": file.with_name(file.name + ".sha256").is_file()}
        for file in sorted(run.glob("*.pt"))
    ]
    here = status.get("host") == platform.node()  # elsewhere a process cannot be looked up
    if status["state"] == "running" and here and not is_alive(status.get("pid")):
        status["state"] = "killed"
        status["next"] = GO_ON
    return status


def is_alive(pid: int | None) -> bool:
    """Whether a process of this machine is there."""
    if not pid:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    return str(timedelta(seconds=round(seconds)))


def progress_line(row: dict[str, Any], speed: float, left_s: float) -> str:
    """One line of progress: epoch, share, loss and its parts, frames used, learning rate, speed, time left."""
    parts = " ".join(f"{name} {row[name]:.3f}" for name in LOSS_PARTS if name in row)
    share = 100.0 * row["update"] / row["updates"]
    return (
        f"epoch {row['epoch']}/{row['epochs']} {share:5.1f}% loss {row['loss']:.3f} ({parts}) "
        f"valid frames {row['frames']:.2f} lr {row['lr']:.2e} {speed:.1f} steps/s left {clock(left_s)}"
    )


def epoch_line(row: dict[str, Any]) -> str:
    """One line at the end of an epoch."""
    line = f"epoch {row['epoch']} done: train loss {row['train_loss']:.3f}"
    if "wra" in row:
        line += (
            f", validation loss {row['val_loss']:.3f}, WRA {100 * row['wra']:.1f} % "
            f"({row['distinct']:.0f} distinct outputs, {100 * row['empty']:.0f} % empty)"
        )
    return line


def render(status: dict[str, Any]) -> str:
    """A status as Markdown: the text of STATUS.md and of `xded status`."""
    lines = [f"# {status['name']}: {status['state']}", ""]
    for title in ("message", "next", "data", "held_out", "teachers", "targets", "curriculum", "init", "tokenizer"):
        if status.get(title):
            lines.append(f"- {title.replace('_', ' ')}: {status[title]}")
    counts = status.get("parameters", {})
    if counts:
        lines.append(
            f"- parameters: {counts['total']:,} total, {counts['frozen']:,} frozen, {counts['trainable']:,} trainable, "
            f"{counts['with_gradient']:,} really received a gradient"
        )
    for number, stage in enumerate(status.get("stages", []), start=1):
        frozen = ", encoder frozen" if stage["freeze_encoder"] else ""
        lines.append(f"- stage {number}: {stage['epochs']} epochs, peak learning rate {stage['peak_lr']:g}{frozen}")
    if status.get("progress"):
        lines.append(f"- progress: {status['progress']}")
    if status.get("last_epoch"):
        lines.append(f"- last epoch: {status['last_epoch']}")
    if status.get("best"):
        best = status["best"]
        lines.append(
            f"- best: epoch {best['epoch']:.0f}"
            + (f", validation WRA {100 * best['wra']:.1f} %" if "wra" in best else "")
        )
    for key, label in (("started", "started"), ("updated", "updated"), ("expected_finish", "expected finish")):
        if status.get(key):
            lines.append(f"- {label}: {status[key]}")
    names = [c["name"] if isinstance(c, dict) else c for c in status.get("checkpoints", [])]
    lines.append(f"- checkpoints: {', '.join(names) or 'none yet'}")
    return "\n".join(lines) + "\n"


def now() -> str:
    """Local time to the second, with its zone."""
    return datetime.now(UTC).astimezone().isoformat(timespec="seconds")


def write_status(out: Path, status: dict[str, Any]) -> None:
    """Rewrites status.json and STATUS.md."""
    write_atomically(out / "status.json", json.dumps(status, indent=1))
    files = [file.name for file in sorted(out.glob("*.pt"))]
    write_atomically(out / "STATUS.md", render({**status, "checkpoints": files}))


def close_for(out: Path, state: str, message: str) -> None:
    """Last words of a run whose own process knew less of its end, or nothing any more."""
    status = json.loads((out / "status.json").read_text(encoding="utf-8"))
    write_status(out, {**status, "state": state, "message": message, "expected_finish": None, "updated": now()})


class Mirror(Protocol):
    """Where the rows of metrics.jsonl go besides; both calls return what went wrong, a line each."""

    def row(self, event: str, row: Mapping[str, Any]) -> list[str]:
        """Takes a row."""

    def close(self, state: str) -> list[str]:
        """Takes the run's last state: `finished`, `stopped` or `failed`."""


class RunLog:
    """Writes what happens in a run folder as it happens.

    Args:
        out: run folder; facts: what is known before the first step (goes into the status); quiet: no console.
        parameters: name -> size, to count those that received a gradient.
        mirror: gets the rows of metrics.jsonl too.
    """

    def __init__(
        self,
        out: Path,
        facts: dict[str, Any],
        parameters: dict[str, int],
        *,
        quiet: bool = False,
        mirror: Mirror | None = None,
    ) -> None:
        self.out, self.parameters, self.quiet, self.mirror = out, parameters, quiet, mirror
        self.status: dict[str, Any] = {
            "state": "running",
            "pid": os.getpid(),
            "host": platform.node(),
            "started": now(),
            **facts,
        }
        self.begun, self.first_update = time.monotonic(), None
        self.last_line = self.last_status = 0.0
        self.log = (out / "train.log").open("a", encoding="utf-8", buffering=1)
        self.metrics = (out / "metrics.jsonl").open("a", encoding="utf-8", buffering=1)
        self.on_terminal = sys.stderr.isatty() and not quiet
        self.write_status()

    @staticmethod
    def forget_after(out: Path, update: int) -> None:
        """Drops metrics beyond the checkpoint that a run goes on from."""
        path = out / "metrics.jsonl"
        if path.is_file():
            rows = [line for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
            kept = [line for line in rows if json.loads(line).get("update", 0) <= update]
            write_atomically(path, "".join(line + "\n" for line in kept))

    def line(self, text: str) -> None:
        """A plain line in the log, and on the console."""
        self.log.write(f"{now()} {text}\n")
        if not self.quiet:
            print(("\r\033[K" if self.on_terminal else "") + text, file=sys.stderr, flush=True)

    def __call__(self, event: str, row: dict[str, Any]) -> None:
        """Takes an event of the loop: "stage", "step", "gradients", "frozen", "epoch" or "saved"."""
        if event == "step":
            self._step(row)
        elif event in ("gradients", "frozen"):
            self.row(event, row)
        elif event == "stage":
            self._count(row["parameters"])
        elif event == "epoch":
            self.row("epoch", row)
            self.status["last_epoch"] = epoch_line(row)
            self.line(epoch_line(row))
        else:
            self.status["best"] = row["best"]
            self._count({"with_gradient": sum(self.parameters[name] for name in row["with_gradient"])})
            self.write_status(silent=row["silent"], skipped=row["skipped"])

    def table(self, rows: Sequence[tuple[str, str, str]]) -> None:
        """The pre-flight table."""
        for verdict, check, what in rows:
            self.line(f"pre-flight {verdict:6} {check}: {what}")

    def row(self, event: str, row: dict[str, Any]) -> None:
        """A line of metrics.jsonl."""
        self.metrics.write(json.dumps({"event": event, **row}) + "\n")
        if self.mirror is not None:
            for problem in self.mirror.row(event, row):
                self.line(problem)

    def _count(self, counts: dict[str, int]) -> None:
        self.status["parameters"] = {**self.status.get("parameters", {}), **counts}

    def _step(self, row: dict[str, Any]) -> None:
        if self.first_update is None:
            self.first_update = row["update"] - 1
        elapsed = time.monotonic() - self.begun
        speed = (row["update"] - self.first_update) / max(elapsed, 1e-6)
        left_s = (row["updates"] - row["update"]) / max(speed, 1e-6)
        self.status["update"] = row["update"]
        if is_logged(row["update"]):
            self.row("step", row)
        if elapsed - self.last_status >= STATUS_EVERY_S or row["update"] == row["updates"]:
            self.last_status = elapsed
            self.status["progress"] = progress_line(row, speed, left_s)
            self.status["expected_finish"] = (datetime.now(UTC).astimezone() + timedelta(seconds=left_s)).isoformat(
                timespec="seconds"
            )
            self.write_status()
        if self.on_terminal:
            print("\r\033[K" + progress_line(row, speed, left_s), end="", file=sys.stderr, flush=True)
        elif elapsed - self.last_line >= LINE_EVERY_S:
            self.last_line = elapsed
            self.line(progress_line(row, speed, left_s))

    def write_status(self, **changes: Any) -> None:
        """Rewrites status.json and STATUS.md."""
        self.status.update(changes, updated=now())
        write_status(self.out, self.status)

    def close(self, state: str, message: str = "") -> None:
        """Last words of a run: `finished`, `stopped` or `failed`."""
        if self.on_terminal:
            print(file=sys.stderr)
        self.write_status(
            state=state, message=message, expected_finish=None, seconds=round(time.monotonic() - self.begun, 1)
        )
        if self.mirror is not None:
            for problem in self.mirror.close(state):
                self.line(problem)
        self.log.close()
        self.metrics.close()


class NoLog:
    """In place of `RunLog` in all processes of a run but the first: they write nothing."""

    def __call__(self, event: str, row: dict[str, Any]) -> None:
        """Nothing."""

    def line(self, text: str) -> None:
        """Nothing."""

    def table(self, rows: Sequence[tuple[str, str, str]]) -> None:
        """Nothing."""

    def row(self, event: str, row: dict[str, Any]) -> None:
        """Nothing."""

    def close(self, state: str, message: str = "") -> None:
        """Nothing."""
