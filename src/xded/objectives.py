"""Losses: pure functions of outputs, targets and lengths.

Every loss is a mean over recordings of a mean over the recording's own frames or tokens, so that padding
and batch order change nothing, and equal micro-batches add up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from xded.features import valid_mask

LEAST_REST = 1e-6  # of a target: mass below which its unlisted entries count as empty (it is rounding)
IMPOSSIBLE = -1e4  # log-probability of a word that does not fit into the frames: finite, so that none is NaN


class TopK(NamedTuple):
    """Distributions of which only the k largest entries are kept; the rest is one mass.

    ids: [..., k] int64; probabilities: [..., k]; rest: [...], summing to 1 with the probabilities. Where there is no
    target all of them are 0, and so is every loss.
    """

    ids: Tensor
    probabilities: Tensor
    rest: Tensor


class WordTarget(NamedTuple):
    """A distribution over W words of each recording, which may be other words for every recording.

    tokens: [B, W, U] int64; lengths: [B, W], 0 where there is no word; probabilities: [B, W], all 0 without a target.
    """

    tokens: Tensor
    lengths: Tensor
    probabilities: Tensor


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
    losses = _ctc_losses(logits, frames, tokens[:, None], token_lengths[:, None], blank, zero_infinity=False)[:, 0]
    return (losses / token_lengths.clamp(min=1)).mean()


def _ctc_losses(
    logits: Tensor, frames: Tensor, tokens: Tensor, lengths: Tensor, blank: int, *, zero_infinity: bool
) -> Tensor:
    """-log p_ctc of W texts for each recording: [B, T, V], [B], [B, W, U] and [B, W] -> [B, W].

    torch's CTC walks over all V classes. Here it gets those of the text alone, as 0 (the blank) and 1 to U: a fifth of
    the time with 5,000 pieces.
    """
    count, words, most = tokens.shape
    classes = torch.cat([torch.full_like(tokens[:, :, :1], blank), tokens], dim=2)  # [B, W, U + 1]
    log_probs = F.log_softmax(logits.float(), dim=2)
    listed = log_probs.gather(2, classes.view(count, 1, -1).expand(-1, logits.shape[1], -1))
    listed = listed.unflatten(2, (words, most + 1)).permute(1, 0, 2, 3).flatten(1, 2)  # [T, B * W, U + 1]
    numbers = 1 + (tokens[..., :, None] == tokens[..., None, :]).int().argmax(dim=3)  # equal tokens have one class
    every = frames.repeat_interleave(words)
    losses = F.ctc_loss(
        listed, numbers.flatten(0, 1), every, lengths.flatten(),
        blank=0, reduction="none", zero_infinity=zero_infinity,
    )  # fmt: skip
    if torch.is_grad_enabled():
        # torch adds the classes' probabilities to the gradient, which a softmax over all that it is given would cancel
        valid = valid_mask(every, len(listed)).T[:, :, None] & (losses > 0)[:, None]
        added = listed.exp().masked_fill(~valid, 0.0).sum(dim=(0, 2))
        losses = losses - (added - added.detach())
    return losses.view(count, words)


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


def text_kd(logits: Tensor, frames: Tensor, tokens: Tensor, token_lengths: Tensor, blank: int) -> Tensor:
    """CTC on the text that the teachers hear instead of the true one, a token (Takashima et al. 2018; `ctc_loss_kd` of
    SpeechBrain after Gao et al. 2020, arXiv:2005.09310): whatever the time at which the teachers' spikes stand.

    Args:
        logits: [B, T, V]; frames: [B]; tokens: [B, U]; token_lengths: [B], 0 where the teachers hear nothing.

    Returns:
        Scalar, mean over all recordings; one without a text, or whose text does not fit into its frames, counts 0.
    """
    losses = _ctc_losses(logits, frames, tokens[:, None], token_lengths[:, None], blank, zero_infinity=True)[:, 0]
    return torch.where(token_lengths > 0, losses / token_lengths.clamp(min=1), 0.0).mean()


def word_log_probs(logits: Tensor, frames: Tensor, tokens: Tensor, lengths: Tensor, blank: int) -> Tensor:
    """log p_ctc(word | recording) of W words for each recording.

    Args:
        logits: [B, T, V]; frames: [B]; tokens: [B, W, U]; lengths: [B, W].

    Returns:
        [B, W], not normalised over the words; `IMPOSSIBLE` (without a gradient) where there is no word, or one that
        does not fit into the frames.
    """
    losses = _ctc_losses(logits, frames, tokens, lengths, blank, zero_infinity=True)
    again = (tokens[:, :, 1:] == tokens[:, :, :-1]) & _before(lengths - 1, tokens.shape[2] - 1)
    fits = (lengths > 0) & (lengths + again.sum(dim=2) <= frames[:, None])  # as `ctc_frames_needed`
    return torch.where(fits, -losses, IMPOSSIBLE)


def _before(lengths: Tensor, most: int) -> Tensor:
    """Which of `most` places lie before an end: [...] -> [..., most] bool."""
    return torch.arange(most, device=lengths.device) < lengths[..., None]


def word_kd(log_probs: Tensor, probabilities: Tensor, temperature: float) -> Tensor:
    """KL(teachers || student) over listed words at `temperature`, times T^2 (Hinton et al. 2015, section 2).

    Both distributions are renormalised over the words that are listed: of the other words the teachers give one mass
    only, and to score all of them costs too much. What the student gives to other words is left to the true text.

    Args:
        log_probs: [B, W] of the student, as of `word_log_probs`; probabilities: [B, W], made at the same temperature.
    """
    possible = torch.where(log_probs > IMPOSSIBLE, probabilities, 0.0)
    total = possible.sum(dim=1, keepdim=True)
    target = torch.where(total > 0, possible / total.clamp(min=torch.finfo(total.dtype).tiny), 0.0)
    log_student = F.log_softmax(log_probs / temperature, dim=1)
    return (torch.xlogy(target, target) - target * log_student).sum(dim=1).mean() * temperature**2


def feature_kd(encoded: Tensor, guide: Tensor, frames: Tensor) -> Tensor:
    """1 - cosine between the student's (projected) encoder output and the guide's, a frame: [B, T, D] x 2 -> scalar.

    Hints after Romero et al. 2015 (FitNets, equation 3), of the last encoder layer; their squared distance depends on
    the size of the guide's outputs, the angle does not.
    """
    distance = 1.0 - F.cosine_similarity(encoded.float(), guide.float(), dim=2)
    return recording_mean(distance, valid_mask(frames, encoded.shape[1]))


def partners(texts: Tensor, speakers: Sequence[str]) -> Tensor:
    """Who shares a prediction with whom: the recordings of one text, if several speakers say it.

    Args:
        texts: [B] number of each recording's text; speakers: of each recording.

    Returns:
        [B, B], rows that sum to 1 (the recording itself among them), or 0 for one without another speaker.
    """
    names = {speaker: number for number, speaker in enumerate(sorted(set(speakers)))}
    numbers = torch.tensor([names[speaker] for speaker in speakers], device=texts.device)
    same = texts[:, None] == texts
    several = (same & (numbers[:, None] != numbers)).any(dim=1, keepdim=True)
    shared = (same & several).float()
    return shared / shared.sum(dim=1, keepdim=True).clamp(min=1.0)


def agreement(scores: Tensor, shares: Tensor, temperature: float) -> Tensor:
    """XDED (Lee, Kim and Kwak 2022, arXiv:2211.14058): KL(ensemble || own), times T^2.

    The ensemble is the mean of the scores (logits, or log-probabilities) of a text's recordings; it has no gradient.

    Args:
        scores: [B, ..., N]; shares: [B, B], as of `partners`.

    Returns:
        [B, ...], 0 for recordings without partners.
    """
    mean = torch.einsum("ij,j...->i...", shares, scores.detach().float())
    log_target = F.log_softmax(mean / temperature, dim=-1)
    log_own = F.log_softmax(scores.float() / temperature, dim=-1)
    kl = (log_target.exp() * (log_target - log_own)).sum(dim=-1) * temperature**2
    paired = shares.any(dim=1).view(-1, *[1] * (kl.dim() - 1))
    return torch.where(paired, kl, 0.0)


def resoften(target: TopK, made_at: float, temperature: float, vocabulary: int) -> TopK:
    """A target at another temperature than it was made at: p_T proportional to p_T0^(T0 / T).

    Exact for one teacher and for a mean of log-probabilities or logits, whose softmax is what the power undoes; for a
    mean of probabilities it softens the mean instead of averaging the softened. The rest mass is taken as spread evenly
    over the entries that are not listed, as where teachers are averaged.
    """
    if temperature == made_at:
        return target
    power = made_at / temperature
    unlisted = vocabulary - target.ids.shape[-1]
    there = (target.rest > LEAST_REST) & (unlisted > 0)  # else a power below 1 would make much of a rounding
    listed = target.probabilities.pow(power)
    rest = torch.where(there, unlisted * (target.rest / max(unlisted, 1)).pow(power), 0.0)
    total = (listed.sum(dim=-1) + rest).clamp(min=torch.finfo(rest.dtype).tiny)
    return TopK(target.ids, listed / total[..., None], rest / total)


def sharpen(probabilities: Tensor, made_at: float, temperature: float) -> Tensor:
    """`resoften` for entries that are renormalised by themselves: [..., k], not normalised."""
    return probabilities if temperature == made_at else probabilities.pow(made_at / temperature)


class _Reversed(torch.autograd.Function):
    """What comes in goes out; the gradient goes back times -strength."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, strength: float) -> Tensor:
        ctx.strength = strength
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return -ctx.strength * gradients[0], None


def reverse_gradient(values: Tensor, progress: float) -> Tensor:
    """Gradient reversal (Ganin et al. 2016, arXiv:1505.07818), of strength 2 / (1 + exp(-10 p)) - 1 as in their paper.

    Args:
        values: of any shape; progress: share of the run that is over.
    """
    strength = 2.0 / (1.0 + math.exp(-10.0 * progress)) - 1.0
    return _Reversed.apply(values, strength)


def mean_frame(encoded: Tensor, frames: Tensor) -> Tensor:
    """Mean of the valid frames: [B, T, D], [B] -> [B, D]."""
    mask = valid_mask(frames, encoded.shape[1])[:, :, None]
    return encoded.masked_fill(~mask, 0.0).sum(dim=1) / frames.clamp(min=1)[:, None]
