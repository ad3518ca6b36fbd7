"""What speakers sound like as means and deviations of early features: mixed between recordings, or taken away."""

from __future__ import annotations

import torch
from torch import Tensor

MIXING = 0.1  # alpha of MixStyle's Beta distribution, the paper's
FLOOR = 1e-6  # least variance, as in the paper's code


def statistics(hidden: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation over the valid frames, per recording and channel.

    Args:
        hidden: [B, T, D].
        mask: [B, T], true where a frame belongs to the recording.

    Returns:
        Both [B, 1, D].
    """
    valid = mask[:, :, None].to(hidden.dtype)
    count = valid.sum(dim=1, keepdim=True).clamp(min=1.0)
    mean = (hidden * valid).sum(dim=1, keepdim=True) / count
    variance = ((hidden - mean) * valid).square().sum(dim=1, keepdim=True) / count
    return mean, (variance + FLOOR).sqrt()


def whiten(hidden: Tensor, mask: Tensor) -> Tensor:
    """Takes mean and variance over time from each channel of each recording, and learns none in their place.

    The whitening of UniStyle (Lee, Kim and Kwak 2022, arXiv:2211.14058), in training and at test.

    Args:
        hidden: [B, T, D].
        mask: [B, T].

    Returns:
        [B, T, D] (padding undefined).
    """
    mean, deviation = statistics(hidden, mask)
    return (hidden - mean) / deviation


def mix_style(hidden: Tensor, mask: Tensor) -> Tensor:
    """Gives each recording a mixture of its own mean and deviation and those of another recording of the batch.

    MixStyle (Zhou et al. 2021, arXiv:2104.02008, equations 4 to 6): gamma x standardised + beta, where gamma and beta
    are mixed with lambda ~ Beta(0.1, 0.1) for each recording. Statistics carry no gradient. Random numbers come from
    torch's generator.

    Args:
        hidden: [B, T, D].
        mask: [B, T].

    Returns:
        [B, T, D] (padding undefined).
    """
    count = len(hidden)
    mean, deviation = (part.detach() for part in statistics(hidden, mask))
    other = torch.randperm(count)
    alpha = torch.full((count, 1, 1), MIXING)
    share = torch.distributions.Beta(alpha, alpha).sample().to(hidden)
    beta = share * mean + (1 - share) * mean[other]
    gamma = share * deviation + (1 - share) * deviation[other]
    return gamma * (hidden - mean) / deviation + beta
