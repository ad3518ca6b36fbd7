"""A study from its file to its answers: never twice, resumed anywhere, honest about what failed or did not fit."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import soundfile
import yaml

from cli_calls import call, done, refused
from tiny_corpus import write_corpus
from tiny_study import CONFIG, CTC_KD, TRAIN, run_tiny, tiny_study
from xded.corpus.manifest import Corpus, read_corpus, write_manifest
from xded.errors import ConfigError, CorpusError
from xded.findings import Finding
from xded.models.checkpoints import sha256_of
from xded.report.study_tables import tables_of
from xded.scoring import read_predictions
from xded.study import pieces, planner
from xded.study import run as study_run
from xded.study.folder import STATE, locked
from xded.study.plan import Study, StudyError
from xded.study.run import read_study, run_study, to_yaml
from xded.training import loggers
from xded.training.job import Job
from xded.training.loop import CollapsedRunError

NAN = {"set": {"train.stages": [{"epochs": 2, "peak_lr": 1e30}], "train.gradient_clip": 1e30}}
FOUR: dict[str, Any] = {
    "included": {"include_held_out": True, **CTC_KD}, "held out": CTC_KD, "scratch": {}, "parent's": {"start": "parent"}
}  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return write_corpus(tmp_path_factory.mktemp("corpus"), controls=("c1", "c2"), targets=("t1", "t2", "t3"))


def tables(out: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted((out / "tables").glob("*.csv"))}


def written(study: Study, path: Path) -> Path:
    path.write_text(to_yaml(study))
    return path


def no_training(job: Job, **_: Any) -> None:
    pytest.fail(f"{job.name} was trained again")


def test_every_result_comes_from_its_own_run_and_nothing_is_done_twice(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = tiny_study(corpus, FOUR, held_out=["t1"], seeds=[0, 1], baselines=True)
    outcome = run_tiny(study, tmp_path)
    attempts = {r.system: r for r in outcome.results if r.source == "attempt"}
    assert list(attempts) == list(FOUR)
    for name, result in attempts.items():
        said = result.of("open")
        assert {p.speaker for p in said} == {"t1"}
        assert {p.seed for p in said} == {0, 1}
        assert len({p.take for p in said}) == (4 if name == "included" else 8)  # it hears the other half
        assert len(result.runs) == 2
    baselines = {r.system for r in outcome.results if r.source == "baseline"}
    assert baselines == {"parent", "teacher t2", "teacher t3"}
    monkeypatch.setattr(pieces, "fit", no_training)
    again = run_tiny(study, tmp_path)
    assert again.results == outcome.results
    one = outcome.work.cells[0]
    one.predictions("open").unlink()  # what is missing is made again, from the trained run
    monkeypatch.setattr(pieces, "fit", lambda job, **_: job.out / "best.pt")
    assert run_tiny(study, tmp_path).results == outcome.results
    assert read_study(tmp_path).results == outcome.results


def test_an_added_attempt_trains_only_itself(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_tiny(tiny_study(corpus, {"a": CTC_KD}, held_out=["t1"]), tmp_path)
    trained: list[str] = []
    fit = pieces.fit
    monkeypatch.setattr(pieces, "fit", lambda job, **more: (trained.append(job.name), fit(job, **more))[1])
    run_tiny(tiny_study(corpus, {"a": CTC_KD, "b": {}}, held_out=["t1"], name="another"), tmp_path)
    assert trained == ["b"]


def test_a_failed_attempt_is_named_the_others_go_on_and_the_exit_is_not_zero(corpus: Corpus, tmp_path: Path) -> None:
    study = tiny_study(corpus, {"bad": NAN, "good": {}}, held_out=["t1"])
    path = written(study, tmp_path / "s.yaml")
    called = call("study", "run", path, "--out", tmp_path / "out", "--jobs", 1)
    assert called.code == 1
    assert "1 of 2 pieces failed" in called.err
    assert "xded study run" in called.err
    assert "1 pieces failed: bad, t1, seed 0" in called.out
    assert "good" in (tmp_path / "out" / "report.md").read_text()
    assert read_study(tmp_path / "out").state == "failed"
    mended = tiny_study(corpus, {"bad": {}, "good": {}}, held_out=["t1"])
    assert run_tiny(mended, tmp_path / "out").state == "finished"


def test_a_collapsed_run_is_tested_as_it_is(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit = pieces.fit

    def collapse(job: Job, **more: Any) -> None:
        fit(job, **more)
        raise CollapsedRunError(Finding("collapse", "refuse", job.name, "It says nothing.", "So what.", "Stop."))

    monkeypatch.setattr(pieces, "fit", collapse)
    outcome = run_tiny(tiny_study(corpus, {"a": {}}, held_out=["t1"]), tmp_path)
    assert len(outcome.results[0].of("open")) == 8
    with monkeypatch.context() as patch:
        patch.setattr(pieces, "fit", no_training)
        run_tiny(tiny_study(corpus, {"a": {}}, held_out=["t1"]), tmp_path)
    parented = run_study(tiny_study(corpus, {"a": {"start": "parent"}}, held_out=["t1"]), tmp_path / "p")
    assert set(parented.progress.states.values()) == {"failed", "left out"}  # a parent that says nothing is no parent


def test_a_spent_budget_leaves_attempts_out_and_a_later_call_does_them(corpus: Corpus, tmp_path: Path) -> None:
    attempts = {"a": {}, "b": {"set": {"augment.noise": 0.0}}}
    none = tiny_study(corpus, attempts, held_out=["t1"], budget={"minutes": 1e-9})
    path = written(none, tmp_path / "s.yaml")
    called = done("study", "run", path, "--out", tmp_path / "out", "--jobs", 1)
    assert "2 pieces left out: a, t1, seed 0; b, t1, seed 0" in called.out
    all_of_it = run_tiny(tiny_study(corpus, attempts, held_out=["t1"], budget={"minutes": 60}), tmp_path / "out")
    assert all_of_it.progress.count("done") == 2


def test_a_piece_is_begun_only_when_one_of_its_kind_is_known_to_fit(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_tiny(tiny_study(corpus, {"a": {}}, held_out=["t1"]), tmp_path)
    (mark,) = (tmp_path / "pieces" / "runs").glob("*/done.json")
    mark.write_text(json.dumps({**json.loads(mark.read_text()), "seconds": 100.0}))
    more = {"a": {}, "b": {"set": {"augment.noise": 0.0}}}
    tight = run_study(tiny_study(corpus, more, held_out=["t1"], budget={"minutes": 1.5}), tmp_path)
    assert list(tight.progress.states.values()) == ["done", "left out"]
    run_tiny(tiny_study(corpus, more, held_out=["t1"], budget={"minutes": 3}), tmp_path)


def test_time_left_is_what_is_known_of_each_kind_over_the_workers(corpus: Corpus, tmp_path: Path) -> None:
    study = tiny_study(corpus, {"a": {}, "b": {"set": {"augment.noise": 0.0}}}, held_out=["t1", "t2"])
    work = planner.Planner(study, corpus, tmp_path).plan()
    watcher = study_run._Watcher(study, work, tmp_path, print, 2)
    progress = study_run.Progress(dict.fromkeys((s.key for s in work.steps), "waiting"))
    assert watcher.left_s(progress) is None
    first = work.steps[0].key
    progress.states[first], progress.seconds[first] = "done", 10.0
    assert watcher.left_s(progress) == pytest.approx(3 * 10.0 / 2)


def test_time_left_is_unknown_until_every_kind_of_training_is_known(corpus: Corpus, tmp_path: Path) -> None:
    study = tiny_study(corpus, {"a": {"start": "parent"}, "b": CTC_KD}, held_out=["t1"])
    work = planner.Planner(study, corpus, tmp_path).plan()
    watcher = study_run._Watcher(study, work, tmp_path, print, 1)
    progress = study_run.Progress(dict.fromkeys((s.key for s in work.steps), "waiting"))
    of_kind = {kind: [s for s in work.steps if s.kind == kind] for kind in ("parent", "teacher", "attempt")}
    for kind, seconds in (("parent", 40.0), ("teacher", 2.0)):  # an attempt is neither
        for step in of_kind[kind]:
            progress.states[step.key], progress.seconds[step.key] = "done", seconds
    assert watcher.left_s(progress) is None
    assert "not known yet" in watcher._left(progress)
    at_work = of_kind["attempt"][0]
    progress.states[at_work.key] = "running"
    at_work.folder.mkdir(parents=True)
    status = {"state": "running", "pid": os.getpid(), "host": platform.node(), "started": "2026-01-01T10:00:00+00:00"}
    (at_work.folder / "status.json").write_text(json.dumps(status))
    assert watcher.left_s(progress) is None  # it has made no step
    status["expected_finish"] = "2026-01-01T10:01:00+00:00"
    (at_work.folder / "status.json").write_text(json.dumps(status))
    rest = len(work.steps) - 1 - len(of_kind["teacher"]) - 2  # posteriors and targets
    assert watcher.left_s(progress) == pytest.approx(2 * 60.0 + rest * (40.0 + 2.0 + 60.0) / 3)
    progress.states[at_work.key], progress.seconds[at_work.key] = "done", 30.0
    assert watcher.left_s(progress) == pytest.approx(30.0 + rest * (40.0 + 2.0 + 30.0) / 3)


@pytest.mark.parametrize("section", ["train", "teach.parent", "teach.teacher"])
def test_a_missing_logger_is_said_before_any_training(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, section: str
) -> None:
    monkeypatch.setattr(loggers, "find_spec", lambda package: None)
    monkeypatch.setattr(pieces, "fit", no_training)
    study = tiny_study(corpus, {"a": {}, "b": {"set": {f"{section}.loggers": ["wandb"]}}}, held_out=["t1"])
    with pytest.raises(ConfigError, match=r"wandb, which is not installed.*pip install wandb"):
        run_study(study, tmp_path / "out")
    assert not (tmp_path / "out" / STATE).exists()


def test_another_process_is_not_disturbed(corpus: Corpus, tmp_path: Path) -> None:
    path = written(tiny_study(corpus, {"a": {}}, held_out=["t1"]), tmp_path / "s.yaml")
    with locked(tmp_path / "out"):
        refused(
            call("study", "run", path, "--out", tmp_path / "out", "--jobs", 1), 2,
            f"worked on by process {os.getpid()}", "xded status", "--watch",
        )  # fmt: skip
        assert [file.name for file in (tmp_path / "out").iterdir()] == ["lock.json"]


def test_a_folder_of_another_version_is_refused_before_anything_is_written(corpus: Corpus, tmp_path: Path) -> None:
    path = written(tiny_study(corpus, {"a": {}}, held_out=["t1"]), tmp_path / "s.yaml")
    out = tmp_path / "out"
    out.mkdir()
    (out / STATE).write_text(json.dumps({"format": 99, "state": "finished", "pieces": []}))
    refused(call("study", "run", path, "--out", out, "--jobs", 1), 2, "another version of xded", "format 99")
    assert [file.name for file in out.iterdir()] == [STATE]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"held_out": ["T1"]}, "did you mean 't1'"),
        ({"attempts": {"a": {**CTC_KD, "teachers": ["t9"]}}}, "no speaker 't9'"),
        ({"attempts": {"a": {"set": {"objective.ctc_kd": 1.0, "target.heard": "same_prompt"}}}}, "ctc_kd needs heard"),
        ({"corpus": "nowhere"}, "no manifest can be read"),
        ({"hypotheses": {"h": {"attempt": "b", "above": 5}}}, "does not have"),
    ],
)
def test_bad_input_is_refused_before_any_training(
    corpus: Corpus, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    data = yaml.safe_load(to_yaml(tiny_study(corpus, {"a": {}}, held_out=["t1"])))
    path = tmp_path / "s.yaml"
    path.write_text(yaml.safe_dump({**data, **change}))
    refused(call("study", "run", path, "--out", tmp_path / "out", "--jobs", 1), 2, said)
    assert not list((tmp_path / "out").rglob("status.json"))


def test_flags_replace_the_corpus_and_the_folds_of_a_file(corpus: Corpus, tmp_path: Path) -> None:
    path = written(tiny_study(corpus, {"a": {}}).model_copy(update={"corpus": Path("nowhere")}), tmp_path / "s.yaml")
    out = tmp_path / "out"
    done("study", "run", path, "--out", out, "--jobs", 1, "--corpus", corpus.path.parent, "--held-out", "t2", "--json")
    kept = yaml.safe_load((out / "study.yaml").read_text())
    assert kept["held_out"] == ["t2"]
    assert Path(kept["corpus"]).is_absolute()
    assert [cell["held_out"] for cell in json.loads((out / STATE).read_text())["cells"]] == [["t2"]]


def test_another_corpus_under_a_study_is_said_and_its_old_pieces_are_kept(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", targets=("t1", "t2"))
    hashed = [r.model_copy(update={"audio_sha256": sha256_of(r.audio_filepath)}) for r in corpus.recordings]
    write_manifest(corpus.path, hashed)
    study, out = tiny_study(corpus, {"a": {}}, held_out=["t1"]), tmp_path / "out"
    run_tiny(study, out)
    changed = hashed[0].audio_filepath
    samples, rate = soundfile.read(changed)
    soundfile.write(changed, -samples, rate, subtype="PCM_16")
    later = corpus.path.stat().st_mtime + 10
    os.utime(changed, (later, later))
    with pytest.raises(CorpusError, match=r"1 audio files .* are not what it says, such as .*\.wav"):
        run_study(study, out)
    write_manifest(corpus.path, [hashed[0].model_copy(update={"audio_sha256": sha256_of(changed)}), *hashed[1:]])
    with pytest.raises(StudyError, match=r"1 finished pieces, such as 'a, t1, seed 0', are not those of its study"):
        read_study(out)
    said: list[str] = []
    run_tiny(study, out, say=said.append)
    assert "1 finished pieces, such as 'a, t1, seed 0', are for another corpus" in said[0]
    assert len(list((out / "pieces" / "runs").iterdir())) == 2
    assert read_corpus(corpus.path).recordings[0].audio_sha256 == sha256_of(changed)


@pytest.mark.slow
def test_a_study_that_is_killed_goes_on_from_the_checkpoint_to_the_same_end(corpus: Corpus, tmp_path: Path) -> None:
    long = {**TRAIN, "stages": [{"epochs": 60, "peak_lr": 1e-3}], "save_every_steps": 5}
    study = tiny_study(corpus, {"a": {}}, held_out=["t1"], config={**CONFIG, "train": long})
    path, out = written(study, tmp_path / "s.yaml"), tmp_path / "out"
    command = [Path(sys.executable).parent / "xded", "study", "run", path, "--out", out, "--jobs", "1"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    while not list(out.glob("pieces/runs/*/latest.pt.sha256")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert (out / "lock.json").is_file()
    run_tiny(study, out)
    (metrics,) = out.glob("pieces/runs/*/metrics.jsonl")
    starts = [row for row in map(json.loads, metrics.read_text().splitlines()) if row["event"] == "start"]
    assert starts[-1]["resumed"]
    assert starts[-1]["update"] > 0
    whole = run_tiny(study, tmp_path / "unbroken")
    (resumed,) = out.glob("pieces/runs/*/predictions.jsonl")
    assert read_predictions(resumed) == whole.results[0].of("open")


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [1, 2])
def test_ctrl_c_saves_what_trains_says_how_to_go_on_and_frees_the_folder(
    corpus: Corpus, tmp_path: Path, jobs: int
) -> None:
    endless = {**TRAIN, "stages": [{"epochs": 9999, "peak_lr": 1e-3}], "save_every_steps": 10**6}
    attempts = {name: {"set": {"train.save_every_steps": 10**6 + n}} for n, name in enumerate("ab"[:jobs])}
    study = tiny_study(corpus, attempts, held_out=["t1"], config={**CONFIG, "train": endless})
    path, out = written(study, tmp_path / "s.yaml"), tmp_path / "out"
    command = [Path(sys.executable).parent / "xded", "study", "run", path, "--out", out, "--jobs", str(jobs)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True)
    while len(list(out.glob("pieces/runs/*/latest.pt.sha256"))) < jobs:  # of the first epoch
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error.decode() == (
        f"xded: Study tiny was stopped; what is finished is kept. Go on: xded study run {out}/study.yaml --out {out}\n"
    )
    assert not (out / "lock.json").exists()
    states = [json.loads(status.read_text())["state"] for status in out.glob("pieces/runs/*/status.json")]
    assert states == ["stopped"] * jobs


@pytest.mark.slow
def test_several_processes_give_the_same_table(corpus: Corpus, tmp_path: Path) -> None:
    study = tiny_study(corpus, FOUR, held_out=["t1", "t2"], baselines=True)
    path = written(study, tmp_path / "s.yaml")
    for jobs in (1, 2):
        done("study", "run", path, "--out", tmp_path / str(jobs), "--jobs", jobs)
    assert tables(tmp_path / "1") == tables(tmp_path / "2") != {}


def test_a_pretrained_encoder_starts_every_attempt_and_is_a_baseline_by_itself(corpus: Corpus, tmp_path: Path) -> None:
    archive = tmp_path / "encoder.nemo"
    archive.write_bytes((Path(__file__).parent / "data" / "nemo_golden.nemo").read_bytes())
    config = CONFIG | {"model": {"pretrained": str(archive), "size": None, "decoder_layers": 1}}
    study = tiny_study(corpus, {"plain": {}}, config=config, held_out=["t1"], baselines=True)
    outcome = run_tiny(study, tmp_path / "study")
    found = {result.system: result for result in outcome.results}
    assert found["pretrained, zero-shot"].of("open")
    caption = tables_of(study, outcome.results, corpus.texts, "open", "seen").main.caption
    assert "whom a pretrained encoder heard before is not on record" in caption
    status = json.loads((found["plain"].runs[0] / "status.json").read_text())
    assert status["loaded"]["of"] > 0
    keys = {step.key for step in outcome.work.steps}
    moved = tmp_path / "moved.nemo"
    archive.rename(moved)
    again = tiny_study(
        corpus, {"plain": {}}, held_out=["t1"], baselines=True,
        config=CONFIG | {"model": {"pretrained": str(moved), "size": None, "decoder_layers": 1}},
    )  # fmt: skip
    assert {step.key for step in planner.Planner(again, corpus, tmp_path / "study").plan().steps} == keys
