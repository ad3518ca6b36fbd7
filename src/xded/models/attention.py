"""Where the decoder looks: the weights of its cross-attention over the encoded frames."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from xded.models.student import Student


@contextmanager
def kept_weights(student: Student) -> Iterator[list[Tensor]]:
    """While it is open, every pass of the decoder adds a layer's weights to the list: [B, heads, U, T'] each."""
    kept: list[Tensor] = []

    def ask(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "need_weights": True, "average_attn_weights": False}

    def keep(module: nn.Module, args: Any, output: tuple[Tensor, Tensor]) -> None:
        kept.append(output[1])

    handles = []
    for layer in student.decoder.layers:
        assert isinstance(layer, nn.TransformerDecoderLayer)
        handles += [
            layer.multihead_attn.register_forward_pre_hook(ask, with_kwargs=True),
            layer.multihead_attn.register_forward_hook(keep),
        ]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


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
