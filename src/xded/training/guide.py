"""What parts of the loss need beside targets: the recogniser that `feature_kd` imitates, speakers to tell apart."""

from __future__ import annotations

import torch

from xded.errors import CheckpointError, ConfigError
from xded.models.recogniser import Recogniser, load_recogniser
from xded.models.student import Student
from xded.training.auxiliary import Auxiliary
from xded.training.job import Job


def open_guide(job: Job, student: Student) -> Recogniser | None:
    """The recogniser of `train.guide`, if the objective asks for it.

    Raises:
        ConfigError: none is given. CheckpointError: it cannot be read, or its frames are not the student's.
    """
    if not job.config.objective.feature_kd:
        return None
    path = job.config.train.guide
    if path is None:
        raise ConfigError(
            "objective.feature_kd has no recogniser to imitate.",
            "Give the parent's: --set train.guide=PARENT, or set objective.feature_kd=0.",
        )
    guide = load_recogniser(path)
    if guide.tokenizer.fingerprint != job.tokenizer.fingerprint:
        raise CheckpointError(
            f"The guide {path} has another tokenizer (fingerprint {guide.tokenizer.fingerprint[:12]}, this run's is "
            f"{job.tokenizer.fingerprint[:12]}).",
            "Give the parent of this fold as train.guide.",
        )
    theirs, ours = guide.config.features.model_dump(), job.config.features.model_dump()
    changed = [f"{key} {theirs[key]} (here {ours[key]})" for key in ours if theirs[key] != ours[key]]
    samples = torch.tensor(sorted({round(r.duration * student.front_end.sample_rate) for r in job.train}))
    if changed or not torch.equal(guide.student.encoded_frames(samples), student.encoded_frames(samples)):
        raise CheckpointError(
            f"The guide {path} does not hear what the student hears: "
            f"{', '.join(changed) or 'its encoder makes another number of frames'}.",
            "Give a guide with the same features and subsampling, or set objective.feature_kd=0.",
        )
    return guide


def check_speakers(job: Job) -> None:
    """Raises when there is nobody for the adversary to tell apart."""
    speakers = sorted({r.speaker for r in job.train})
    if job.config.objective.adversary and len(speakers) < 2:
        raise ConfigError(
            f"objective.adversary tells speakers apart, and the run has one ({', '.join(speakers)}).",
            "Train on more speakers, or set objective.adversary=0.",
        )


def auxiliary_of(job: Job, student: Student, guide: Recogniser | None) -> Auxiliary | None:
    """What the objective's parts learn beside the student, as it is before the first step; none: nothing."""
    objective = job.config.objective
    if not (objective.feature_kd or objective.adversary):
        return None
    speakers = {r.speaker for r in job.train} if objective.adversary else set()
    width = guide.student.encoder.width if guide is not None else None
    return Auxiliary(student.encoder.width, width, speakers, job.config.seed)
