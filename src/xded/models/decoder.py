"""The attention decoder: Transformer layers (Vaswani et al. 2017) with the norm first (Xiong et al., arXiv:2002.04745).

Weights and their names are those of torch's own decoder. The arithmetic is written out: one product makes the keys and
values of all layers, and a training step with a frozen encoder, which is little else, takes a tenth less time.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xded.config import ModelConfig
from xded.models.attention import attend, dropout, in_heads, joined, weights_of


class Decoder(nn.TransformerDecoder):
    """Layers over what was heard.

    `watched`, where there is a list, receives the weights of each layer's attention over the encoded frames in every
    pass: [B, H, U, T'], before dropout.
    """

    watched: list[Tensor] | None = None

    def __init__(self, config: ModelConfig) -> None:
        layer = nn.TransformerDecoderLayer(
            config.width, config.heads, config.decoder_feed_forward, config.dropout, batch_first=True, norm_first=True
        )
        super().__init__(layer, config.decoder_layers, norm=nn.LayerNorm(config.width))
        self.width, self.head_width, self.dropout = config.width, config.width // config.heads, config.dropout

    def each(self) -> list[nn.TransformerDecoderLayer]:
        """The layers."""
        return [layer for layer in self.layers if isinstance(layer, nn.TransformerDecoderLayer)]

    def heard(self, encoded: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of all layers, which no token changes: [B, T', D] -> [layers, H, B, T', D/H] twice."""
        parts = [layer.multihead_attn for layer in self.each()]
        weight = torch.cat([part.in_proj_weight[self.width :] for part in parts])
        bias = torch.cat([part.in_proj_bias[self.width :] for part in parts])
        heads = in_heads(F.linear(encoded, weight, bias), self.head_width)
        keys, values = heads.unflatten(0, (len(parts), 2, -1)).unbind(1)
        return keys, values

    def own(self, layer: nn.TransformerDecoderLayer, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (with the scale), keys and values of the tokens: [B, U, D] -> [H, B, U, D/H] three times."""
        part = layer.self_attn
        projected = F.linear(layer.norm1(hidden), part.in_proj_weight, part.in_proj_bias)
        query, key, value = in_heads(projected, self.head_width).chunk(3)
        return query / math.sqrt(self.head_width), key, value

    def asked(self, layer: nn.TransformerDecoderLayer, hidden: Tensor) -> Tensor:
        """Queries about what was heard (with the scale): [B, U, D] -> [H, B, U, D/H]."""
        part = layer.multihead_attn
        query = F.linear(layer.norm2(hidden), part.in_proj_weight[: self.width], part.in_proj_bias[: self.width])
        return in_heads(query, self.head_width) / math.sqrt(self.head_width)

    def forward(self, hidden: Tensor, encoded: Tensor, seen: Tensor, valid: Tensor) -> Tensor:  # type: ignore[override]
        """Embedded tokens [B, U, D] and encoded frames [B, T', D] -> [B, U, D].

        Args:
            seen, valid: biases of `attend`: [U, U] and [B, 1, T'].
        """
        for layer, keys, values in zip(self.each(), *self.heard(encoded), strict=True):
            share = self.dropout if layer.training else 0.0
            attended = joined(attend(*self.own(layer, hidden), seen, share))
            hidden = hidden + dropout(layer.self_attn.out_proj(attended), share)
            query = self.asked(layer, hidden)
            if self.watched is not None:
                self.watched.append(weights_of(query, keys, valid).transpose(0, 1))
            attended = joined(attend(query, keys, values, valid, share))
            hidden = hidden + dropout(layer.multihead_attn.out_proj(attended), share)
            inner = dropout(F.relu(layer.linear1(layer.norm3(hidden))), share)
            hidden = hidden + dropout(layer.linear2(inner), share)
        assert self.norm is not None
        return self.norm(hidden)
