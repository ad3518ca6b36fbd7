"""What a study or a run is doing, as another process sees it: read cheaply while it is written. Imports no torch."""

from __future__ import annotations

import json
import math
import mmap
import platform
import shlex
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from xded.errors import GO_ON
from xded.study.folder import LOCK, STALE_S, STATE, STUDY, alive, owner_of, read_state
from xded.study.plan import StudyError
from xded.training.status import StatusError, read_status, render

POINTS = 32  # of a curve
# how `training.status.RunLog` begins the lines of metrics.jsonl
STEP, EPOCH = b'{"event": "step"', b'{"event": "epoch"'
QUIET_S = 30.0  # silence that is worth saying
PLANNED = "being planned"
INTERRUPTED = "interrupted"
BUDGET = "the budget was used up"


@dataclass(frozen=True)
class Curve:
    """A run's metrics.jsonl in at most `POINTS` points a line, the last ones among them.

    Attributes:
        loss: training loss; wra_percent: validation WRA, of epochs that were validated.
        epoch, epochs, update, updates: of the last step row.
        unreadable: of the lines that were looked at.
    """

    loss: tuple[float, ...] = ()
    wra_percent: tuple[float, ...] = ()
    epoch: int | None = None
    epochs: int | None = None
    update: int | None = None
    updates: int | None = None
    unreadable: int = 0


@dataclass(frozen=True)
class RunView:
    """One row: an attempt in a fold with a seed, another piece that trains, or a run of its own.

    Attributes:
        about: what names it, by column; state: `waiting`, `running`, `done` ...; folder: where it lies.
        left_s: until its expected finish; seconds: that it took; silent_s: since it last wrote its status, if it runs.
        why: it failed, or is otherwise not what it should be.
    """

    about: Mapping[str, Any]
    state: str
    folder: str
    curve: Curve = Curve()
    left_s: float | None = None
    seconds: float | None = None
    silent_s: float | None = None
    best_wra_percent: float | None = None
    why: str = ""


