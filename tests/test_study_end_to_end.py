"""The built-in question answered three times: a broken training, a far speaker, an evaluation that is off by one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import soundfile
import soxr
import torch

from xded.audio import read_audio
from xded.config import DecodeConfig
from xded.corpus.manifest import read_corpus, write_manifest
from xded.corpus.synthetic import make_embedded_corpus
from xded.corpus.vocoder import SAMPLE_RATE
from xded.models.checkpoints import sha256_of
from xded.models.student import Student
from xded.report.study import report_of
from xded.scoring import Prediction
from xded.study.plan import Study, build
from xded.study.run import run_study
from xded.study.verdict import Answer
from xded.training.data import TrainingData
from xded.training.evaluation import recognise

QUICK = {"batch_size": 16, "threads": 1, "validate_every_epochs": 100, "checkpoint_every_epochs": 1000}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    make_embedded_corpus(folder, controls=6, targets=2, words=4, takes=20, seed=0)
    return folder


def send_away(corpus: Path, out: Path) -> Path:
    """The corpus with T01's speech played 1.7 times as fast and backwards: a voice like no other."""
    rows = []
    for row in read_corpus(corpus).recordings:
        if row.speaker == "T01":
            samples = soxr.resample(read_audio(row.audio_filepath), 1.7, 1.0)[::-1]
            path = out / f"{row.recording}.wav"
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(path, samples, SAMPLE_RATE, subtype="PCM_16")
            changed = {"audio_filepath": path, "duration": len(samples) / SAMPLE_RATE, "audio_sha256": sha256_of(path)}
            row = row.model_copy(update=changed)
        rows.append(row)
    write_manifest(out / "manifest.jsonl", rows)
    return out


def study(corpus: Path, updates: int) -> Study:
    """The hypotheses and thresholds of the built-in study `debug`, with attempts that need no teacher."""
    data = {
        "name": "debug", "corpus": str(corpus), "held_out": ["T01"], "seeds": [0], "updates": updates,
        "baselines": False,
        "config": {"model": {"size": "micro"}, "train": {"stages": [{"epochs": 1, "peak_lr": 0.003}], **QUICK}},
        "attempts": {"included": {"include_held_out": True, "controls": True}, "held out": {"controls": True}},
        "hypotheses": {
            "domain shift": {"attempt": "included", "above": 60},
            "training broken": {"attempt": "included", "below": 10},
        },
        "next": [
            {"when": {"evaluation": "suspect"}, "do": "mend the evaluation"},
            {"when": {"training broken": "supported"}, "do": "look for the cause"},
            {"when": {"domain shift": "supported"}, "do": "generalise"},
        ],
    }  # fmt: skip
    return build(data, "the test")


def answered(plan: Study, out: Path) -> tuple[dict[str, Answer], str]:
    outcome = run_study(plan, out)
    assert outcome.complete, outcome.progress.errors
    report = report_of(outcome, out, "debug")
    return {answer.hypothesis: answer for answer in report.answers}, report.advice.do if report.advice else ""


@pytest.mark.slow
def test_training_that_hears_nothing_is_called_broken(corpus: Path, tmp_path: Path) -> None:
    encode = Student.encode

    def deaf(self: Student, features: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        encoded, frames = encode(self, features, lengths)
        return 0.0 * encoded, frames

    with patch.object(Student, "encode", deaf):
        answers, advice = answered(study(corpus, 60), tmp_path)
    assert answers["training broken"].verdict == "supported", answers
    assert answers["domain shift"].verdict == "rejected"
    assert advice == "look for the cause"


@pytest.mark.slow
def test_a_speaker_far_from_the_others_is_a_domain_shift(corpus: Path, tmp_path: Path) -> None:
    plan = study(send_away(corpus, tmp_path / "corpus"), 400)
    outcome = run_study(plan, tmp_path / "study")
    report = report_of(outcome, tmp_path / "study", "debug")
    answers = {answer.hypothesis: answer for answer in report.answers}
    assert answers["domain shift"].verdict == "supported", report.lines()
    assert answers["training broken"].verdict == "rejected"
    assert report.tables[0].scores["held out"].overall.wra_percent.value < 30
    assert report.advice is not None
    assert report.advice.do == "generalise"


@pytest.mark.slow
def test_ids_decoded_one_low_leave_no_verdict(corpus: Path, tmp_path: Path) -> None:
    def one_low(student: Student, data: TrainingData, how: DecodeConfig, **more: Any) -> list[Prediction]:
        said = recognise(student, data, how, **more)
        if how.word_list:
            return said
        return [replace(p, hypothesis=data.tokenizer.decode([i - 1 for i in p.tokens if i > 3])) for p in said]

    plan = study(corpus, 250)
    with patch("xded.study.pieces.recognise", one_low):
        outcome = run_study(plan, tmp_path)
    report = report_of(outcome, tmp_path, "debug")
    assert {answer.verdict for answer in report.answers} == {"suspect"}, report.lines()
    assert report.suspicions[0].check == "token-offset"
    assert report.advice is not None
    assert report.advice.do == "mend the evaluation"
