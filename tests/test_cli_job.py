"""The main job as a user runs it: corpus, teachers, targets, student, scores, texts and status."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from cli_calls import call, contents, done, refused
from tiny_corpus import MODEL
from xded.config import load
from xded.scoring import Scores, read_predictions, score
from xded.training.status import read_status

STAGE = {"stages": [{"epochs": 1, "peak_lr": 1e-3}], "threads": 1, "device": "cpu"}
CONFIG = {
    "model": MODEL,
    "objective": {"ctc_kd": 1.0},
    "train": STAGE,
    "teach": {"parent_on": "controls", "parent": STAGE, "teacher": STAGE},
}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus with speaker M08, a config of a tiny model, and what teach, targets and train make of them."""
    work = tmp_path_factory.mktemp("work")
    done("corpus", "synthesise", "--out", work / "words", "--controls", 1, "--targets", 3, "--words", 2, "--takes", 4)
    manifest = work / "words" / "manifest.jsonl"
    manifest.write_text(manifest.read_text().replace('"speaker": "T01"', '"speaker": "M08"'))
    (work / "tiny.yaml").write_text(yaml.safe_dump(CONFIG))
    done("teach", *of_fold(work), "--out", work / "teachers", "--jobs", 1)
    done("targets", *of_fold(work), "--teachers", work / "teachers", "--out", work / "targets", "--jobs", 1)
    kd = ("--ctc-kd", 1, "--decoder-kd", 0.5)
    trained = done("train", *of_fold(work), "--targets", work / "targets", *kd, "--out", work / "run", "--epochs", 2)
    assert trained.out.splitlines()[-1] == f"Test it: xded evaluate {work / 'run' / 'best.pt'} --held-out M08"
    assert "epoch 2 done: train loss" in trained.err
    return work


def of_fold(work: Path) -> tuple[object, ...]:
    return "--corpus", work / "words", "--held-out", "M08", "--config", work / "tiny.yaml"


def weights(folder: Path) -> dict[str, str]:
    return {name: digest for name, digest in contents(folder).items() if name.endswith(".pt")}


def test_run_folder_holds_what_a_person_looks_for(work: Path) -> None:
    run = work / "run"
    names = {"config.yaml", "env.json", "STATUS.md", "metrics.jsonl", "best.pt", "latest.pt", "train.log"}
    assert names <= set(contents(run))
    config = load(run / "config.yaml")
    assert (config.fold.held_out, config.objective.decoder_kd, config.targets) == (("M08",), 0.5, work / "targets")
    assert json.loads((run / "env.json").read_text())["command"][1] == "train"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows if row["event"] == "epoch"] == [1, 2]
    steps = [row for row in rows if row["event"] == "step"]
    assert {"loss", "ctc", "ctc_kd", "cross_entropy", "decoder_kd", "frames", "lr"} <= set(steps[0])
    text = (run / "STATUS.md").read_text()
    assert text == done("status", run).out
    for line in ("# student: finished", "held out: M08", "teachers: T02, T03", "checkpoints: best.pt, latest"):
        assert line in text
    assert re.search(r"([\d,]+) total, 0 frozen, \1 trainable, \1 really received a gradient", text)
    assert json.loads(done("status", run, "--json").out)["state"] == "finished"


def test_targets_say_how_much_they_cover(work: Path) -> None:
    made = json.loads(
        done(
            "targets", *of_fold(work), "--teachers", work / "teachers", "--out", work / "targets", "--jobs", 1, "--json"
        ).out
    )
    assert [made[kind]["teachers"] for kind in ("ctc", "decoder")] == [["T02", "T03"]] * 2
    assert made["ctc"]["recordings"] == made["ctc"]["of"] == 21  # 24 takes but for 3 of validation
    assert (work / "targets" / "tokenizer.model").read_bytes() == (work / "teachers" / "tokenizer.model").read_bytes()


def test_evaluate_as_the_study_calls_it(work: Path) -> None:
    tokenizer, output = work / "teachers" / "tokenizer.model", work / "scores" / "m08.json"
    words = ["evaluate", work / "run" / "best.pt", "--held-out", "M08", "--decode", "decoder", "--max-length", 10]
    words += ["--device", "cpu", "--tokenizer", tokenizer, "--output", output, "--samples", 50]
    called = done(*words)
    assert called.err == ""
    assert "speakers unseen, words seen, open word list, decode decoder greedy" in " ".join(called.out.split())
    scores = Scores.from_json(output.read_text())
    predictions = read_predictions(output.with_name("m08.predictions.jsonl"))
    assert {p.speaker for p in predictions} == {"M08"}
    conditions = dict(scores.conditions)
    again = score(
        predictions, normaliser=conditions.pop("normaliser"), word_list=["zero", "one"], conditions=conditions
    )
    assert again == scores
    assert Scores.from_json(done(*words, "--json").out) == scores
    drawn = Scores.from_json(done(*words, "--samples", 3, "--json").out)
    assert drawn.overall.takes == 3
    assert drawn.conditions["samples"] == "at most 3 takes, drawn at random"