@dataclass(frozen=True)
class View:
    """A study, a run or a folder of runs at one moment.

    Attributes:
        sentence: whether it is alive, and what to do when it is not.
        pieces: how many are in each state; rows: attempts, or runs; others: other pieces at work.
        failures: title and reason of what failed or was left out.
        lines: what else is known of a single run.
    """

    name: str
    state: str
    sentence: str
    rows: tuple[RunView, ...]
    silent_s: float | None = None
    left_s: float | None = None
    pieces: Mapping[str, int] = field(default_factory=dict)
    others: tuple[RunView, ...] = ()
    failures: tuple[tuple[str, str], ...] = ()
    lines: tuple[str, ...] = ()

    @property
    def over(self) -> bool:
        """Whether nothing will change any more unless somebody starts it again."""
        return self.state not in ("running", PLANNED)

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which knows no NaN."""
        kept: dict[str, Any] = finite(asdict(self))
        return kept


def is_study(folder: Path) -> bool:
    """Whether a folder is that of a study that has begun, or is about to."""
    return (folder / STATE).is_file() or (folder / LOCK).is_file()


# --- metrics ------------------------------------------------------------------------------------------------


def read_curve(path: Path) -> Curve:
    """The curves of a metrics.jsonl, however long; a file that is not there yet is an empty curve.

    Only lines that are shown are parsed: some tens of thousands of others are skipped. What has not changed since the
    last call is not read again.
    """
    try:
        facts = path.stat()
    except FileNotFoundError:
        return Curve()
    return _read_curve(path, facts.st_size, facts.st_mtime_ns)


@lru_cache(maxsize=4096)
def _read_curve(path: Path, size_bytes: int, _changed_ns: int) -> Curve:
    if not size_bytes:
        return Curve()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        end = data.rfind(b"\n") + 1  # the last line may be half written
        steps = {data.find(STEP, end * part // POINTS, end) for part in range(1, POINTS)}
        steps |= {data.find(STEP, 0, end), data.rfind(STEP, 0, end)}
        step_rows, bad_steps = _rows(data, sorted(steps - {-1}), ("loss", "epoch", "epochs", "update", "updates"))
        epoch_rows, bad_epochs = _rows(data, _spread(_places(data, EPOCH, end)), ("epoch",))
    last = step_rows[-1] if step_rows else {}
    return Curve(
        tuple(row["loss"] for row in step_rows),
        tuple(100 * row["wra"] for row in epoch_rows if isinstance(row.get("wra"), int | float)),
        last.get("epoch"),
        last.get("epochs"),
        last.get("update"),
        last.get("updates"),
        bad_steps + bad_epochs,
    )


def _places(data: mmap.mmap, marker: bytes, end: int) -> list[int]:
    places, place = [], data.find(marker, 0, end)
    while place >= 0:
        places.append(place)
        place = data.find(marker, place + len(marker), end)
    return places


def _spread(places: Sequence[int]) -> list[int]:
    """At most `POINTS` of them, evenly, the first and the last among them."""
    if len(places) <= POINTS:
        return list(places)
    return [places[round(part * (len(places) - 1) / (POINTS - 1))] for part in range(POINTS)]


def _rows(data: mmap.mmap, places: Sequence[int], numbers: Sequence[str]) -> tuple[list[dict[str, Any]], int]:
    """The lines that begin at some places, and how many of them cannot be read."""
    rows = []
    for place in places:
        try:
            row = json.loads(data[place : data.find(b"\n", place)])
        except ValueError:
            continue
        if all(isinstance(row.get(name), int | float) for name in numbers):
            rows.append(row)
    return rows, len(places) - len(rows)


# --- runs ---------------------------------------------------------------------------------------------------


def read_run(folder: Path, about: Mapping[str, Any]) -> tuple[RunView, dict[str, Any]]:
    """A run folder, and its status.

    Raises:
        StatusError: no run is there, or its status cannot be read.
    """
    status = read_status(folder)
    running = status["state"] == "running"
    silent_s = _since(status.get("updated")) if running else None
    why = str(status.get("message") or "")
    if running and silent_s is not None and silent_s > STALE_S and status.get("host") != platform.node():
        why = f"no sign of life for {ago(silent_s)}: probably dead. {GO_ON}"
    elif status["state"] == "killed":
        why = f"its process is gone. {GO_ON}"
    best = status.get("best") or {}
    view = RunView(
        about,
        status["state"],
        str(folder),
        read_curve(folder / "metrics.jsonl"),
        left_s=_until(status.get("expected_finish")) if running else None,
        seconds=status.get("seconds"),
        silent_s=silent_s,
        best_wra_percent=100 * best["wra"] if "wra" in best else None,
        why=why,
    )
    return view, status


def read_runs(folder: Path) -> View:
    """A run folder, or a folder of runs (`teach`).

    Raises:
        StatusError: no run is there.
    """
    found = sorted(path.parent for path in folder.rglob("status.json"))
    if folder in found or not found:
        view, status = read_run(folder, {"run": folder.name})
        name, lines = str(status.get("name", folder.name)), tuple(render(status).splitlines()[2:])
        return View(name, view.state, _run_sentence(view), (view,), view.silent_s, view.left_s, lines=lines)
    rows = tuple(_run_or_reason(path, {"run": str(path.relative_to(folder))}) for path in found)
    states = Counter(row.state for row in rows)
    state = "running" if states["running"] else "failed" if states["failed"] else "finished"
    failures = tuple((row.about["run"], row.why) for row in rows if row.why and row.state != "finished")
    silent_s = min((row.silent_s for row in rows if row.silent_s is not None), default=None)
    sentence = f"last sign of life {ago(silent_s)} ago" if silent_s is not None else ""
    return View(folder.name, state, sentence, rows, silent_s, pieces=dict(states), failures=failures)


def _run_or_reason(folder: Path, about: Mapping[str, Any]) -> RunView:
    try:
        return read_run(folder, about)[0]
    except StatusError as error:
        return RunView(about, "unreadable", str(folder), why=str(error))


def _run_sentence(view: RunView) -> str:
    if view.why or view.silent_s is None:
        return view.why
    return f"last sign of life {ago(view.silent_s)} ago"


# --- studies ------------------------------------------------------------------------------------------------


def read_study_view(out: Path) -> View:
    """A study's folder, whether somebody works on it or not.

    Raises:
        StudyError: it holds no study that has begun, or its state cannot be read.
    """
    try:
        return _study_view(out)
    except (KeyError, TypeError, AttributeError) as error:
        raise StudyError(
            f"{out / STATE} is no state that this version of xded writes: {error!r}.", f"Write it anew: {go_on(out)}"
        ) from error


def _study_view(out: Path) -> View:
    owner, lock = owner_of(out / LOCK), out / LOCK
    if not (out / STATE).is_file() and lock.is_file() and alive(owner, lock):
        return View(out.name, PLANNED, "its corpus is being read and its pieces planned", ())
    state = read_state(out)
    running = state["state"] == "running"
    pieces = {piece["key"]: piece for piece in state["pieces"]}
    rows = tuple(_cell(out, cell, pieces.get(cell.get("key"), {}), running) for cell in state.get("cells", ()))
    attempts = {cell["key"] for cell in state.get("cells", ())}
    at_work = [p for key, p in pieces.items() if running and p["state"] == "running" and key not in attempts]
    others = tuple(_piece(out, piece) for piece in at_work)
    signs = [_since(state.get("heartbeat")), _age(lock), *(row.silent_s for row in (*rows, *others))]
    silent_s = min((sign for sign in signs if sign is not None), default=None)
    left_s, said_s = None, state.get("left_s")
    if running and said_s is not None:  # none: nothing is known of what is still waiting
        known_s = [row.left_s for row in (*rows, *others) if row.left_s is not None]
        left_s = max(0.0, said_s - (_since(state.get("heartbeat")) or 0.0), *known_s)
    counts = Counter(_shown_state(piece, running) for piece in state["pieces"])
    return View(
        str(state.get("study", out.name)),
        state["state"],
        _study_sentence(out, state["state"], owner, silent_s),
        rows,
        silent_s,
        left_s,
        dict(counts),
        others,
        tuple(
            (piece["title"], piece.get("error") or BUDGET)
            for piece in state["pieces"]
            if piece["state"] in ("failed", "left out")
        ),
    )


def _shown_state(piece: Mapping[str, Any], running: bool) -> str:
    """A piece that ran when its study died does not run any more."""
    state = str(piece.get("state", "waiting"))
    return INTERRUPTED if state == "running" and not running else state


def _cell(out: Path, cell: Mapping[str, Any], piece: Mapping[str, Any], running: bool) -> RunView:
    about = {"attempt": cell["attempt"], "held_out": "+".join(cell["held_out"]), "seed": cell["seed"]}
    return _training(out, about, piece, _shown_state(piece, running))


def _piece(out: Path, piece: Mapping[str, Any]) -> RunView:
    return _training(out, {"attempt": piece["title"], "held_out": "", "seed": ""}, piece, "running")


def _training(out: Path, about: Mapping[str, Any], piece: Mapping[str, Any], state: str) -> RunView:
    """A piece of a study, with what its run folder says where there is one."""
    folder = _here(out, Path(piece.get("folder", "")))
    error, seconds = piece.get("error") or "", piece.get("seconds")
    if not (folder / "status.json").is_file():
        return RunView(about, state, str(folder), seconds=seconds, why=error)
    run = _run_or_reason(folder, about)
    at_work = state == "running" and run.state == "running"
    return RunView(
        about,
        state,
        str(folder),
        run.curve,
        run.left_s if at_work else None,
        seconds,
        run.silent_s if at_work else None,
        run.best_wra_percent,
        error or (run.why if run.state == "unreadable" or at_work else ""),
    )


def _here(out: Path, folder: Path) -> Path:
    """A piece's folder, also when the study was moved or is seen from another machine."""
    if folder.is_dir() or "pieces" not in folder.parts:
        return folder
    last = max(place for place, part in enumerate(folder.parts) if part == "pieces")
    return out.joinpath(*folder.parts[last:])


