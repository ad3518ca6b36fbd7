"""The attention decoder one token at a time, keeping the keys and values of the tokens before.

The same arithmetic as `Student.decoder_logits`, which reads a whole prefix again for every token: a text of U tokens
costs U steps here and U (U + 1) / 2 there. The weights are the student's own; nothing is copied.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xded.features import valid_mask
from xded.models.attention import masked
from xded.models.student import Student


class DecoderStep(nn.Module):
    """Next-token scores of a student, for decoding only (no dropout).

    Keys and values of all layers lie in one tensor each: [layers, B, heads, U, D / heads].
    """

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.student = student
        self.heads = student.config.heads

    def start(self, rows: int) -> tuple[Tensor, Tensor]:
        """Keys and values before the first token: two empty [layers, rows, heads, 0, D / heads]."""
        width = self.student.config.width
        shape = (len(self.student.decoder.layers), rows, self.heads, 0, width // self.heads)
        return self.student.embedding.weight.new_empty(shape), self.student.embedding.weight.new_empty(shape)

    def remember(self, encoded: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of what was heard, which no step changes: a caller makes them once.

        [B, T', D] -> two [layers, B, heads, T', D / heads].
        """
        keys, values = self.student.decoder.heard(self.student.bridge(encoded))
        return keys.transpose(1, 2), values.transpose(1, 2)

    def forward(
        self, tokens: Tensor, memory_keys: Tensor, memory_values: Tensor, lengths: Tensor, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One step; its position is the number of tokens in `keys`.

        Args:
            tokens: [B, 1], the last token of each row (<s> at the start).
            memory_keys, memory_values: of `remember`.
            lengths: valid encoded frames, [B].
            keys, values: of the U tokens before.

        Returns:
            Logits of the next token [B, V], and the keys and values of U + 1 tokens.
        """
        student, decoder = self.student, self.student.decoder
        position = student.positions[keys.shape[3] : keys.shape[3] + 1]  # [1, D]
        hidden = student.embedding(tokens) * math.sqrt(student.config.width) + position  # [B, 1, D]
        heard = masked(valid_mask(lengths, memory_keys.shape[3])[:, None, None], hidden.dtype)  # [B, 1, 1, T']
        all_keys, all_values = [], []
        for number, layer in enumerate(decoder.each()):
            query, key, value = (part.transpose(0, 1) for part in decoder.own(layer, hidden))
            all_keys.append(torch.cat([keys[number], key], dim=2))
            all_values.append(torch.cat([values[number], value], dim=2))
            hidden = hidden + self._attend(layer.self_attn, query, all_keys[-1], all_values[-1])
            query = decoder.asked(layer, hidden).transpose(0, 1)
            hidden = hidden + self._attend(
                layer.multihead_attn, query, memory_keys[number], memory_values[number], heard
            )
            hidden = hidden + layer.linear2(F.relu(layer.linear1(layer.norm3(hidden))))
        assert decoder.norm is not None
        logits = student.decoder_head(decoder.norm(hidden))[:, 0]
        return logits, torch.stack(all_keys), torch.stack(all_values)

    @staticmethod
    def _attend(
        attention: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """[B, heads, 1, D / heads] over [B, heads, U, D / heads] -> [B, 1, D]."""
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=1.0)
        return attention.out_proj(attended.transpose(1, 2).flatten(2))
