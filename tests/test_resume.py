"""`--resume`: wherever a run is killed, what comes out in the end is bit-identical to an unbroken run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny_corpus import job_for, write_corpus
from xded.corpus.manifest import Corpus
from xded.errors import EXIT_INTERRUPTED, CheckpointError, ConfigError
from xded.models import checkpoints
from xded.training import run, status
from xded.training.evaluation import validate
from xded.training.loop import InterruptedRunError, Loop
from xded.training.run import fit

PLAIN: dict[str, Any] = {
    "stages": [{"epochs": 3, "peak_lr": 1e-3}],
    "save_every_steps": 2,
    "checkpoint_every_epochs": 2,
}
# 14 recordings in batches of 3 are 5 batches an epoch: with 2 batches an update, epochs end within an update
ACCUMULATE = {**PLAIN, "accumulate": 2, "save_every_steps": 1}
TWO_STAGES = {
    **PLAIN,
    "stages": [{"epochs": 2, "peak_lr": 3e-3, "freeze_encoder": True}, {"epochs": 2, "peak_lr": 1e-3}],
}
# layer by layer: the subsampling and the layer thaw, and freeze again within an update
LAYERS = {
    **PLAIN,
    "stages": [{"epochs": 1, "peak_lr": 1e-3, "freeze_layers": n} for n in (1, 0, 1)],
    "accumulate": 2,
}
WORDS = {"sampler": "words", "speakers_per_word": 2, "batch_size": 4}
SETTINGS = {
    "plain": PLAIN,
    "accumulate": ACCUMULATE,
    "two stages": TWO_STAGES,
    "layer by layer": LAYERS,
    "words, ema": {**PLAIN, **WORDS, "stages": [{"epochs": 5, "peak_lr": 1e-3}], "average": "ema"},
    "last": {**ACCUMULATE, "average": "last", "average_last": 0.5},
}


class KilledError(BaseException):
    """Stands in for the end of the process."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def parent(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fit(job_for(corpus, tmp_path_factory.mktemp("parent")), quiet=True)


@pytest.fixture(scope="module")
def unbroken(corpus: Corpus, parent: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Run folder of an unbroken run with given settings, made once."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("unbroken")
            fit(job_for(corpus, made[name], train=settings_of(name, parent)), quiet=True)
        return made[name]

    return make


@pytest.fixture(autouse=True)
def every_update_in_the_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "METRICS_EVERY_UPDATES", 1)


def settings_of(name: str, parent: Path) -> dict[str, Any]:
    return {**SETTINGS[name], **({"init": parent} if name == "two stages" else {})}


# --- ways to end a run -----------------------------------------------------------------------------------

Kill = Callable[[pytest.MonkeyPatch], None]


def in_batch(number: int) -> Kill:
    """Before the update of a batch."""

    def kill(patch: pytest.MonkeyPatch) -> None:
        step = Loop.training_step

        def training_step(self: Loop, batch: Any, batch_idx: int) -> torch.Tensor:
            if self.number(batch_idx) == number:
                raise KilledError
            return step(self, batch, batch_idx)

        patch.setattr(Loop, "training_step", training_step)

    return kill


def in_validation(epoch: int) -> Kill:
    """At the end of an epoch, before anything is saved."""

    def kill(patch: pytest.MonkeyPatch) -> None:
        calls = iter(range(1, 100))

        def validating(*args: Any, **named: Any) -> dict[str, float]:
            if next(calls) == epoch:
                raise KilledError
            return validate(*args, **named)

        patch.setattr(run, "validate", validating)

    return kill


def after_saving(name: str, count: int) -> Kill:
    """Just after a file was saved for the n-th time."""

    def kill(patch: pytest.MonkeyPatch) -> None:
        save, calls = Loop.save, iter(range(1, 100))

        def saving(self: Loop, path: Path, number: int) -> None:
            save(self, path, number)
            if path.name == name and next(calls) == count:
                raise KilledError

        patch.setattr(Loop, "save", saving)

    return kill


def while_renaming(count: int) -> Kill:
    """Within the saving of latest.pt: before the n-th rename of a checkpoint or its hash."""

    def kill(patch: pytest.MonkeyPatch) -> None:
        replace, calls = Path.replace, iter(range(1, 1000))

        def replacing(self: Path, target: Path) -> Path:
            if self.name.startswith("latest") and next(calls) == count:
                raise KilledError
            return replace(self, target)

        patch.setattr(Path, "replace", replacing)

    return kill


