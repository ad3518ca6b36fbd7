"""This project's training step on made-up recordings, and how far its loss and gradients are from float64's."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xded.config import build
from xded.models.student import Student, decoder_input
from xded.objectives import TopK
from xded.tokenizer import Tokenizer
from xded.training.data import Batch
from xded.training.losses import loss_parts, weighted_sum
from xded.training.optimizer import AdamW

KEPT = 32  # entries of a stored target


class Xded:
    """The student, its optimiser and one batch.

    Args:
        case: `layers`, `width`, `channels`, `dropout`, `bf16` (as Lightning's bf16-mixed), `frozen` (the heads learn
            from encoded frames that are kept, as they do in a stage with a frozen encoder).
        waveforms, samples: [B, N], [B]; texts: tokens [B, U], the last of which become </s>, and their posteriors
            [B, U, V].
    """

    def __init__(self, case: dict[str, Any], waveforms: Tensor, samples: Tensor, *texts: Tensor) -> None:
        tokens, target = texts
        self.bf16 = bool(case.get("bf16"))
        self.waveforms, self.samples = waveforms, samples
        sizes = {
            "size": None, "width": case["width"], "encoder_layers": case["layers"], "heads": 4, "kernel": 31,
            "feed_forward_factor": 4, "subsampling_channels": case["channels"], "decoder_layers": 4,
            "decoder_feed_forward": 1_024, "dropout": case["dropout"],
        }  # fmt: skip
        objective = {"ctc": 0.5, "cross_entropy": 0.0, "decoder_kd": 1.0, "temperature": 1.0}
        self.config = build({"model": sizes, "objective": objective}, "the benchmark")
        self.pieces = Tokenizer.train(["ABC"], "char", 64, "upper")  # the loss asks it for special ids alone
        self.student = Student(self.config.model, target.shape[2], self.config.features)
        self.encoder: nn.Module = self.student.encoder
        ended = torch.cat([tokens[:, :-1], torch.full_like(tokens[:, :1], self.pieces.eos)], dim=1)
        probabilities, ids = target.topk(KEPT)
        self.batch = Batch(
            recordings=[], speakers=[], features=None, feature_lengths=samples, encoded=None, encoded_lengths=None,
            tokens=ended, token_lengths=torch.full((len(ended),), ended.shape[1] - 1), ctc_target=None,
            least_blank=None, decoder_target=TopK(ids, probabilities, 1 - probabilities.sum(2)),
        )  # fmt: skip
        self.student.train()
        if case.get("frozen"):
            self.student.encoder.requires_grad_(False).eval()
            with torch.inference_mode():
                encoded, lengths = self.student.encode(*self.student.front_end(waveforms, samples))
            self.batch.encoded, self.batch.encoded_lengths = encoded.clone(), lengths.clone()
        self.optimizer = AdamW([self.student], 0.01)

    def loss(self) -> Tensor:
        """Forward and loss, as the project's loop has them."""
        if self.batch.encoded is None:
            self.batch.features, self.batch.feature_lengths = self.student.front_end(self.waveforms, self.samples)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16, cache_enabled=False):
            return weighted_sum(loss_parts(self.student, self.batch, self.config, self.pieces), self.config)

    def clip(self) -> Tensor:
        """Norm of the gradient, which the optimiser's step shortens to at most 1."""
        return self.optimizer.clip(0, 1.0)

    def plain_loss(self) -> Tensor:
        """The same loss written out in float64."""
        features, lengths = self.student.front_end(self.waveforms, self.samples)
        encoded, frames = self.student.encode(features.double(), lengths)
        log_probs = F.log_softmax(self.student.ctc_logits(encoded), 2).transpose(0, 1)
        count = self.batch.token_lengths
        ctc = F.ctc_loss(log_probs, self.batch.tokens, frames, count, blank=self.pieces.blank, reduction="none") / count
        said = decoder_input(self.batch.tokens, self.pieces.bos)
        log_probs = F.log_softmax(self.student.decoder_logits(said, encoded, frames), 2)
        assert self.batch.decoder_target is not None
        ids, shares, rest = self.batch.decoder_target
        unlisted = torch.ones_like(log_probs, dtype=torch.bool).scatter(2, ids, False)
        other = (log_probs.exp() * unlisted).sum(2).log()
        shares, rest = shares.double(), rest.double()
        kl = (shares * (shares.log() - log_probs.gather(2, ids))).sum(2) + rest * (rest.log() - other)
        return 0.5 * ctc.mean() + kl.mean()


def agreement(ours: Xded) -> dict[str, float]:
    """Relative differences of this step from float64's, of the same weights, without dropout.

    Returns:
        `loss`; `gradient`: norm of the difference over the norm, of all parameters together; `tensor`: the same of the
        worst tensor among those that hold more than a thousandth of the norm (keys' biases have no gradient at all).
    """
    exact = copy.copy(ours)
    exact.student = copy.deepcopy(ours.student).double()
    found, wanted = ours.loss(), exact.plain_loss()
    found.backward()
    wanted.backward()
    pairs = [
        (own.grad.double(), other.grad)
        for own, other in zip(ours.student.parameters(), exact.student.parameters(), strict=True)
        if own.grad is not None and other.grad is not None
    ]
    norms = torch.stack([other.norm() for _, other in pairs])
    apart = torch.stack([(own - other).norm() for own, other in pairs])
    counted = norms > 1e-3 * norms.norm()
    return {
        "loss": abs(float(found.detach() / wanted.detach()) - 1),
        "gradient": float(apart.norm() / norms.norm()),
        "tensor": float((apart / norms)[counted].max()),
    }
