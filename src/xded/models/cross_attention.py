"""Where the decoder looks: the weights of its attention over the encoded frames."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from xded.models.student import Student


@contextmanager
def kept_weights(student: Student) -> Iterator[list[Tensor]]:
    """While it is open, every pass of the decoder adds a layer's weights to the list: [B, heads, U, T'] each."""
    kept: list[Tensor] = []
    student.decoder.watched = kept
    try:
        yield kept
    finally:
        student.decoder.watched = None


@torch.no_grad()
def cross_attention(student: Student, features: Tensor, lengths: Tensor, tokens: Tensor) -> Tensor:
    """Cross-attention of every decoder layer while it reads or writes a text about one recording.

    Args:
        student: in eval mode.
        features: [1, T, mels]; lengths: valid frames, [1].
        tokens: [1, U], starting with <s>: what the decoder has seen before each step (`decoder_input`).

    Returns:
        [layers, heads, U, T'], T' the valid encoded frames; the weights of a step sum to 1.
    """
    if len(features) != 1 or student.training:
        raise ValueError("cross_attention takes one recording and a student in eval mode")
    encoded, encoded_lengths = student.encode(features, lengths)
    with kept_weights(student) as kept:
        student.decoder_logits(tokens, encoded, encoded_lengths)
    return torch.cat(kept)[..., : int(encoded_lengths[0])]
