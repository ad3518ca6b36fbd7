"""`xded status`: a second process that sees a study or a run, live, finished, failed or dead."""

from __future__ import annotations

import json
import math
import os
import platform
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cli_calls import call, done, refused
from xded.report.status import page, sparkline
from xded.study import status
from xded.study.folder import LOCK, STATE
from xded.study.plan import StudyError
from xded.study.status import POINTS, RunView, View, ago, read_curve, read_runs, read_study_view

XDED = str(Path(sys.executable).parent / "xded")
ALIVE: dict[str, Any] = {"host": platform.node()}  # a process that is there, and is not this one


@pytest.fixture(scope="module", autouse=True)
def _another_process() -> Iterator[None]:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        ALIVE["pid"] = process.pid
        yield
        process.communicate(b"\n")


def moment(ago_s: float) -> str:
    return (datetime.now(UTC) - timedelta(seconds=ago_s)).astimezone().isoformat(timespec="seconds")


@pytest.fixture(scope="module")
def gone() -> dict[str, Any]:
    """A process of this machine that has ended."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        pass
    return {"pid": process.pid, "host": platform.node()}


def step(update: int, loss: float = 1.0, updates: int = 100) -> str:
    row = {"event": "step", "epoch": update // 10 + 1, "epochs": updates // 10, "update": update, "updates": updates}
    return json.dumps({**row, "loss": loss})


def epoch(number: int, wra: float) -> str:
    return json.dumps({"event": "epoch", "epoch": number, "update": 10 * number, "train_loss": 1.0, "wra": wra})


def write_run(folder: Path, state: str = "running", *, lines: list[str] | None = None, **changes: Any) -> Path:
    """A run folder as training leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {"state": state, **ALIVE, "name": "student", "updated": moment(3), "expected_finish": moment(-90)}
    (folder / "status.json").write_text(json.dumps({**found, **changes}), encoding="utf-8")
    if lines is not None:
        (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return folder


def write_study(
    out: Path,
    pieces: dict[str, str],
    *,
    state: str = "running",
    beat_s: float = 3.0,
    lock: dict[str, Any] | None = None,
) -> Path:
    """A study's folder; names of attempts begin with `a`, other pieces with anything else."""
    out.mkdir(parents=True, exist_ok=True)
    listed, cells = [], []
    for name, piece_state in pieces.items():
        folder = out / "pieces" / "runs" / name
        error = {"failed": "The disk is full.", "left out": "needs 'parent', which failed"}.get(piece_state)
        facts = {"state": piece_state, "error": error, "seconds": 61.0 if piece_state == "done" else None}
        listed.append({"key": name, "kind": "?", "title": f"{name}, M08", "folder": str(folder), **facts})
        if name.startswith("a"):
            cells.append({"attempt": name, "held_out": ["M08"], "seed": 0, "run": str(folder), "key": name})
    left_s = 3600.0 if state == "running" else None
    head = {"study": "debug", "state": state, "started": moment(600), "heartbeat": moment(beat_s), "left_s": left_s}
    (out / STATE).write_text(json.dumps({**head, "pieces": listed, "cells": cells}), encoding="utf-8")
    if lock is not None:
        (out / LOCK).write_text(json.dumps(lock), encoding="utf-8")
        then = time.time() - beat_s
        os.utime(out / LOCK, (then, then))
    return out


def shown(view: View, width: int = 100, height: int | None = None) -> str:
    console = Console(width=width, record=True, file=open(os.devnull, "w"), legacy_windows=False)  # noqa: SIM115, PTH123
    console.print(page(view, width, height))
    return console.export_text()


def row_of(view: View, name: str) -> RunView:
    return next(row for row in view.rows if name in row.about.values())


# --- studies ------------------------------------------------------------------------------------------------


def test_a_study_at_work(tmp_path: Path) -> None:
    out = write_study(
        tmp_path, {"parent": "done", "teacher": "running", "a1": "done", "a2": "running", "a3": "waiting"}, lock=ALIVE
    )
    lines = [step(1, 3.0), step(50, 2.0), epoch(5, 0.25), step(60, 1.5), epoch(6, 0.5)]
    write_run(out / "pieces" / "runs" / "a2", lines=lines, best={"epoch": 6, "wra": 0.5})
    write_run(out / "pieces" / "runs" / "teacher", lines=[step(20, 4.0)])
    view = read_study_view(out)
    assert (view.state, view.over) == ("running", False)
    assert view.pieces == {"done": 2, "running": 2, "waiting": 1}
    assert view.left_s == pytest.approx(3597, abs=3), "seconds since the heartbeat are taken off"
    assert re.fullmatch(rf"last heartbeat \d+ s ago, process {ALIVE['pid']} on {platform.node()}", view.sentence)
    assert [row.state for row in view.rows] == ["done", "running", "waiting"]
    row = row_of(view, "a2")
    assert row.curve.loss == (3.0, 2.0, 1.5)
    assert row.curve.wra_percent == (25.0, 50.0)
    assert (row.curve.epoch, row.curve.epochs, row.curve.update, row.curve.updates) == (7, 10, 60, 100)
    assert row.left_s == pytest.approx(90, abs=3)
    assert [other.about["attempt"] for other in view.others] == ["teacher, M08"]
    text = shown(view)
    for piece in ("debug: running", "0:59:5", "2 done", "60/100", "█▃▁ 1.5", "50 50", "teacher, M08", "0:01:01"):
        assert piece in text, f"{piece} is not in\n{text}"


def test_a_finished_study(tmp_path: Path) -> None:
    view = read_study_view(write_study(tmp_path, {"a1": "done"}, state="finished", beat_s=7200))
    assert (view.state, view.over, view.left_s, view.sentence) == ("finished", True, None, "ended 2 h 0 min ago")


def test_what_failed_is_said_with_its_reason(tmp_path: Path) -> None:
    pieces = {"parent": "failed", "teacher": "left out", "a1": "left out", "a2": "done"}
    view = read_study_view(write_study(tmp_path, pieces, state="failed"))
    text = " ".join(shown(view).split())
    assert "parent, M08: The disk is full." in text
    assert "teacher, M08 and 1 more: needs 'parent', which failed" in text
    assert f"mend the cause, then xded study run {tmp_path}/study.yaml --out {tmp_path}" in view.sentence


def test_what_the_budget_left_out_says_so(tmp_path: Path) -> None:
    out = write_study(tmp_path, {"a1": "left out"}, state="finished")
    state = json.loads((out / STATE).read_text())
    state["pieces"][0]["error"] = None
    (out / STATE).write_text(json.dumps(state))
    assert read_study_view(out).failures == (("a1, M08", "the budget was used up"),)


def test_a_dead_study_says_how_to_go_on(tmp_path: Path, gone: dict[str, Any]) -> None:
    out = write_study(tmp_path / "my study", {"a1": "running", "a2": "waiting"}, beat_s=245, lock=gone)
    view = read_study_view(out)
    assert (view.state, view.over, view.left_s) == ("killed", True, None)
    assert view.sentence == (
        f"no heartbeat for 4 min: process {gone['pid']} is gone; "
        f"go on with xded study run '{out}/study.yaml' --out '{out}'"
    )
    assert view.pieces == {"interrupted": 1, "waiting": 1}
    assert row_of(view, "a1").state == "interrupted"


def test_another_machine_that_is_silent_is_probably_dead(tmp_path: Path) -> None:
    elsewhere = {"pid": 1, "host": "elsewhere"}
    silent = read_study_view(write_study(tmp_path, {"a1": "running"}, beat_s=245, lock=elsewhere))
    assert silent.state == "killed"
    assert silent.sentence.startswith("no heartbeat for 4 min: probably dead; go on with xded study run")
    assert read_study_view(write_study(tmp_path, {"a1": "running"}, beat_s=5, lock=elsewhere)).state == "running"


def test_a_silent_process_that_is_there_is_not_called_dead(tmp_path: Path) -> None:
    out = write_study(tmp_path, {"a1": "running"}, beat_s=245, lock=ALIVE)
    assert "no heartbeat for 4 min, but process" in read_study_view(out).sentence
    write_run(out / "pieces" / "runs" / "a1", updated=moment(8))
    assert re.match(r"last heartbeat \d+ s ago", read_study_view(out).sentence), "its run is a sign of life too"


def test_a_study_that_was_stopped(tmp_path: Path) -> None:
    view = read_study_view(write_study(tmp_path, {"a1": "running"}, beat_s=60))
    assert view.sentence.startswith("no heartbeat for 1 min: it was stopped; go on with")


def test_a_study_that_is_still_being_planned(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text(json.dumps(ALIVE))
    assert "being planned" in done("status", tmp_path).out


def test_a_half_written_or_foreign_state_is_an_error(tmp_path: Path) -> None:
    out = write_study(tmp_path, {"a1": "running"}, lock=ALIVE)
    whole = (out / STATE).read_text()
    (out / STATE).write_text(whole[: len(whole) // 2])
    refused(call("status", out), 2, "state.json cannot be read", "xded study run")
    (out / STATE).write_text(json.dumps({"state": "running", "pieces": [{"name": "a"}]}))
    with pytest.raises(StudyError, match="no state that this version of xded writes: KeyError"):
        read_study_view(out)


def test_a_moved_study_is_read_where_it_is_now(tmp_path: Path) -> None:
    before = write_study(tmp_path / "before", {"a1": "done"}, state="finished")
    write_run(before / "pieces" / "runs" / "a1", "finished", lines=[step(100)])
    before.rename(tmp_path / "after")
    assert row_of(read_study_view(tmp_path / "after"), "a1").curve.update == 100


def test_an_unreadable_run_does_not_hide_the_others(tmp_path: Path) -> None:
    out = write_study(tmp_path, {"a1": "running", "a2": "running"}, lock=ALIVE)
    write_run(out / "pieces" / "runs" / "a1", lines=[step(1)])
    (write_run(out / "pieces" / "runs" / "a2") / "status.json").write_text('{"state": "run')
    view = read_study_view(out)
    assert row_of(view, "a1").curve.update == 1
    assert "status.json cannot be read" in shown(view, 300)


def test_the_state_that_a_study_writes_is_understood(tmp_path: Path) -> None:
    import yaml

    from xded.study.engine import Progress
    from xded.study.plan import build, built_in
    from xded.study.run import _Watcher
    from xded.study.steps import Cell, Step, Work

    steps = tuple(
        Step(key, "attempt", f"{key}, M08, seed 0", tmp_path / "pieces" / "runs" / key, (), lambda: None)
        for key in ("good", "bad")
    )
    cells = tuple(Cell(s.key, ("M08", "M05"), 0, s.key, s.folder) for s in steps)
    work = Work(steps, cells, (), (("M08",),), 2)
    progress = Progress({"good": "done", "bad": "failed"}, {"good": 3.0}, {"bad": "The disk is full."})
    (tmp_path / LOCK).write_text(json.dumps(ALIVE))
    study = build(yaml.safe_load(built_in("debug")), "debug")
    _Watcher(study, work, tmp_path, lambda line: None, 1)(progress, final=True)
    (tmp_path / LOCK).unlink()
    view = read_study_view(tmp_path)
    assert (view.name, view.state) == ("debug", "failed")
    assert [(row.about["held_out"], row.state, row.seconds) for row in view.rows] == [
        ("M08+M05", "done", 3.0),
        ("M08+M05", "failed", None),
    ]
    assert view.failures == (("bad, M08, seed 0", "The disk is full."),)


# --- curves -------------------------------------------------------------------------------------------------


def test_a_long_file_is_sampled_with_its_first_and_last_rows(tmp_path: Path) -> None:
    lines = [line for u in range(1, 3001) for line in (step(u, 5000.0 - u, 3000), '{"event": "gradients"}')]
    for number in range(1, 301):
        lines.insert(20 * number + number - 1, epoch(number, number / 300))
    folder = write_run(tmp_path / "run", lines=lines)
    curve = read_curve(folder / "metrics.jsonl")
    assert len(curve.loss) <= POINTS + 1
    assert len(curve.loss) > POINTS // 2
    assert (curve.loss[0], curve.loss[-1]) == (4999.0, 2000.0)
    assert list(curve.loss) == sorted(curve.loss, reverse=True)
    assert (len(curve.wra_percent), curve.wra_percent[-1]) == (POINTS, 100.0)
    assert curve.wra_percent[0] == pytest.approx(1 / 3)
    assert (curve.update, curve.unreadable) == (3000, 0)


def test_a_half_written_last_line_is_left_for_the_next_look(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f"{step(1, 3.0)}\n{step(2, 2.0)}\n{step(3, 1.0)[:40]}")
    curve = read_curve(path)
    assert (curve.loss, curve.unreadable) == ((3.0, 2.0), 0)
    path.write_text(f"{step(1, 3.0)}\n{step(2, 2.0)}\n{step(3, 1.0)}\n")
    assert read_curve(path).loss == (3.0, 2.0, 1.0)
    path.write_text("")
    assert read_curve(path) == read_curve(tmp_path / "not there") == status.Curve()


def test_damaged_lines_are_said(tmp_path: Path) -> None:
    out = write_study(tmp_path, {"a1": "running"}, lock=ALIVE)
    lines = [step(1, 3.0), step(2)[:30], step(3, 1.0), '{"event": "step", "loss": "low"}', step(4, 0.5)]
    write_run(out / "pieces" / "runs" / "a1", lines=lines)
    view = read_study_view(out)
    assert row_of(view, "a1").curve.loss == (3.0, 1.0, 0.5)
    assert "a1, M08, 0: 2 lines of metrics.jsonl cannot be read" in shown(view)


def test_a_sparkline_shows_shape_and_what_is_no_number() -> None:
    assert sparkline([4, 3, 2, 1], 10) == "█▆▃▁"
    assert sparkline([0, 50, 100], 10, low=0, high=100) == "▁▅█"
    assert sparkline([1, math.nan, math.inf, 2], 10) == "▁!!█"
    assert sparkline([1, 1], 10) == "▁▁"
    assert sparkline(range(100), 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([], 8) == ""


def test_lengths_of_time_are_said_in_words() -> None:
    assert [ago(s) for s in (0.4, 59, 240, 3599, 7800)] == ["0 s", "59 s", "4 min", "59 min", "2 h 10 min"]


# --- the page and the command -------------------------------------------------------------------------------


def test_a_large_study_fits_the_terminal_and_shows_who_runs_and_who_failed(tmp_path: Path) -> None:
    pieces = {f"a{n}": "done" if n < 150 else "waiting" for n in range(200)} | {"a77": "running", "a190": "failed"}
    text = shown(read_study_view(write_study(tmp_path, pieces, lock=ALIVE)), 80, 24)
    assert len(text.splitlines()) <= 24
    for piece in ("a77 ", "a190 ", "more: ", "The disk is full."):
        assert piece in text, text
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("width", [80, 200])
def test_nothing_is_cut_at_80_columns(tmp_path: Path, width: int) -> None:
    out = write_study(tmp_path, {"attempt": "running"}, lock=ALIVE)
    lines = [line for n in range(1, 40) for line in (step(100 * n, 10.0 / n, 16000), epoch(n, n / 40))]
    write_run(out / "pieces" / "runs" / "attempt", lines=lines, best={"wra": 0.97})
    text = shown(read_study_view(out), width)
    for piece in ("attempt", "M08", "running", "3900/16000", " 0.256", " 98 ", " 97 ", "0:01:"):
        assert piece in text, text
    assert "…" not in text


def test_json_of_a_study_is_json_even_where_the_loss_is_no_number(tmp_path: Path) -> None:
    out = write_study(tmp_path, {"a1": "running", "a2": "failed"}, lock=ALIVE)
    write_run(out / "pieces" / "runs" / "a1", lines=[step(1, math.nan), step(2, 2.0)])
    found = json.loads(done("status", out, "--json").out, parse_constant=pytest.fail)
    assert found["rows"][0]["curve"]["loss"] == [None, 2.0]
    assert (found["state"], found["pieces"]) == ("running", {"running": 1, "failed": 1})
    assert found["failures"] == [["a2, M08", "The disk is full."]]


def test_json_of_runs_has_their_curves(tmp_path: Path) -> None:
    write_run(tmp_path / "one", lines=[step(1, 3.0), epoch(1, 0.5)])
    write_run(tmp_path / "two")
    assert json.loads(done("status", tmp_path / "one", "--json").out)["curve"]["wra_percent"] == [50.0]
    several = json.loads(done("status", tmp_path, "--json").out)
    assert {name: found["curve"]["loss"] for name, found in several.items()} == {"one": [3.0], "two": []}


def test_runs_of_their_own_are_seen_too(tmp_path: Path, gone: dict[str, Any]) -> None:
    write_run(tmp_path / "one", lines=[step(10, 2.0)])
    write_run(tmp_path / "two", **gone)
    write_run(tmp_path / "three", host="elsewhere", updated=moment(300))
    view = read_runs(tmp_path)
    assert view.state == "running"
    assert re.fullmatch(r"last sign of life \d+ s ago", view.sentence)
    text = " ".join(shown(view, 200).split())
    assert "two: its process is gone." in text
    assert "three: no sign of life for 5 min: probably dead." in text
    single = read_runs(tmp_path / "one")
    assert (single.name, single.state, single.sentence.split(" ")[0]) == ("student", "running", "last")
    assert "10/100" in shown(single)


def test_without_a_terminal_watching_is_one_look(tmp_path: Path) -> None:
    out = write_study(tmp_path, {"a1": "running"}, lock=ALIVE)
    assert "debug: running" in done("status", out, "--watch").out
    assert done("status", out, "--once").out.count("debug") == 1


def test_no_torch_is_imported(tmp_path: Path) -> None:
    out = write_study(tmp_path, {"a1": "running"}, lock=ALIVE)
    code = (
        "import sys; from xded.cli import main; sys.argv[0] = 'xded'\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print({'torch', 'lightning', 'numpy', 'scipy', 'matplotlib'} & sys.modules.keys())"
    )
    ended = subprocess.run([sys.executable, "-c", code, "status", str(out)], capture_output=True, text=True, check=True)
    assert "debug: running" in ended.stdout
    assert ended.stdout.endswith("set()\n"), ended.stdout


class Terminal:
    """`xded status --watch` on a terminal of its own."""

    def __init__(self, folder: Path) -> None:
        ours, theirs = pty.openpty()
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120", "LINES": "40"}
        command = [XDED, "status", str(folder), "--watch", "--every", "0.1"]
        self.process = subprocess.Popen(
            command, stdout=theirs, stderr=subprocess.STDOUT, stdin=theirs, env=environment, start_new_session=True
        )
        os.close(theirs)
        self.ours, self.text = ours, ""

    def until(self, words: str, limit_s: float = 20.0) -> None:
        """Reads until some words are there that were not before."""
        begun, seen = time.monotonic(), ""
        while words not in seen:
            assert time.monotonic() - begun < limit_s, self.text
            seen += self._read()

    def _read(self) -> str:
        try:
            read = os.read(self.ours, 65536).decode(errors="replace")
        except OSError:  # the other side has closed it
            read = ""
        if not read:
            time.sleep(0.05)
        self.text += read
        return read

    def end(self) -> int:
        """Waits for its end; returns the exit code."""
        while self.process.poll() is None:
            self._read()
        os.close(self.ours)
        return self.process.returncode


def test_watching_follows_a_study_to_its_end(tmp_path: Path) -> None:
    out = write_study(tmp_path, {"a1": "waiting"}, lock=ALIVE)
    terminal = Terminal(out)
    terminal.until("1 waiting")
    write_study(tmp_path, {"a1": "running"}, lock=ALIVE)
    write_run(out / "pieces" / "runs" / "a1", lines=[step(37)])
    terminal.until("37/100")
    (out / STATE).write_text('{"state": "runn')
    terminal.until("cannot be read")
    write_study(tmp_path, {"a1": "done"}, state="finished")
    assert terminal.end() == 0
    assert "1 done" in terminal.text


def test_ctrl_c_ends_watching_quietly(tmp_path: Path) -> None:
    terminal = Terminal(write_study(tmp_path, {"a1": "running"}, lock=ALIVE))
    terminal.until("1 running")
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.end() == 0
    assert "Traceback" not in terminal.text
    assert "xded:" not in terminal.text


@pytest.mark.parametrize("state", ["finished", "killed"])
def test_watching_what_is_over_shows_it_once(tmp_path: Path, state: str, gone: dict[str, Any]) -> None:
    out = write_study(tmp_path, {"a1": "running"}, state="running" if state == "killed" else state, lock=gone)
    terminal = Terminal(out)
    assert terminal.end() == 0
    assert f"debug: {state}" in terminal.text.replace("\x1b[1m", "").replace("\x1b[0m", "").replace(
        "\x1b[32m", ""
    ).replace("\x1b[31m", "")