def break_and_resume(job: Any, monkeypatch: pytest.MonkeyPatch, *kills: Kill) -> None:
    for number, kill in enumerate(kills):
        with monkeypatch.context() as patch:
            kill(patch)
            with pytest.raises(KilledError):
                fit(job, resume=number > 0, quiet=True)
    fit(job, resume=True, quiet=True)


# --- what has to be the same -----------------------------------------------------------------------------


def assert_same(one: Any, other: Any, place: str) -> None:
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), place
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), place
        for key in one:
            assert_same(one[key], other[key], f"{place}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), place
        for number, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, f"{place}[{number}]")
    else:
        assert one == other or one != one, place


def measured(run: Path) -> list[str]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [line for line in lines if '"event": "start"' not in line]


def assert_identical_runs(one: Path, other: Path) -> None:
    """Weights, optimiser state and scores of every checkpoint, and every line of the metrics but the starts."""
    names = sorted(path.name for path in one.glob("*.pt") if path.name != "latest.previous.pt")
    assert names == sorted(path.name for path in other.glob("*.pt") if path.name != "latest.previous.pt")
    for name in names:
        first, second = checkpoints.load(one / name), checkpoints.load(other / name)
        for key in ("model_state_dict", "best", "sums", "last_epoch", "batch", "with_gradient"):
            assert key in first
        assert ("optimizer_states" in first) == (name == "latest.pt")  # best.pt is used, not gone on with
        assert_same(first, second, name)
    assert measured(one) == measured(other)
    assert (one / "data.json").read_text() == (other / "data.json").read_text()
    for key in ("state", "parameters", "best", "last_epoch", "update"):
        assert status.read_status(one)[key] == status.read_status(other)[key], key


# --- tests ------------------------------------------------------------------------------------------------


def test_two_unbroken_runs_are_identical_and_another_seed_is_not(
    corpus: Corpus, unbroken: Callable[[str], Path], tmp_path: Path
) -> None:
    """Otherwise the comparisons below would prove nothing."""
    fit(job_for(corpus, tmp_path / "again", train=PLAIN), quiet=True)
    assert_identical_runs(unbroken("plain"), tmp_path / "again")
    fit(job_for(corpus, tmp_path / "seed", train=PLAIN, seed=1), quiet=True)
    with pytest.raises(AssertionError):
        assert_identical_runs(unbroken("plain"), tmp_path / "seed")


