"""From a batch to the parts of the loss: one place for training, validation and the doctor's probes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from xded import objectives
from xded.config import OF_TEACHERS, Config, ObjectiveConfig
from xded.features import valid_mask
from xded.models.student import Student, decoder_input
from xded.tokenizer import Tokenizer
from xded.training.auxiliary import Auxiliary
from xded.training.data import Batch

MEASURES = ("frames", "teacher_forced")  # beside the parts of the loss


def temperature_at(objective: ObjectiveConfig, progress: float) -> float:
    """T of the targets when a share of the run is over: linear, or always the same."""
    first, last = objective.temperature, objective.temperature_end
    return first if last is None else first + (last - first) * progress


def loss_parts(
    student: Student,
    batch: Batch,
    config: Config,
    tokenizer: Tokenizer,
    auxiliary: Auxiliary | None = None,
    progress: float = 0.0,
) -> dict[str, Tensor]:
    """Unweighted parts of the loss of a batch, and measures: `frames`, the share of frames that the CTC side used, and
    (outside training) `teacher_forced`, the share of decoder steps that are right when the true text comes before them.

    Args:
        auxiliary: what `feature_kd` and `adversary` need; progress: share of the run that is over, for what changes.
    """
    weights = config.objective
    if batch.encoded is None:
        assert batch.features is not None
        encoded, lengths = student.encode(batch.features, batch.feature_lengths)
    else:
        assert batch.encoded_lengths is not None
        encoded, lengths = batch.encoded, batch.encoded_lengths
    parts: dict[str, Tensor] = {}
    if weights.ctc or weights.ctc_kd or weights.text_kd or weights.word_kd:
        parts |= _of_ctc_head(student.ctc_logits(encoded), lengths, batch, weights, tokenizer.blank, progress)
    if weights.cross_entropy or weights.decoder_kd:
        logits = student.decoder_logits(decoder_input(batch.tokens, tokenizer.bos), encoded, lengths)
        parts |= _of_decoder(logits, batch, weights, progress, measure=not student.training)
    if weights.feature_kd or weights.adversary:
        assert auxiliary is not None
        if weights.feature_kd:
            assert batch.guide is not None
            parts["feature_kd"] = auxiliary.feature_kd(encoded, batch.guide, lengths)
        if weights.adversary:
            parts["adversary"] = auxiliary.adversary(encoded, lengths, batch.speakers, progress)
    frames = valid_mask(lengths, encoded.shape[1])
    parts["frames"] = parts.pop("frames", frames.sum() / frames.numel()).detach()  # the last of all
    return parts


def _of_ctc_head(
    logits: Tensor, lengths: Tensor, batch: Batch, weights: ObjectiveConfig, blank: int, progress: float
) -> dict[str, Tensor]:
    """Parts of the loss of the CTC head's [B, T', V], and `frames` where teachers choose them."""
    parts: dict[str, Tensor] = {}
    temperature = temperature_at(weights, progress)
    if weights.ctc:
        parts["ctc"] = objectives.ctc(logits, lengths, batch.tokens, batch.token_lengths, blank)
    if weights.ctc_kd:
        assert batch.ctc_target is not None
        assert batch.least_blank is not None
        kept = objectives.speech_frames(batch.least_blank, lengths, weights.blank_threshold)
        parts["frames"] = kept.sum() / lengths.sum()
        target = objectives.resoften(batch.ctc_target, weights.temperature, temperature, logits.shape[2])
        parts["ctc_kd"] = objectives.ctc_kd(logits, target, kept, temperature)
    if weights.word_kd:
        assert batch.words is not None
        said, word_lengths, probabilities = batch.words
        scores = objectives.word_log_probs(logits, lengths, said, word_lengths, blank)
        softened = objectives.sharpen(probabilities, weights.temperature, temperature)
        parts["word_kd"] = objectives.word_kd(scores, softened, temperature)
    if weights.text_kd:
        assert batch.heard is not None
        assert batch.heard_lengths is not None
        parts["text_kd"] = objectives.text_kd(logits, lengths, batch.heard, batch.heard_lengths, blank)
    if weights.word_consistency:
        texts, numbers = torch.unique(batch.tokens, dim=0, return_inverse=True)  # [P, U + 1], [B]
        text_lengths = torch.zeros_like(texts[:, 0]).scatter(0, numbers, batch.token_lengths)
        count = len(logits)
        scores = objectives.word_log_probs(
            logits, lengths, texts.expand(count, -1, -1), text_lengths.expand(count, -1), blank
        )
        shares = objectives.partners(numbers, batch.speakers)
        parts["word_consistency"] = objectives.agreement(scores, shares, weights.consistency_temperature).mean()
    return parts


def _of_decoder(
    logits: Tensor, batch: Batch, weights: ObjectiveConfig, progress: float, *, measure: bool
) -> dict[str, Tensor]:
    """Parts of the loss of the decoder's [B, U + 1, V], and `teacher_forced`."""
    parts: dict[str, Tensor] = {}
    steps = batch.token_lengths + 1  # </s> is a step
    if weights.cross_entropy:
        parts["cross_entropy"] = objectives.cross_entropy(logits, batch.tokens, steps, weights.label_smoothing)
        if measure:
            right = (logits.argmax(dim=2) == batch.tokens).float()
            parts["teacher_forced"] = objectives.recording_mean(right, valid_mask(steps, right.shape[1]))
    if weights.decoder_kd:
        assert batch.decoder_target is not None
        temperature = temperature_at(weights, progress)
        target = objectives.resoften(batch.decoder_target, weights.temperature, temperature, logits.shape[2])
        parts["decoder_kd"] = objectives.decoder_kd(logits, target, steps, temperature)
    if weights.consistency:
        _, numbers = torch.unique(batch.tokens, dim=0, return_inverse=True)
        shares = objectives.partners(numbers, batch.speakers)
        kl = objectives.agreement(logits, shares, weights.consistency_temperature)  # [B, U + 1]
        parts["consistency"] = objectives.recording_mean(kl, valid_mask(steps, kl.shape[1]))
    return parts


def weighted_sum(parts: Mapping[str, Tensor], config: Config, progress: float = 0.0) -> Tensor:
    """The loss: parts times their weights in the objective; those of the teachers move linearly to `kd_end`."""
    weights = config.objective
    left = 1.0 + (weights.kd_end - 1.0) * progress
    terms = [
        getattr(weights, name) * (left if name in OF_TEACHERS else 1.0) * value
        for name, value in parts.items()
        if name not in MEASURES
    ]
    return torch.stack(terms).sum()
