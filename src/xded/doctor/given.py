"""What was given to the doctor, recognised by its content and read leniently: what cannot be read is said."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xded.corpus.manifest import Corpus
from xded.doctor.listings import Listing
from xded.doctor.run_folder import RunFolder
from xded.evaluations import Evaluation
from xded.models.checkpoints import load
from xded.targets.store import Store
from xded.teachers.adapt import Teachers
from xded.tokenizer import Tokenizer

HEAVY = ("model_state_dict", "optimizer_states")  # gigabytes, with a parent and fourteen teachers


@dataclass
class Given:
    """Everything that could be read, by kind."""

    corpora: list[Corpus] = field(default_factory=list)
    listings: list[Listing] = field(default_factory=list)  # bare lists of recordings, such as a metadata file
    tokenizers: dict[Path, Tokenizer] = field(default_factory=dict)
    stores: list[Store] = field(default_factory=list)  # posteriors of one teacher, and aggregated targets
    teachers: list[Teachers] = field(default_factory=list)
    runs: list[RunFolder] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    difficulty: list[Path] = field(default_factory=list)  # curriculum scores
    _facts: dict[Path, dict[str, Any]] = field(default_factory=dict)

    def facts(self, checkpoint: Path) -> dict[str, Any]:
        """What a checkpoint says besides its weights and its optimiser's state; each file is read once.

        Raises:
            CheckpointError: it cannot be read. OSError: nor opened.
        """
        if checkpoint not in self._facts:
            payload = load(checkpoint)
            self._facts[checkpoint] = {key: value for key, value in payload.items() if key not in HEAVY}
        return self._facts[checkpoint]
