"""How hard each training recording is, measured once before the first step; with it, a run's curriculum."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from xded.checks.curriculum import WRAPPER, curriculum
from xded.config import Config
from xded.errors import ConfigError
from xded.features import valid_mask
from xded.models.student import Student, decoder_input
from xded.targets.aggregate import LEAST, dense
from xded.targets.store import Store
from xded.training.curriculum import Curriculum, shares_of
from xded.training.data import Batch, TrainingData
from xded.training.evaluation import batches
from xded.training.job import Job
from xded.training.status import write_atomically

DIFFICULTY = "difficulty.json"
KEPT = "difficulty"  # key of a checkpoint
HARDEST = 1e4  # of a text that does not fit into its frames: JSON has no infinity
RANDOM = (0, 2)  # apart from the numbers that order and augmentation are drawn with
MEANING = {
    "parent": "the loss of the weights that it starts from",
    "duration": "length in seconds",
    "targets": "-log probability of the text under the targets",
    "random": "a random number (a control)",
}


def begin_curriculum(
    job: Job,
    student: Student,
    data: TrainingData,
    epochs: int,
    checkpoint: Mapping[str, Any] | None,
    device: torch.device,
    *,
    writes: bool,
) -> dict[str, Tensor]:
    """Gives `data` its curriculum, if the config asks for one; returns what every checkpoint has to carry.

    Args:
        job, data: of the run; student: with the weights that the run starts from.
        epochs: of the whole run; checkpoint: of a run that goes on, whose difficulty is not measured again.
        device: to measure on; writes: whether this process writes RUN/difficulty.json.

    Raises:
        ConfigError: difficulty cannot be measured so, or is the same for all recordings.
    """
    config = job.config.train.curriculum
    if config.schedule == "none":
        return {}
    shares = shares_of(config, epochs)
    measured = difficulty_of(job.config, student, data, device) if checkpoint is None else checkpoint[KEPT].numpy()
    scores = {r.recording: float(f"{s:.6g}") for r, s in zip(data.recordings, measured, strict=True)}
    problems = curriculum({WRAPPER: scores}, job.name, data.recordings)
    if any(finding.severity == "refuse" for finding in problems):
        raise ConfigError(problems[0].what, "Choose another train.curriculum.difficulty, or schedule none.")
    order = sorted(range(len(data)), key=lambda place: measured[place])
    data.curriculum = Curriculum(tuple(order), shares)
    easiest, hardest = (data.recordings[place].recording for place in (order[0], order[-1]))
    job.facts["curriculum"] = (
        f"{config.schedule}, from {100 * shares[0]:.0f} % of the recordings to all, by {MEANING[config.difficulty]} "
        f"({easiest}: {scores[easiest]:g} to {hardest}: {scores[hardest]:g})"
    )
    if writes:
        said = {
            "difficulty": config.difficulty, "schedule": config.schedule, "shares": [round(s, 4) for s in shares],
            WRAPPER: scores,
        }  # fmt: skip
        write_atomically(job.out / DIFFICULTY, json.dumps(said, indent=1))
    return {KEPT: torch.from_numpy(measured)}


def difficulty_of(config: Config, student: Student, data: TrainingData, device: torch.device) -> np.ndarray:
    """Difficulty of every recording, higher is harder: [N] float64.

    Raises:
        ConfigError: the config's measure needs weights that the run does not have.
    """
    kind = config.train.curriculum.difficulty
    if kind == "duration":
        return np.array([recording.duration for recording in data.recordings])
    if kind == "random":
        return np.random.default_rng([config.seed, *RANDOM]).random(len(data))
    if kind == "targets":
        return np.array([_under_targets(data, index) for index in range(len(data))])
    if config.train.init is None:
        raise ConfigError(
            "train.curriculum.difficulty is parent, and the run has none (--init): heads that were never trained find "
            "nothing hard.",
            "Give --init, or set train.curriculum.difficulty to duration or targets.",
        )
    return _under_start(config, student.to(device), data)


@torch.inference_mode()
def _under_start(config: Config, student: Student, data: TrainingData) -> np.ndarray:
    """Loss of the true text without augmentation, weighted as in the objective."""
    student.eval()
    device = next(student.parameters()).device
    found = np.zeros(len(data))
    for places, batch in batches(data.plain(), config.decode.batch_size):
        found[places] = losses(student, batch.to(device), config, data.tokenizer.blank, data.tokenizer.bos).cpu()
    student.cpu()
    return found.clip(max=HARDEST)


def losses(student: Student, batch: Batch, config: Config, blank: int, bos: int) -> Tensor:
    """The supervised loss of each recording of a batch: [B]. Its mean is that of `losses.loss_parts`, unsmoothed."""
    weights = config.objective
    assert batch.features is not None
    encoded, frames = student.encode(batch.features, batch.feature_lengths)
    total = torch.zeros(len(frames), device=frames.device)
    if weights.ctc:
        log_probs = F.log_softmax(student.ctc_logits(encoded).float(), dim=2).transpose(0, 1)  # [T', B, V]
        each = F.ctc_loss(log_probs, batch.tokens, frames, batch.token_lengths, blank=blank, reduction="none")
        total = total + weights.ctc * each / batch.token_lengths.clamp(min=1)
    if weights.cross_entropy:
        logits = student.decoder_logits(decoder_input(batch.tokens, bos), encoded, frames)  # [B, U + 1, V]
        each = F.cross_entropy(logits.transpose(1, 2).float(), batch.tokens, reduction="none")
        valid = valid_mask(batch.token_lengths + 1, each.shape[1])
        total = total + weights.cross_entropy * (each * valid).sum(dim=1) / valid.sum(dim=1)
    return total


def _under_targets(data: TrainingData, index: int) -> float:
    """-log probability of the true text, a token: under the decoder's targets where there are some, else CTC's."""
    tokens, recording = data.tokens[index], data.recordings[index].recording
    if data.decoder_targets is not None:
        steps = _log_probs(data.decoder_targets, recording)
        return float(-steps[np.arange(len(steps)), [*tokens, data.tokenizer.eos]].mean())
    assert data.ctc_targets is not None  # `checks.ordering.unordered_by_targets`
    frames = torch.from_numpy(_log_probs(data.ctc_targets, recording))[:, None]  # [T', 1, V]
    loss = F.ctc_loss(
        frames, torch.tensor([tokens]), torch.tensor([len(frames)]), torch.tensor([len(tokens)]),
        blank=data.tokenizer.blank, reduction="sum",
    )  # fmt: skip
    return min(HARDEST, float(loss) / max(1, len(tokens)))


def _log_probs(store: Store, recording: str) -> np.ndarray:
    return np.log(np.maximum(dense(store.read(recording), store.index.vocabulary), LEAST))
