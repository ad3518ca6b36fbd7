"""What some parts of the loss learn beside the recogniser: in `latest.pt` for a resume, never in the recogniser."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xded import objectives

FIRST = 1_000_003  # between the seed of these weights and the recogniser's


class Auxiliary(nn.Module):
    """A projection to the guide's width (`feature_kd`) and a classifier of speakers (`adversary`).

    Args:
        width: D of the recogniser's encoder.
        guide_width: of the guide's encoder; a guide of the same width, or none, needs no projection.
        speakers: whom the adversary tells apart; none: there is no adversary.
        seed: of the first weights, which take nothing from the random numbers that the run draws.
    """

    def __init__(self, width: int, guide_width: int | None, speakers: Iterable[str], seed: int) -> None:
        super().__init__()
        self.numbers = {speaker: number for number, speaker in enumerate(sorted(set(speakers)))}
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed + FIRST)
            alike = guide_width in (None, width)
            self.projection = nn.Identity() if alike else nn.Linear(width, guide_width or width)
            layers = (nn.Linear(width, width), nn.ReLU(), nn.Linear(width, len(self.numbers))) if self.numbers else ()
            self.classifier = nn.Sequential(*layers)

    def feature_kd(self, encoded: Tensor, guide: Tensor, frames: Tensor) -> Tensor:
        """`objectives.feature_kd` of the projected frames: [B, T, D], [B, T, D of the guide], [B] -> scalar."""
        return objectives.feature_kd(self.projection(encoded), guide, frames)

    def adversary(self, encoded: Tensor, frames: Tensor, speakers: Sequence[str], progress: float) -> Tensor:
        """Cross-entropy of the speakers, told from the mean frame; what it does to the encoder is reversed.

        Domain-adversarial training (Ganin et al. 2016, arXiv:1505.07818, equation 10), whose domains are speakers.

        Args:
            encoded: [B, T, D]; frames: [B]; speakers: of each recording; progress: share of the run that is over.
        """
        pooled = objectives.reverse_gradient(objectives.mean_frame(encoded.float(), frames), progress)
        numbers = torch.tensor([self.numbers[speaker] for speaker in speakers], device=encoded.device)
        return F.cross_entropy(self.classifier(pooled), numbers)
