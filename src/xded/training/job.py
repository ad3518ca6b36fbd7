"""What to train: a config, recordings, a fold, a run folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xded.config import Config
from xded.corpus.folds import Fold
from xded.corpus.manifest import Recording
from xded.tokenizer import Tokenizer


@dataclass
class Job:
    """What to train.

    Attributes:
        name: who the result is: "parent", "teacher M08", "student".
        config: of the run; `train.init`, `targets` and `objective` say how.
        train, validation: recordings; they share no take.
        fold: who must not be heard; test_takes: takes of the test (needed when held-out speakers are included).
        tokenizer: of the run (and of the parent and the targets).
        out: run folder.
        force: names of checks whose refusal is overridden; recorded in the run folder.
    """

    name: str
    config: Config
    train: Sequence[Recording]
    validation: Sequence[Recording]
    fold: Fold
    test_takes: frozenset[str]
    tokenizer: Tokenizer
    out: Path
    facts: dict[str, Any] = field(default_factory=dict)
    force: frozenset[str] = frozenset()
