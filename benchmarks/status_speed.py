"""How long `xded status` takes on many metric lines: one look, a look again while one run goes on, a whole process.

    python benchmarks/status_speed.py >> benchmarks/RESULTS.md

The files are made up in the form of real ones: a step row and a row of gradient norms every tenth update, an epoch row
every hundredth. They have just been written and are in the machine's file cache.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from common import head
from xded.study.status import View, read_study_view
from xded.training.status import now

LINES = 100_000
REPEATS = 5
GROUPS = ("subsampling", *(f"encoder.{n}" for n in range(4)), *(f"decoder.{n}" for n in range(4)), "ctc_head")


def metric_lines(count: int) -> str:
    """`count` lines of a metrics.jsonl."""
    lines: list[str] = []
    update, updates = 0, 5 * count
    while len(lines) < count:
        update += 10
        loss = 1.0 + 3.0 / (1.0 + update / 500)
        step = {
            "event": "step", "epoch": update // 100 + 1, "epochs": updates // 100, "update": update,
            "updates": updates, "stage": 1, "lr": 2.0e-4 / 3, "gradient_norm": loss / 7, "loss": loss, "ctc": loss / 3,
            "ctc_kd": loss / 3, "cross_entropy": loss / 6, "decoder_kd": loss / 6, "frames": 0.8123456789,
        }  # fmt: skip
        norms = {"event": "gradients", "update": update, "norms": dict.fromkeys(GROUPS, loss / 9)}
        lines += [json.dumps(step), json.dumps({**norms, "blank": loss / 11, "rows": loss / 13})]
        if update % 100 == 0:
            epoch = {"event": "epoch", "epoch": update // 100, "update": update, "train_loss": loss, "val_loss": loss}
            lines.append(json.dumps({**epoch, "wra": 1 - loss / 4, "distinct": 30.0, "empty": 0.0}))
    return "".join(f"{line}\n" for line in lines[:count])


def make_study(out: Path, runs: int, lines_each: int) -> list[Path]:
    """A study at work with that many attempts; returns their metrics."""
    text, pieces, cells = metric_lines(lines_each), [], []
    for number in range(runs):
        run = out / "pieces" / "runs" / f"{number:012d}"
        run.mkdir(parents=True)
        (run / "metrics.jsonl").write_text(text, encoding="utf-8")
        status = {"state": "running", "pid": os.getpid(), "host": platform.node(), "name": "a", "updated": now()}
        (run / "status.json").write_text(json.dumps(status), encoding="utf-8")
        title = f"a, T{number:02d}, seed 0"
        pieces.append({"key": str(number), "kind": "attempt", "title": title, "folder": str(run), "state": "running"})
        cells.append({"attempt": "a", "held_out": [f"T{number:02d}"], "seed": 0, "run": str(run), "key": str(number)})
    state = {"study": "s", "state": "running", "started": now(), "heartbeat": now(), "left_s": 60.0}
    (out / "state.json").write_text(json.dumps({**state, "pieces": pieces, "cells": cells}), encoding="utf-8")
    (out / "lock.json").write_text(json.dumps({"pid": os.getpid(), "host": platform.node()}), encoding="utf-8")
    return [Path(cell["run"]) / "metrics.jsonl" for cell in cells]


def seconds(work: Callable[[], object]) -> float:
    """Wall-clock seconds of one call."""
    begun_s = time.perf_counter()
    work()
    return time.perf_counter() - begun_s


def touched(metrics: list[Path]) -> None:
    """A look is only new where a file has changed."""
    for path in metrics:
        os.utime(path)


def measure(out: Path, runs: int, lines_each: int) -> str:
    """A row of the table."""
    metrics = make_study(out, runs, lines_each)

    def look() -> View:
        return read_study_view(out)

    def parse() -> None:
        for path in metrics:
            for line in path.read_text(encoding="utf-8").splitlines():
                json.loads(line)

    first, again, process = [], [], []
    for _ in range(REPEATS):
        touched(metrics)
        first.append(seconds(look))
        touched(metrics[:1])
        again.append(seconds(look))
        command = [str(Path(sys.executable).parent / "xded"), "status", str(out)]
        process.append(seconds(lambda: subprocess.run(command, check=True, capture_output=True)))  # noqa: B023
    assert look().rows[-1].curve.updates == 5 * lines_each
    megabytes = sum(path.stat().st_size for path in metrics) / 1e6
    return (
        f"| {runs} | {runs * lines_each:,} | {megabytes:.0f} | {median(first):.3f} | {median(again):.3f} | "
        f"{median(process):.2f} ({min(process):.2f} to {max(process):.2f}) | {seconds(parse):.2f} |"
    )


def main() -> None:
    """Measures everything and prints the section."""
    rows = []
    for runs, lines_each in ((1, LINES), (126, LINES // 126), (10, LINES)):
        with TemporaryDirectory() as folder:
            rows.append(measure(Path(folder), runs, lines_each))
            print(rows[-1], file=sys.stderr)
    print(head("how long `xded status` takes on many metric lines", "status_speed"))
    print(f"Wall-clock seconds, median of {REPEATS}; made-up files in the file cache.\n")
    print(
        "| attempts | metric lines | MB | first look | look again, one run has gone on | whole process (range) | "
        "for comparison: every line parsed, once |\n| ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
    )
    print("\n".join(rows))


if __name__ == "__main__":
    main()
