"""Losses: pure functions of outputs, targets and lengths.

Every loss is a mean over recordings of a mean over the recording's own frames or tokens, so that padding
and batch order change nothing, and equal micro-batches add up.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from xded.features import valid_mask

LEAST_REST = 1e-6  # of a target: mass below which its unlisted entries count as empty (it is rounding)


class TopK(NamedTuple):
    """Distributions of which only the k largest entries are kept; the rest is one mass.

    ids: [..., k] int64; probabilities: [..., k]; rest: [...], summing to 1 with the probabilities.
    """

    ids: Tensor
    probabilities: Tensor
    rest: Tensor


def recording_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over recordings of the mean over valid positions: [B, T] and mask [B, T] -> scalar.

    A recording without a valid position counts as 0.
    """
    counts = mask.sum(dim=1).clamp(min=1)
    return (values.masked_fill(~mask, 0.0).sum(dim=1) / counts).mean()


def ctc(logits: Tensor, frames: Tensor, tokens: Tensor, token_lengths: Tensor, blank: int) -> Tensor:
    """CTC negative log-likelihood a token (Graves et al. 2006).

    Args:
        logits: [B, T, V]; frames: [B]; tokens: [B, U] without special ids; token_lengths: [B].
        blank: id of the blank.

    Returns:
        Scalar; infinite when a text does not fit into its frames (`ctc_frames_needed` tells before).
    """
    log_probs = F.log_softmax(logits.float(), dim=2).transpose(0, 1)  # [T, B, V]
    losses = F.ctc_loss(log_probs, tokens, frames, token_lengths, blank=blank, reduction="none")
    return (losses / token_lengths.clamp(min=1)).mean()


def ctc_frames_needed(tokens: list[int]) -> int:
    """Fewest frames in which CTC can spell the tokens: one each, and a blank between equal neighbours."""
    return len(tokens) + sum(a == b for a, b in pairwise(tokens))


def cross_entropy(logits: Tensor, tokens: Tensor, lengths: Tensor, smoothing: float = 0.0) -> Tensor:
    """Decoder cross-entropy a step: logits [B, U, V], tokens [B, U] (ending in </s>), lengths [B] -> scalar."""
    losses = F.cross_entropy(logits.transpose(1, 2).float(), tokens, reduction="none", label_smoothing=smoothing)
    return recording_mean(losses, valid_mask(lengths, tokens.shape[1]))


def top_k_kl(logits: Tensor, target: TopK, temperature: float) -> Tensor:
    """KL(target || student) at `temperature`, the entries beyond the top k pooled into one.

    Args:
        logits: [B, T, V] of the student; target: [B, T, k], made at the same temperature.

    Returns:
        [B, T], times T^2 (Hinton et al. 2015, section 2), zero where the student agrees with the target.
    """
    log_student = F.log_softmax(logits.float() / temperature, dim=-1)
    listed = log_student.gather(-1, target.ids)  # [B, T, k]
    kl = (torch.xlogy(target.probabilities, target.probabilities) - target.probabilities * listed).sum(-1)
    if target.ids.shape[-1] < logits.shape[-1]:
        # summed over the unlisted entries, not 1 - listed: that has no gradient where the student is certain
        log_student_rest = log_student.scatter(-1, target.ids, -torch.inf).logsumexp(-1)
        rest = torch.where(target.rest > LEAST_REST, target.rest, 0.0)
        kl = kl + torch.xlogy(rest, rest) - rest * log_student_rest
    return kl * temperature**2


def decoder_kd(logits: Tensor, target: TopK, lengths: Tensor, temperature: float) -> Tensor:
    """Decoder-KD: KL at every token step (incl. </s>): [B, U, V], target [B, U, k], lengths [B] -> scalar."""
    kl = top_k_kl(logits, target, temperature)
    return recording_mean(kl, valid_mask(lengths, logits.shape[1]))


def speech_frames(least_blank: Tensor, frames: Tensor, threshold: float) -> Tensor:
    """Frames that CTC-KD uses: those that some teacher does not call blank, and their neighbours.

    Keeping the blanks next to a label follows Hilmes et al. 2025 (arXiv:2506.01503).

    Args:
        least_blank: [B, T], smallest blank probability over the teachers; frames: [B].

    Returns:
        [B, T] bool.
    """
    valid = valid_mask(frames, least_blank.shape[1])
    speech = (least_blank < threshold) & valid
    near = F.max_pool1d(speech[:, None].float(), kernel_size=3, stride=1, padding=1)[:, 0] > 0
    return near & valid


def ctc_kd(logits: Tensor, target: TopK, kept: Tensor, temperature: float) -> Tensor:
    """CTC-KD: KL a frame over the whole vocabulary, blank included: [B, T, V], target [B, T, k], kept [B, T]."""
    return recording_mean(top_k_kl(logits, target, temperature), kept)
