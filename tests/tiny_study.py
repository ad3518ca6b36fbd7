"""Studies of the tiny corpus and the tiny model, for tests that run them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tiny_corpus import MODEL
from xded.corpus.manifest import Corpus
from xded.study.plan import Study, build
from xded.study.run import Outcome, run_study

TRAIN = {"stages": [{"epochs": 1, "peak_lr": 1e-3}], "batch_size": 8, "device": "cpu"}
CONFIG = {
    "model": MODEL,
    "train": TRAIN,
    "teach": {"parent_on": "controls", "parent": TRAIN, "teacher": TRAIN},
}
CTC_KD = {"set": {"objective.ctc_kd": 1.0}}
DECODER_KD = {"set": {"objective.decoder_kd": 1.0}}


def tiny_study(corpus: Corpus, attempts: Mapping[str, Any], **changes: Any) -> Study:
    """A study of a corpus; one epoch of everything, one seed, no tests of parent and teachers unless asked for."""
    data = {
        "name": "tiny", "corpus": str(corpus.path), "held_out": "all", "seeds": [0], "baselines": False,
        "config": CONFIG, "attempts": attempts,
    }  # fmt: skip
    return build({**data, **changes}, "the test")


def run_tiny(study: Study, out: Path, **options: Any) -> Outcome:
    """Runs it; every piece has to succeed."""
    outcome = run_study(study, out, **options)
    assert outcome.complete, outcome.progress.errors
    return outcome