def test_evaluate_on_a_gpu_that_is_not_there(work: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    before = contents(work / "run")
    refused(call("evaluate", work / "run" / "best.pt", "--device", "cuda"), 2, "device 'cuda'", "Use --device cpu")
    assert contents(work / "run") == before


def test_transcribe_says_what_evaluate_found(work: Path) -> None:
    done("evaluate", work / "run", "--word-list")
    found = {p.recording: p.hypothesis for p in read_predictions(work / "run" / "predictions.jsonl")}
    assert (work / "run" / "scores.json").is_file()
    rows = map(json.loads, (work / "words" / "manifest.jsonl").read_text().splitlines())
    audio = {str(work / "words" / row["audio_filepath"]): row["recording"] for row in rows if row["speaker"] == "M08"}
    (work / "list.txt").write_text("zero\n\none\n")
    words = (work / "run", *audio, "--word-list", work / "list.txt")
    said = done("transcribe", *words).out.splitlines()
    assert said == [f"{path}\t{found[recording]}" for path, recording in audio.items()]
    as_json = [json.loads(line) for line in done("transcribe", *words, "--json").out.splitlines()]
    assert [row["text"] for row in as_json] == list(found.values())
    called = call("transcribe", work / "run", work / "no.wav", next(iter(audio)))
    assert called.code == 3  # a bad file costs its line, not the others
    assert "no.wav cannot be read" in called.out.splitlines()[0]
    assert len(called.out.splitlines()) == 2


def test_a_second_teach_trains_nothing(work: Path) -> None:
    before = contents(work / "teachers")
    table = done("teach", *of_fold(work), "--out", work / "teachers", "--jobs", 2)
    assert contents(work / "teachers") == before
    assert "held out" in table.out
    assert "epoch" not in table.err
    matrix = json.loads(done("teach", *of_fold(work), "--out", work / "teachers", "--json").out)
    assert set(matrix) == {"T02", "T03", "vote", "any-teacher oracle"}
    assert set(matrix["vote"]) == {"M08", "T02", "T03", "held out"}


def test_scores_say_whether_the_speakers_were_heard(work: Path) -> None:
    output = work / "heard.json"
    heard = done("evaluate", work / "run", "--held-out", "T02", "--output", output)
    assert "has heard T02 (and 8 of the 8 tested takes): this is no test on an unheard speaker." in heard.err
    assert Scores.from_json(output.read_text()).conditions["speakers"] == "seen"
    mixed = done("evaluate", work / "run", "--held-out", "T02", "--held-out", "M08", "--output", output)
    assert "has heard T02 (" in mixed.err
    assert Scores.from_json(output.read_text()).conditions["speakers"] == "mixed"


def test_included_held_out_speaker_is_marked_as_seen(work: Path) -> None:
    run = work / "included"
    done("train", *of_fold(work), "--ctc-kd", 0, "--include-held-out", "--out", run)
    assert "held out: M08 (included)" in (run / "STATUS.md").read_text()
    called = done("evaluate", run, "--json")
    scores = Scores.from_json(called.out)
    assert (scores.conditions["speakers"], scores.overall.takes) == (
        "seen",
        4,
    )  # half of the takes are kept for the test
    assert "has heard M08 (and 0 of the 4 tested takes)" in called.err


def test_student_takes_the_tokenizer_of_its_targets(work: Path) -> None:
    """Without the control speech the prompts may differ, and a tokenizer trained on them would be another one."""
    (work / "bpe").mkdir()
    bpe = ("--set", "tokenizer.kind=bpe", "--set", "tokenizer.vocabulary=12")
    done("teach", *of_fold(work), *bpe, "--out", work / "bpe" / "teachers", "--jobs", 1)
    fold = (*of_fold(work), "--out", work / "bpe" / "targets")
    done("targets", *fold, "--teachers", work / "bpe" / "teachers", "--jobs", 1)
    done("train", *of_fold(work), "--targets", work / "bpe" / "targets", "--out", work / "bpe" / "run")
    tokenizers = [(work / "bpe" / name / "tokenizer.model").read_bytes() for name in ("teachers", "targets", "run")]
    assert tokenizers[0] == tokenizers[1] == tokenizers[2]


@pytest.mark.slow
def test_a_run_that_is_told_to_stop_goes_on_with_resume(work: Path) -> None:
    run = work / "stopped"
    words = ["train", *of_fold(work), "--ctc-kd", 0, "--epochs", 40, "--out", run]
    process = subprocess.Popen(
        [sys.executable, "-c", "from xded.cli import main; main()", *map(str, words)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        while not ((run / "metrics.jsonl").is_file() and '"epoch": 2' in (run / "metrics.jsonl").read_text()):
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130
    assert out == ""
    last = err.splitlines()[-1]
    assert re.fullmatch(r"xded: Stopped on request after update \d+\. Give the same command .* --resume .*", last)
    assert read_status(run)["state"] == "stopped"
    refused(call(*words), 2, f"{run} already holds a run.", "--resume")
    done("train", "--out", run, "--resume")  # the rest is in config.yaml
    assert read_status(run)["state"] == "finished"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows if row["event"] == "epoch"] == list(range(1, 41))
    after = weights(run)
    done("train", "--out", run, "--resume")
    assert weights(run) == after
