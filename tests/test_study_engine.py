"""Pieces in the order of what they need: never twice, past failures, killed workers and a spent budget."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from xded.errors import GO_ON, LeakageError
from xded.study import engine
from xded.study.engine import DONE, LocalWorkers, Progress, is_done, run
from xded.study.pieces import DECODES, predictions_in
from xded.study.steps import Kind, Step
from xded.training.loop import InterruptedRunError


def begun(folder: Path) -> int:
    """How often a piece was begun; counts this time too."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "begun").open("a") as file:
        file.write(f"{time.monotonic()} {os.getpid()}\n")
    for decode in DECODES:
        predictions_in(folder, decode).touch()
    return len((folder / "begun").read_text().splitlines())


def times(step: Step) -> int:
    path = step.folder / "begun"
    return len(path.read_text().splitlines()) if path.is_file() else 0


def works(folder: Path) -> None:
    begun(folder)


def fails(folder: Path) -> None:
    begun(folder)
    raise LeakageError("t1 was heard.", "Hold it out.")


def dies(deaths: int, number: int, folder: Path) -> None:
    if begun(folder) <= deaths:
        os.kill(os.getpid(), number)
    time.sleep(1.0)  # its neighbour is at work meanwhile


def is_asked_to_stop(stops: int, folder: Path) -> None:
    if begun(folder) <= stops:
        raise InterruptedRunError("Stopped on request after update 3.", GO_ON)


def trains(folder: Path) -> None:
    """As a training run does: SIGTERM makes it save."""
    asked = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: asked.set())
    begun(folder)
    assert asked.wait(60)
    (folder / "saved").touch()


def piece(
    tmp_path: Path, name: str, work: Callable[[Path], None] = works, needs: tuple[str, ...] = (), kind: Kind = "attempt"
) -> Step:
    folder = tmp_path / name
    return Step(f"key of {name}", kind, name, folder, tuple(f"key of {need}" for need in needs), partial(work, folder))


def states(steps: list[Step], progress: Progress) -> dict[str, str]:
    return {step.title: progress.states[step.key] for step in steps}


def test_nothing_is_done_twice_and_needs_come_first(tmp_path: Path) -> None:
    steps = [piece(tmp_path, "parent", kind="parent"), piece(tmp_path, "a", needs=("parent",)), piece(tmp_path, "b")]
    progress = run(steps, LocalWorkers(1))
    assert set(states(steps, progress).values()) == {"done"}
    assert progress.seconds.keys() == progress.states.keys()
    again = run([*steps, piece(tmp_path, "new", needs=("a",))], LocalWorkers(1))
    assert again.count("done") == 4
    assert [times(step) for step in steps] == [1, 1, 1]
    assert again.seconds.items() >= progress.seconds.items()


def test_what_a_piece_used_is_kept_with_it_where_it_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Known:
        joules = 7.5

        def __enter__(self) -> Known:
            return self

        def __exit__(self, *_: object) -> None:
            pass

    unknown = piece(tmp_path, "unknown")
    unknown_too = run([unknown], LocalWorkers(1))
    with monkeypatch.context() as patch:
        patch.setattr(engine, "Meter", Known)
        known = piece(tmp_path, "known")
        run([known], LocalWorkers(1))
    again = run([unknown, known], LocalWorkers(1))
    assert again.joules == {**unknown_too.joules, known.key: 7.5}


def test_a_piece_without_its_mark_key_or_predictions_is_not_done(tmp_path: Path) -> None:
    step = piece(tmp_path, "a")
    assert not is_done(step)
    run([step], LocalWorkers(1))
    assert is_done(step)
    for text in ("", "[]", '{"key": "another", "seconds": 1}'):
        (step.folder / DONE).write_text(text)
        assert not is_done(step)
    run([step], LocalWorkers(1))
    predictions_in(step.folder, "word list").unlink()
    assert not is_done(step)