@pytest.mark.parametrize(
    ("name", "kill"),
    [
        pytest.param("plain", in_batch(0), marks=pytest.mark.slow),  # before anything is saved
        ("plain", in_batch(3)),
        pytest.param("plain", in_batch(9), marks=pytest.mark.slow),
        pytest.param("plain", in_validation(1), marks=pytest.mark.slow),
        ("plain", in_validation(2)),
        ("plain", after_saving("best.pt", 1)),
        pytest.param("plain", after_saving("checkpoint_epoch_2.pt", 1), marks=pytest.mark.slow),
        pytest.param("plain", after_saving("latest.pt", 1), marks=pytest.mark.slow),
        pytest.param("plain", after_saving("latest.pt", 6), marks=pytest.mark.slow),
        ("plain", after_saving("latest.pt", 8)),  # the last one: only the status is missing
        pytest.param("accumulate", in_batch(3), marks=pytest.mark.slow),  # the second batch of an update
        pytest.param("accumulate", in_batch(5), marks=pytest.mark.slow),  # after an epoch that ended in an update
        pytest.param("accumulate", in_validation(1), marks=pytest.mark.slow),
        ("accumulate", after_saving("best.pt", 1)),
        pytest.param("accumulate", after_saving("latest.pt", 4), marks=pytest.mark.slow),
        ("two stages", in_batch(3)),  # in the frozen stage
        pytest.param("two stages", in_batch(10), marks=pytest.mark.slow),  # the first batch after it
        pytest.param("two stages", in_validation(2), marks=pytest.mark.slow),
        pytest.param("two stages", after_saving("latest.pt", 9), marks=pytest.mark.slow),
        ("layer by layer", in_batch(7)),
        pytest.param("layer by layer", in_batch(12), marks=pytest.mark.slow),
        ("words, ema", in_batch(5)),
        pytest.param("words, ema", in_validation(2), marks=pytest.mark.slow),
        pytest.param("last", in_batch(5), marks=pytest.mark.slow),  # before its mean begins
        ("last", in_batch(13)),
        pytest.param("last", in_validation(3), marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_ends_like_an_unbroken_one(
    corpus: Corpus,
    parent: Path,
    unbroken: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    kill: Kill,
) -> None:
    break_and_resume(job_for(corpus, tmp_path / "run", train=settings_of(name, parent)), monkeypatch, kill)
    assert_identical_runs(unbroken(name), tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "kill"),
    [
        ({**WORDS, "stages": [{"epochs": 1, "peak_lr": 1e-3}]}, in_batch(2)),  # not everyone is served at all
        ({**WORDS, "speakers_per_word": 4, "stages": [{"epochs": 2, "peak_lr": 1e-3}]}, in_batch(5)),
        ({"stages": [{"epochs": 1, "peak_lr": 1e-3}]}, in_batch(3)),
    ],
)
def test_a_run_says_whom_it_heard_though_no_process_was_served_everyone(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], kill: Kill
) -> None:
    fit(job_for(corpus, tmp_path / "unbroken", train={**PLAIN, **changes}), quiet=True)
    break_and_resume(job_for(corpus, tmp_path / "run", train={**PLAIN, **changes}), monkeypatch, kill)
    assert_identical_runs(tmp_path / "unbroken", tmp_path / "run")


@pytest.mark.slow
def test_a_run_killed_again_and_again(
    corpus: Corpus, parent: Path, unbroken: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kills = [in_batch(3), in_batch(4), after_saving("best.pt", 1), in_batch(11), in_batch(19)]
    break_and_resume(job_for(corpus, tmp_path / "run", train=settings_of("two stages", parent)), monkeypatch, *kills)
    assert_identical_runs(unbroken("two stages"), tmp_path / "run")


@pytest.mark.parametrize("count", [6, *(pytest.param(n, marks=pytest.mark.slow) for n in (5, 7, 8))])
def test_a_run_killed_within_a_save(
    corpus: Corpus, unbroken: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """At each of the renames that put a checkpoint, its predecessor and their hashes in place."""
    break_and_resume(job_for(corpus, tmp_path / "run", train=PLAIN), monkeypatch, while_renaming(count))
    assert_identical_runs(unbroken("plain"), tmp_path / "run")


@pytest.mark.parametrize(
    ("name", "number", "how"),
    [
        ("plain", 6, "event"),
        ("accumulate", 6, "SIGTERM"),  # the first batch of an update
        ("two stages", 3, "SIGINT"),
        pytest.param("plain", 6, "SIGTERM", marks=pytest.mark.slow),
        pytest.param("accumulate", 7, "SIGTERM", marks=pytest.mark.slow),
    ],
)
def test_a_run_asked_to_stop_finishes_the_update_saves_and_goes_on(
    corpus: Corpus,
    parent: Path,
    unbroken: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    number: int,
    how: str,
) -> None:
    step = Loop.training_step

    def training_step(self: Loop, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.number(batch_idx) == number and how == "event":
            self.stop_requested.set()
        elif self.number(batch_idx) == number:
            os.kill(os.getpid(), getattr(signal, how))
        return step(self, batch, batch_idx)

    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    job = job_for(corpus, tmp_path / "run", train={**settings_of(name, parent), "save_every_steps": 100})
    with monkeypatch.context() as patch:
        patch.setattr(Loop, "training_step", training_step)
        with pytest.raises(
            InterruptedRunError, match=r"Stopped on request after update \d+\. Give the same command again; .* --resume"
        ):
            fit(job, quiet=True)
    assert InterruptedRunError.exit_code == EXIT_INTERRUPTED
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    last = checkpoints.load(tmp_path / "run" / "latest.pt")["batch"]
    assert last == (7 if name == "accumulate" else number)  # the update under way was finished and saved
    assert status.read_status(tmp_path / "run")["state"] == "stopped"
    fit(job, resume=True, quiet=True)
    expected = checkpoints.load(unbroken(name) / "latest.pt")
    found = checkpoints.load(tmp_path / "run" / "latest.pt")
    for key in ("model_state_dict", "optimizer_states", "best", "sums", "batch"):
        assert_same(expected[key], found[key], key)


def test_a_second_request_stops_at_once_and_says_how_to_go_on(
    corpus: Corpus, unbroken: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Loop.training_step

    def training_step(self: Loop, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.number(batch_idx) == 7:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, batch, batch_idx)

    job = job_for(corpus, tmp_path / "run", train=PLAIN)
    with monkeypatch.context() as patch:
        patch.setattr(Loop, "training_step", training_step)
        with pytest.raises(InterruptedRunError, match="Stopped at once"):
            fit(job, quiet=True)
    fit(job, resume=True, quiet=True)
    assert_identical_runs(unbroken("plain"), tmp_path / "run")


def flip_one_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_damaged_latest_is_named_and_its_predecessor_used(
    corpus: Corpus, unbroken: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    job = job_for(corpus, out, train=PLAIN)
    with monkeypatch.context() as patch:
        in_batch(9)(patch)
        with pytest.raises(KilledError):
            fit(job, quiet=True)
    flip_one_bit(out / "latest.pt")
    fit(job, resume=True, quiet=True)
    assert f"{out / 'latest.pt'} is damaged" in (out / "train.log").read_text()
    assert "Going on from latest.previous.pt" in (out / "train.log").read_text()
    assert_identical_runs(unbroken("plain"), out)


def test_two_damaged_checkpoints_are_an_error_that_loses_nothing(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    job = job_for(corpus, out, train=PLAIN)
    with monkeypatch.context() as patch:
        in_batch(9)(patch)
        with pytest.raises(KilledError):
            fit(job, quiet=True)
    flip_one_bit(out / "latest.pt")
    flip_one_bit(out / "latest.previous.pt")
    before = {path.name: path.read_bytes() for path in out.glob("*.pt*")}
    with pytest.raises(CheckpointError, match=r"latest.previous.pt is damaged.*xded status"):
        fit(job, resume=True, quiet=True)
    assert {path.name: path.read_bytes() for path in out.glob("*.pt*")} == before


def test_a_finished_run_is_kept_and_never_trained_again(
    corpus: Corpus, unbroken: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = unbroken("plain")
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    monkeypatch.setattr(run, "Student", None)  # anything that builds a model would fail
    assert fit(job_for(corpus, out, train=PLAIN), resume=True, quiet=True) == out / "best.pt"
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_an_existing_run_without_resume_is_refused(corpus: Corpus, unbroken: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigError, match="already holds a run") as error:
        fit(job_for(corpus, unbroken("plain"), train=PLAIN), quiet=True)
    assert "--resume" in error.value.remedy


@pytest.mark.parametrize("finished", [True, False])
def test_another_config_is_refused_naming_what_changed(
    corpus: Corpus, unbroken: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: bool
) -> None:
    out = unbroken("plain") if finished else tmp_path / "run"
    if not finished:
        with monkeypatch.context() as patch:
            in_batch(9)(patch)
            with pytest.raises(KilledError):
                fit(job_for(corpus, out, train=PLAIN), quiet=True)
    with pytest.raises(ConfigError, match=r"train.batch_size was 3, now 4") as error:
        fit(job_for(corpus, out, train={**PLAIN, "batch_size": 4}), resume=True, quiet=True)
    assert str(out / "config.yaml") in error.value.remedy
    fit(job_for(corpus, out, train={**PLAIN, "threads": 1, "device": "auto"}), resume=True, quiet=True)


def test_other_recordings_are_refused(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = job_for(corpus, tmp_path / "run", train=PLAIN)
    with monkeypatch.context() as patch:
        in_batch(9)(patch)
        with pytest.raises(KilledError):
            fit(job, quiet=True)
    job.train = job.train[1:]
    with pytest.raises(ConfigError, match="started with other recordings"):
        fit(job, resume=True, quiet=True)


SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from tiny_corpus import job_for
from xded.corpus.manifest import read_corpus
from xded.training import status
from xded.training.run import fit
status.METRICS_EVERY_UPDATES = 1
train = {"stages": [{"epochs": int(sys.argv[4]), "peak_lr": 1e-3}], "save_every_steps": 2}
fit(job_for(read_corpus(Path(sys.argv[2])), Path(sys.argv[3]), train=train), quiet=True)
"""


@pytest.mark.slow
def test_a_real_process_killed_by_sigkill(corpus: Corpus, tmp_path: Path) -> None:
    epochs, out = 16, tmp_path / "run"
    arguments = [str(Path(__file__).parent), str(corpus.path), str(out), str(epochs)]
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, *arguments], env={**os.environ, "OMP_NUM_THREADS": "1"})
    metrics, deadline = out / "metrics.jsonl", time.monotonic() + 60
    while not (metrics.is_file() and metrics.read_text().count("\n") > 12):
        assert process.poll() is None, "the run ended by itself"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert json.loads((out / "status.json").read_text())["state"] == "running"
    assert status.read_status(out)["state"] == "killed"
    train = {"stages": [{"epochs": epochs, "peak_lr": 1e-3}], "save_every_steps": 2}
    for folder, resume in (("run", True), ("unbroken", False)):
        fit(job_for(corpus, tmp_path / folder, train=train), resume=resume, quiet=True)
    assert_identical_runs(tmp_path / "unbroken", out)