def _study_sentence(out: Path, state: str, owner: Mapping[str, Any], silent_s: float | None) -> str:
    if silent_s is None:
        return ""
    if state == "running":
        there = f"process {owner.get('pid')} on {owner.get('host')}"
        if silent_s > STALE_S:
            return f"no heartbeat for {ago(silent_s)}, but {there} is there: it is busy, or hangs"
        return f"last heartbeat {ago(silent_s)} ago, {there}"
    if state == "killed":
        why = "it was stopped"
        if owner:
            why = f"process {owner.get('pid')} is gone" if owner.get("host") == platform.node() else "probably dead"
        return f"no heartbeat for {ago(silent_s)}: {why}; go on with {go_on(out)}"
    if state == "failed":
        return f"ended {ago(silent_s)} ago; mend the cause, then {go_on(out)}"
    return f"ended {ago(silent_s)} ago"


def go_on(out: Path) -> str:
    """The command that does what is left of a study."""
    return f"xded study run {shlex.quote(str(out / STUDY))} --out {shlex.quote(str(out))}"


# --- time ---------------------------------------------------------------------------------------------------


def ago(seconds: float) -> str:
    """A length of time as one says it: 5 s, 4 min, 2 h 10 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _since(moment: Any) -> float | None:
    try:
        return max(0.0, time.time() - datetime.fromisoformat(moment).timestamp())
    except (TypeError, ValueError):
        return None


def _until(moment: Any) -> float | None:
    try:
        return max(0.0, datetime.fromisoformat(moment).timestamp() - time.time())
    except (TypeError, ValueError):
        return None


def _age(path: Path) -> float | None:
    try:
        return max(0.0, time.time() - path.stat().st_mtime)
    except OSError:
        return None


def finite(value: Any) -> Any:
    """A tree of mappings and lists with `None` for NaN and infinity, which JSON does not know."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(inner) for key, inner in value.items()}
    return [finite(inner) for inner in value] if isinstance(value, list | tuple) else value