def test_what_only_served_finished_pieces_is_not_made_again(tmp_path: Path) -> None:
    steps = [
        piece(tmp_path, "parent", kind="parent"),
        piece(tmp_path, "posteriors", needs=("parent",), kind="posteriors"),
        piece(tmp_path, "a", needs=("posteriors",)),
    ]
    run(steps, LocalWorkers(1))
    (steps[1].folder / DONE).unlink()  # the user needed the space
    assert states(steps, run(steps, LocalWorkers(1))) == {"parent": "done", "posteriors": "not needed", "a": "done"}
    steps.append(piece(tmp_path, "b", needs=("posteriors",)))
    assert set(states(steps, run(steps, LocalWorkers(1))).values()) == {"done"}
    assert [times(step) for step in steps] == [1, 2, 1, 1]


def test_a_failed_piece_stops_only_what_needs_it(tmp_path: Path) -> None:
    steps = [
        piece(tmp_path, "teacher", fails, kind="teacher"),
        piece(tmp_path, "targets", needs=("teacher",), kind="targets"),
        piece(tmp_path, "student", needs=("targets",)),
        piece(tmp_path, "scratch"),
    ]
    progress = run(steps, LocalWorkers(1))
    assert states(steps, progress) == {
        "teacher": "failed", "targets": "left out", "student": "left out", "scratch": "done"
    }  # fmt: skip
    assert progress.errors["key of teacher"] == "t1 was heard. Hold it out."
    assert progress.errors["key of student"] == "needs 'teacher', which failed"
    mended = [piece(tmp_path, "teacher", kind="teacher"), *steps[1:]]
    assert set(states(steps, run(mended, LocalWorkers(1))).values()) == {"done"}
    assert times(steps[3]) == 1


def test_what_does_not_fit_is_left_out_with_what_needs_it_and_a_later_call_does_it(tmp_path: Path) -> None:
    steps = [
        piece(tmp_path, "parent", kind="parent"), piece(tmp_path, "a", needs=("parent",)),
        piece(tmp_path, "targets", kind="targets"), piece(tmp_path, "b", needs=("targets",)),
    ]  # fmt: skip
    progress = run(steps, LocalWorkers(1), fits=lambda step, progress: step.kind != "targets")
    assert states(steps, progress) == {"parent": "done", "a": "done", "targets": "left out", "b": "left out"}
    assert progress.errors == {}
    assert run(steps, LocalWorkers(1)).count("done") == 4


def test_in_one_process_a_request_to_stop_ends_the_study_and_fails_nothing(tmp_path: Path) -> None:
    steps = [piece(tmp_path, "a", partial(is_asked_to_stop, 1)), piece(tmp_path, "b")]
    seen: list[dict[str, str]] = []
    with pytest.raises(InterruptedRunError):
        run(steps, LocalWorkers(1), watch=lambda progress: seen.append(states(steps, progress)))
    assert seen[-1] == {"a": "running", "b": "waiting"}
    assert run(steps, LocalWorkers(1)).count("done") == 2


@pytest.mark.slow
def test_a_killed_worker_costs_its_own_piece_a_start_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "MOST_LOSSES", 2)  # every start costs an import of torch
    workers = LocalWorkers(2)
    steps = [
        piece(tmp_path, "killed once", partial(dies, 1, signal.SIGKILL)),
        piece(tmp_path, "neighbour", partial(dies, 0, signal.SIGKILL)),
        piece(tmp_path, "asked to stop", partial(is_asked_to_stop, 1)),
        piece(tmp_path, "always killed", partial(dies, 99, signal.SIGKILL)),
        piece(tmp_path, "needs it", needs=("always killed",)),
        piece(tmp_path, "error", fails),
        piece(tmp_path, "last"),
    ]
    try:
        progress = run(steps, workers)
    finally:
        workers.close()
    assert [times(step) for step in steps] == [2, 1, 2, 3, 0, 1, 1]
    assert list(states(steps, progress).values()) == ["done", "done", "done", "failed", "left out", "failed", "done"]
    assert "The worker of 'always killed' was killed 3 times" in progress.errors["key of always killed"]
    assert progress.errors["key of error"] == "t1 was heard. Hold it out."


@pytest.mark.slow
def test_closing_lets_training_save_and_leaves_no_process(tmp_path: Path) -> None:
    workers = LocalWorkers(2)
    step = piece(tmp_path, "a", trains)
    workers.submit(step)
    while not times(step):
        time.sleep(0.05)
    workers.close()
    assert (step.folder / "saved").is_file()
    process = int((step.folder / "begun").read_text().split()[1])
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)
